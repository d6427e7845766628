"""A two-level group convolution as one dense convolution, with the composed filters A_k + S_k R_0.

Shape letters as in :mod:`tlgc_mp.nn.coarse_level`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tlgc_mp.nn.coarse_level import Context, convolution_backward, without_autocast
from tlgc_mp.nn.window import Window, memory_format_of


def composed(weight: Tensor, restriction: Tensor, prolongation: Tensor, *, groups: int) -> Tensor:
    """The dense filters (m, n, d, d) of a whole layer: A_k on the diagonal, and S_k R_0 everywhere."""
    coarse_groups = groups * weight.shape[1] // restriction.shape[1]
    if len(restriction) == coarse_groups:  # one representative each
        factors = prolongation.view(-1, coarse_groups, *[1] * (restriction.dim() - 1))
        filters = (factors * restriction).contiguous()  # m, C, n/C, d, d
    else:
        columns = prolongation.unflatten(1, (coarse_groups, -1)).transpose(0, 1)  # C, m, r
        rows = restriction.unflatten(0, (coarse_groups, -1)).flatten(2)  # C, r, n/C * d * d
        filters = (columns @ rows).transpose(0, 1).contiguous()
    filters = filters.view(len(weight), groups, *weight.shape[1:])
    _diagonal(filters).add_(weight.view(groups, -1, *weight.shape[1:]))
    return filters.flatten(1, 2)


def _diagonal(filters: Tensor) -> Tensor:
    """(m, N, n/N, d, d) -> what a group reads of its own channels, (N, m/N, n/N, d, d), a view."""
    groups = filters.shape[1]
    return filters.view(groups, -1, *filters.shape[1:]).diagonal(dim1=0, dim2=2).movedim(-1, 0)


def composed_out_of_place(
    weight: Tensor, restriction: Tensor, prolongation: Tensor, groups: int, coarse_groups: int, shape: tuple[int, ...]
) -> Tensor:
    """The same, of ``shape`` (n, d, d) an output, where no tensor may be written in place, nor asked for its shape."""
    coarse = prolongation @ _in_blocks(restriction, coarse_groups, shape).flatten(1)
    filters: Tensor = _in_blocks(weight, groups, shape) + coarse.unflatten(1, shape)
    return filters


def _in_blocks(filters: Tensor, groups: int, shape: tuple[int, ...]) -> Tensor:
    """Filters that read the channels of their group -> (..., n, d, d), zero for all others."""
    width, blocks, kernel = shape[0] // groups, filters.unflatten(0, (groups, -1)), [0, 0] * (len(shape) - 1)
    placed = [F.pad(blocks[group], (*kernel, group * width, (groups - 1 - group) * width)) for group in range(groups)]
    return torch.cat(placed)


class Dense(torch.autograd.Function):
    """The same as one dense convolution with the filters A_k + S_k R_0 (d0 = d, all groups on one device).

    It does N times the arithmetic. Where groups are narrow it is faster all the same: a group's few channels do not
    fill an accelerator's matrix units or a core's vectors, and there is nothing left to do beside the convolution. The
    filters are composed in the type of the parameters and rounded once, to that of ``x``; ``kept`` are those of
    evaluation, if any.
    """

    @staticmethod
    @without_autocast
    def forward(
        ctx: Context,
        x: Tensor,
        weight: Tensor,
        restriction: Tensor,
        prolongation: Tensor,
        bias: Tensor | None,
        fine: Window,
        kept: Tensor | None,
    ) -> Tensor:
        ctx.memory_format = memory_format_of(x)
        # On accelerators the convolution is faster in channels_last by more than reordering takes.
        ctx.computed_in = ctx.memory_format if x.device.type == "cpu" else fine.channels_last
        x = x.contiguous(memory_format=ctx.computed_in)
        groups = x.shape[1] // weight.shape[1]
        filters = composed(weight, restriction, prolongation, groups=groups).to(x.dtype) if kept is None else kept
        filters = filters.contiguous(memory_format=ctx.computed_in)
        bias = None if bias is None else bias.to(x.dtype)
        out = fine.convolve(x, filters, bias)
        ctx.save_for_backward(x, filters, restriction, prolongation)
        ctx.fine, ctx.groups = fine, groups
        return out.contiguous(memory_format=ctx.memory_format)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, filters, restriction, prolongation = ctx.saved_tensors
        grad = grad.contiguous(memory_format=ctx.computed_in)
        needed = (ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:4]))
        grad_x, grad_filters = convolution_backward(grad, x, filters, ctx.fine, 1, needed)
        if grad_x is not None:
            grad_x = grad_x.contiguous(memory_format=ctx.memory_format)
        grad_weight = grad_restriction = grad_prolongation = None
        if grad_filters is not None:
            grad_filters = grad_filters.to(restriction.dtype).contiguous()  # m, n, d, d
            grad_weight = _diagonal(grad_filters.unflatten(1, (ctx.groups, -1))).flatten(0, 1)
            coarse_groups = grad_filters.shape[1] // restriction.shape[1]
            by_group = grad_filters.view(len(grad_filters), coarse_groups, -1).transpose(0, 1)  # C, m, n/C * d * d
            rows = restriction.reshape(coarse_groups, -1, by_group.shape[2])  # C, r, n/C * d * d
            columns = prolongation.t().unflatten(0, (coarse_groups, -1))  # C, r, m
            grad_prolongation = torch.bmm(by_group, rows.transpose(1, 2)).transpose(0, 1).flatten(1)
            grad_restriction = torch.bmm(columns, by_group).view(restriction.shape)
        grad_bias = None
        if ctx.needs_input_grad[4]:
            grad_bias = grad.sum((0, *range(2, grad.dim())), dtype=restriction.dtype)
        return grad_x, grad_weight, grad_restriction, grad_prolongation, grad_bias, None, None


class KeptFilters:
    """The composed filters of a layer in evaluation, for as long as its parameters hold the values they had.

    Values are compared, and not versions: what is written through ``.data``, as optimizers do, changes no version.
    Comparing reads what composing would read, and writes nothing. A copy of the layer keeps none.
    """

    def __init__(self) -> None:
        self._kept: tuple[tuple[Tensor, ...], Tensor] | None = None

    def __reduce__(self) -> tuple[type[KeptFilters], tuple[()]]:
        return KeptFilters, ()

    def clear(self) -> None:
        self._kept = None

    def filters(self, x: Tensor, groups: int, *parameters: Tensor) -> Tensor:
        """Those of ``parameters``, in the type and the memory format of ``x``."""
        kept, form = self._kept, memory_format_of(x)
        fits = kept is not None and kept[1].dtype == x.dtype and kept[1].is_contiguous(memory_format=form)
        if kept is None or not fits or not all(map(_same, kept[0], parameters)):
            with torch.inference_mode(False), torch.no_grad():  # else no gradient could be taken through them later
                filters = composed(*parameters, groups=groups).to(x.dtype, memory_format=form)
                kept = tuple(each.clone() for each in parameters), filters
            self._kept = kept
        return kept[1]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
