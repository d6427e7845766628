"""Rules of convolutions.

A dense convolution is column-parallel (the whole input, a share of the output) or row-parallel (a share of the input, a
sum over the ranks), by how its weight is cut, or by its widths where code has computed a whole weight. Autograd keeps
its input as it came, a share where it was one, and backward gathers again. What is whole for a moment, the input or the
sum, is made in blocks of channels where it is large. A group convolution is local where the ranks divide its groups;
where they do not, it is row-parallel in each group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from tlgc_mp.parallel.layout import (
    WHOLE,
    Layout,
    Ranks,
    gather_shares,
    scatter_sum,
    start_gather_shares,
    start_scatter_sum,
    take_share,
)
from tlgc_mp.parallel.rules import aten, rule
from tlgc_mp.parallel.rules_layers import CHANNELS, cut_dim, optional, ranks_of
from tlgc_mp.parallel.signatures import Args, Kwargs, Operator
from tlgc_mp.parallel.split_tensor import SplitTensor, share_in

LARGEST_TRANSIENT = 256 << 20
"""Bytes of one tensor that a rank holds whole for a moment; what is larger comes in blocks of channels."""

PassBack: TypeAlias = Callable[[Tensor, Tensor, Tensor, list[bool]], tuple[Tensor, Tensor, Tensor]]
"""(gradient of the output, input, filters, which gradients are asked for) -> those of input, filters and bias."""


def _convolution_kind(x: Tensor, weight: Tensor, transposed: bool, groups: int) -> tuple[str, Layout, Layout]:
    """How a convolution is computed on shares, with the layouts of its input and its output; backward asks again.

    The kinds: ``grouped`` (local), ``column``, ``row``, ``grouped row``, and ``whole`` where none of these fits.
    """
    ranks = ranks_of(x, weight)
    if cut_dim(x) not in (None, 1):
        return "whole", WHOLE, WHOLE
    out_channels = weight.shape[1] * groups if transposed else weight.shape[0]
    channels = x.shape[1]
    # The stride of a share one channel wide says nothing of the whole.
    divides = out_channels % ranks.size == 0 and out_channels > ranks.size
    if groups > 1:
        segments = x.cut.segments if type(x) is SplitTensor else None
        if cut_dim(weight) == 1 and not transposed:
            summed = CHANNELS if out_channels % ranks.size == 0 else WHOLE
            return "grouped row", Layout(1, (channels // groups,) * groups), summed
        is_whole = cut_dim(x) is None and cut_dim(weight) is None
        if cut_dim(weight) not in (None, 0) or groups % ranks.size or (is_whole and not divides):
            return "whole", WHOLE, WHOLE
        if segments is None or groups != channels:
            return "grouped", CHANNELS, CHANNELS
        return "grouped", x.cut, Layout(1, tuple(s * out_channels // channels for s in segments))  # type: ignore[attr-defined]
    outputs = 1 if transposed else 0
    if type(weight) is SplitTensor and cut_dim(weight) == outputs:
        return "column", WHOLE, Layout(1, weight.cut.segments)
    summed = CHANNELS if out_channels % ranks.size == 0 else WHOLE
    if type(weight) is SplitTensor and cut_dim(weight) == 1 - outputs:
        # A joined input stays as it lies: it is the filters' input channels that are brought into its order.
        return "row", x.cut if type(x) is SplitTensor and cut_dim(x) == 1 else Layout(1, weight.cut.segments), summed
    if cut_dim(weight) is None and type(x) is SplitTensor and cut_dim(x) == 1 and 2 * out_channels <= channels:
        return "row", x.cut, summed
    if cut_dim(weight) is None and divides:
        return "column", WHOLE, CHANNELS
    return "whole", WHOLE, WHOLE


def _weight_layout(kind: str, transposed: bool, inputs: Layout, outputs: Layout) -> Layout:
    if kind == "grouped":
        return Layout(0, inputs.segments if transposed else outputs.segments)
    if kind == "column":
        return Layout(1 if transposed else 0, outputs.segments)
    if kind == "grouped row":
        return Layout(1, None)
    return Layout(0 if transposed else 1, inputs.segments)


@rule(aten.convolution.default)
def convolution(func: Operator, args: Args, kwargs: Kwargs) -> object:
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = args
    if type(x) is not SplitTensor and type(weight) is not SplitTensor:
        return NotImplemented
    kind, inputs, outputs = _convolution_kind(x, weight, transposed, groups)
    read, written = (
        (weight.shape[0], weight.shape[1] * groups) if transposed else (weight.shape[1] * groups, len(weight))
    )
    fits = x.shape[1] == read and (bias is None or bias.shape == (written,))
    if kind == "whole" or not fits:
        return NotImplemented  # where it does not fit, torch complains of the whole
    ranks = ranks_of(x, weight)
    own = share_in(weight, _weight_layout(kind, transposed, inputs, outputs), ranks)
    geometry = (stride, padding, dilation, transposed, output_padding)
    own_bias = optional(bias, Layout(0 if outputs.dim == 1 else None, outputs.segments), ranks)
    if kind == "grouped":
        share = func(share_in(x, inputs, ranks), own, own_bias, *geometry, groups // ranks.size)
        return SplitTensor(share, outputs, ranks)

    def convolve(part: Tensor, filters: Tensor, added: Tensor | None = None) -> Tensor:
        y: Tensor = func(part, filters, added, *geometry, groups)
        return y

    if kind == "column":
        return SplitTensor(_column(x, own, own_bias, 1 if not transposed else 0, convolve, ranks), outputs, ranks)
    if kind == "grouped row":
        share = scatter_sum(convolve(share_in(x, inputs, ranks), own), outputs, ranks)
    else:
        positions = x.numel() // x.shape[1] * math.prod(stride) ** (1 if transposed else -1)  # of the output, or about
        share = _row(share_in(x, inputs, ranks), own, outputs, 0 if not transposed else 1, positions, convolve, ranks)
    if own_bias is not None:
        share = share + own_bias.view(-1, *[1] * (x.dim() - 2))
    return SplitTensor(share, outputs, ranks)


def _column(
    x: Tensor, own: Tensor, bias: Tensor | None, channels: int, convolve: Callable[..., Tensor], ranks: Ranks
) -> Tensor:
    """This rank's outputs; ``channels`` is the dimension of the filters ``own`` that the input's channels are."""
    total: Tensor | None = None
    for part, places in _input_blocks(x, ranks):
        filters = own if places is None else own.index_select(channels, places)
        product = convolve(part, filters, bias if total is None else None)
        total = product if total is None else total.add_(product)
    assert total is not None
    return total


def _row(
    share: Tensor,
    own: Tensor,
    outputs: Layout,
    channels: int,
    positions: float,
    convolve: Callable[..., Tensor],
    ranks: Ranks,
) -> Tensor:
    """This rank's outputs, summed over the ranks; ``channels`` is the dimension of the filters that outputs are."""
    size = int(positions * own.shape[channels] * share.element_size())
    if outputs.dim is None or size <= LARGEST_TRANSIENT:
        return scatter_sum(convolve(share, own), outputs, ranks)
    parts = []
    for places in _channel_blocks(own.shape[channels], outputs, size, ranks, share.device):
        parts.append(scatter_sum(convolve(share, own.index_select(channels, places)), CHANNELS, ranks))
    return torch.cat(parts, 1)


def _input_blocks(x: Tensor, ranks: Ranks) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The whole input of a convolution, as a rule at once; else blocks of its channels, and which these are."""
    size = x.numel() * x.element_size()
    if type(x) is not SplitTensor or x.cut.dim is None or size <= LARGEST_TRANSIENT:
        yield share_in(x, WHOLE, ranks), None
        return
    start = 0
    for places in _channel_blocks(x.shape[1], x.cut, size, ranks, x.device):
        length = len(places) // ranks.size
        block = SplitTensor(x.share.narrow(1, start, length), CHANNELS, ranks)
        yield gather_shares(block), places
        start += length


def _channel_blocks(channels: int, cut: Layout, size: int, ranks: Ranks, device: torch.device) -> Iterator[Tensor]:
    """Blocks of ``channels``, as many of each rank's as of another's, that keep a tensor of ``size`` bytes small."""
    every = torch.arange(channels, device=device)
    held = [take_share(every, Layout(0, cut.segments), ranks, rank) for rank in range(ranks.size)]
    count = min(-(-size // LARGEST_TRANSIENT), len(held[0]))
    for block in zip(*(part.tensor_split(count) for part in held), strict=True):
        yield torch.cat(block)


@rule(aten.convolution_backward.default)
def convolution_backward(func: Operator, args: Args, kwargs: Kwargs) -> object:
    grad, x, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, mask = args
    if type(x) is not SplitTensor and type(weight) is not SplitTensor:
        return NotImplemented
    kind, inputs, outputs = _convolution_kind(x, weight, transposed, groups)
    if kind == "whole":
        return NotImplemented
    ranks = ranks_of(x, weight)
    weight_layout = _weight_layout(kind, transposed, inputs, outputs)
    own = share_in(weight, weight_layout, ranks)
    bias_layout = Layout(0, outputs.segments) if kind in ("grouped", "column") else WHOLE
    local_groups = groups // ranks.size if kind == "grouped" else groups

    def pass_back(grad: Tensor, part: Tensor, filters: Tensor, which: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        geometry = (stride, padding, dilation, transposed, output_padding, local_groups)
        sizes = None if bias_sizes is None else [grad.shape[1]]
        return func(grad, part, filters, sizes, *geometry, which)  # type: ignore[no-any-return]

    if kind == "column":
        layout = x.cut if type(x) is SplitTensor else WHOLE
        incoming = share_in(grad, outputs, ranks)
        found = _column_backward(incoming, x, own, layout, 0 if transposed else 1, list(mask), pass_back, ranks)
    elif kind == "row":
        layout = inputs
        found = _row_backward(
            grad, share_in(x, inputs, ranks), own, outputs, 1 if transposed else 0, mask, pass_back, ranks
        )
    else:
        layout = inputs
        incoming = share_in(grad, outputs if kind == "grouped" else WHOLE, ranks)
        found = pass_back(incoming, share_in(x, inputs, ranks), own, mask)
    return tuple(
        None if t is None else SplitTensor(t, where, ranks)
        for t, where in zip(found, (layout, weight_layout, bias_layout), strict=True)
    )


def _column_backward(
    grad: Tensor,
    x: Tensor,
    own: Tensor,
    layout: Layout,
    channels: int,
    mask: list[bool],
    pass_back: PassBack,
    ranks: Ranks,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of this rank's input, filters and bias: each rank has the part that its outputs pass back.

    The input arrives while its gradient is computed, and that is summed while the filters' gradient is.
    """
    if x.numel() * x.element_size() > LARGEST_TRANSIENT and type(x) is SplitTensor:
        return _column_backward_in_blocks(grad, x, own, layout, channels, mask, pass_back, ranks)
    arrival = start_gather_shares(x) if type(x) is SplitTensor and mask[1] else None
    total: Callable[[], Tensor | None] = lambda: None  # noqa: E731
    if mask[0]:  # of the input, its shape is asked for
        unread = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        total = start_scatter_sum(pass_back(grad, unread, own, [True, False, False])[0], layout, ranks)
        del unread
    to_weight = to_bias = None
    if mask[1]:
        _, to_weight, to_bias = pass_back(grad, x if arrival is None else arrival(), own, [False, *mask[1:]])
    elif mask[2]:
        to_bias = grad.sum([dim for dim in range(grad.dim()) if dim != 1])
    return total(), to_weight, to_bias


def _column_backward_in_blocks(
    grad: Tensor,
    x: Tensor,
    own: Tensor,
    layout: Layout,
    channels: int,
    mask: list[bool],
    pass_back: PassBack,
    ranks: Ranks,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    to_inputs: list[Tensor] = []
    to_weight = torch.empty_like(own) if mask[1] else None
    to_bias: Tensor | None = None
    for part, places in _input_blocks(x, ranks):
        filters = own if places is None else own.index_select(channels, places)
        of_part, of_filters, of_bias = pass_back(grad, part, filters, [*mask[:2], mask[2] and to_bias is None])
        to_bias = of_bias if to_bias is None else to_bias
        if of_part is not None:
            to_inputs.append(scatter_sum(of_part, layout if places is None else CHANNELS, ranks))
        if places is None:
            to_weight = of_filters
        elif to_weight is not None:
            to_weight.index_copy_(channels, places, of_filters)
    to_input = None if not to_inputs else to_inputs[0] if len(to_inputs) == 1 else torch.cat(to_inputs, 1)
    return to_input, to_weight, to_bias


def _row_backward(
    grad: Tensor,
    share: Tensor,
    own: Tensor,
    outputs: Layout,
    channels: int,
    mask: list[bool],
    pass_back: PassBack,
    ranks: Ranks,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of this rank's input and filters, and of the bias, of which every rank has the whole."""
    split_grad = grad if outputs.dim is None else SplitTensor(share_in(grad, outputs, ranks), outputs, ranks)
    to_input: Tensor | None = None
    to_weight = torch.empty_like(own) if mask[1] else None
    to_bias = torch.empty(own.shape[channels], dtype=own.dtype, device=own.device) if mask[2] else None
    for part, places in _input_blocks(split_grad, ranks):
        filters = own if places is None else own.index_select(channels, places)
        of_input, of_filters, of_bias = pass_back(part, share, filters, mask)
        if of_input is not None:
            to_input = of_input if to_input is None else to_input.add_(of_input)
        if places is None:
            return to_input, of_filters, of_bias
        if to_weight is not None:
            to_weight.index_copy_(channels, places, of_filters)
        if to_bias is not None:
            to_bias.index_copy_(0, places, of_bias)
    return to_input, to_weight, to_bias
