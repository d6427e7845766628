"""The computation of a two-level group convolution: forward and backward passes, in two ways that give the same.

A third is in :mod:`tlgc_mp.nn.composed`.

    y_k = A_k x_k + S_k [R_0 x_1, ..., R_0 x_N]

Shape letters: B images, n input channels, m output channels, N groups, G groups held here (G = N on one device), r
representatives a group, H x W input and h x w output positions, L = B * h * w. Where representatives are summed over
the groups, all channels are one group of the coarse level: it has C groups here, G or 1, and C' on all ranks, N or 1.
Shapes are those of images; volumes have a dimension more.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from tlgc_mp.nn.window import Window, from_last, memory_format_of, to_last

Method = TypeVar("Method", bound=Callable[..., object])

_STANDS_FOR = contextvars.ContextVar("the device that the meta device stands for", default="cpu")


@contextlib.contextmanager
def meta_stands_for(device_type: str) -> Iterator[None]:
    """Has layers on the meta device compute in the ways that they choose on a device of that type, while entered."""
    token = _STANDS_FOR.set(device_type)
    try:
        yield
    finally:
        _STANDS_FOR.reset(token)


def is_for_cpu(tensor: Tensor) -> bool:
    """Whether ``tensor`` is on a CPU, or on the meta device in its place."""
    return (_STANDS_FOR.get() if tensor.is_meta else tensor.device.type) == "cpu"


PARTS, PART_LENGTH = 256, 128
"""Of a sum over all positions on an accelerator: how many parts at most, and of how many positions at least."""


class Exchange(Protocol):
    """How the representatives of the groups held here meet those of the groups held elsewhere.

    Representatives travel channel by channel, as (channels, L): joining the shares of several ranks is then a
    concatenation along the first dimension, and no side ever permutes.
    """

    def forward(self, share: Tensor) -> Callable[[], Tensor]:
        """Starts (C r, L) of the groups held here -> (C' r, L) of all groups, which the function returned gives when it
        has arrived."""
        ...

    def backward(self, full: Tensor) -> Callable[[], Tensor]:
        """Starts (C' r, L) summed over all holders -> (C r, L) of the groups held here, which the function returned
        gives when it has arrived."""
        ...


class WholeExchange:
    """The exchange of a device that holds every group: there is nobody to meet."""

    def forward(self, share: Tensor) -> Callable[[], Tensor]:
        return lambda: share

    def backward(self, full: Tensor) -> Callable[[], Tensor]:
        return lambda: full


def rows_of(x: Tensor) -> Tensor:
    """(B, C, h, w), channels_last -> (L, C), a view."""
    return to_last(x).view(-1, x.shape[1])


def _image(rows: Tensor, like: Tensor) -> Tensor:
    """(L, C) -> (B, C, h, w), channels_last, with the batch and positions of ``like``."""
    return from_last(rows.view(like.shape[0], *like.shape[2:], rows.shape[1]))


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on where ``tensor`` lies; the meta device has none."""
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)


class Context(FunctionCtx):
    """What the autograd functions of the two-level layers keep for backward."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    memory_format: torch.memory_format
    computed_in: torch.memory_format
    fine: Window
    coarse: Window
    groups: int
    count: int
    summed: bool
    exchange: Exchange


def without_autocast(method: Method) -> Method:
    """A pass of an autograd function in the types that its tensors have: on accelerators autocast would sum in float32
    what is to be multiplied in bfloat16."""

    @functools.wraps(method)
    def run(ctx: Context, tensor: Tensor, *others: object) -> object:
        if not autocasts(tensor):
            return method(ctx, tensor, *others)
        with torch.autocast(tensor.device.type, enabled=False):
            return method(ctx, tensor, *others)

    return cast(Method, run)


def taps_of(restriction: Tensor, groups: int) -> Tensor:
    """(C r, n/C, d0, d0) -> (C, r * d0 * d0, n/C); a view where it is channels_last."""
    taps: Tensor = to_last(restriction).unflatten(0, (groups, -1))
    return taps.flatten(1, -2)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(B, n, H, W), channels_last -> (G, B * H * W, n/N), a view."""
    channels = x.shape[1]
    width = channels // groups
    return x.as_strided((groups, x.numel() // channels, width), (width, channels, 1))


_KERNEL = {2: (1, 2), 3: (1, 2, 3)}
"""The dimensions of the kernel in what :meth:`Window.views` gives."""


def _restrict(x: Tensor, restriction: Tensor, window: Window, sizes: Sequence[int]) -> Tensor:
    """The representatives (C r, B * h * w) of ``x``, whose (C, r * d0 * d0) taps are one matrix product.

    A convolution with one output channel a group would cost what one with 16 costs.
    """
    groups = x.shape[1] // restriction.shape[1]
    planes = taps_of(restriction, groups) @ _grouped(x, groups).transpose(1, 2)  # C, r * d0 * d0, B * H * W
    planes = planes.view(restriction.shape[0], math.prod(window.kernel), x.shape[0], *x.shape[2:])
    return window.views(window.pad(planes, 1), sizes).sum(_KERNEL[len(sizes)]).flatten(1)


def _restrict_transposed(grad: Tensor, x: Tensor, groups: int, window: Window, sizes: Sequence[int]) -> Tensor:
    """(C r, B * h * w) -> (C, r * d0 * d0, B * H * W): by tap and position it read, the gradient of the outcome."""
    count, shape = len(grad), x.shape
    planes = grad.new_zeros(count, math.prod(window.kernel), shape[0], *window.padded(shape[2:]))
    window.views(planes, sizes).copy_(grad.view(count, *(1,) * len(sizes), shape[0], *sizes))
    by_group: Tensor = window.pad(planes, -1).flatten(2).unflatten(0, (groups, -1))
    return by_group.flatten(1, 2)


def _sum_over_positions(taps: Tensor, x: Tensor) -> Tensor:
    """(C, taps, L) times (C, L, width) -> (C, taps, width).

    On an accelerator in parts, for all of its cores: one matrix product as long and narrow as this occupies a few.
    """
    positions = x.shape[1]
    parts = 1 if is_for_cpu(x) else math.gcd(positions // math.gcd(positions, PART_LENGTH), PARTS)
    if parts == 1:
        return taps @ x
    by_part = taps.unflatten(2, (parts, -1)).transpose(1, 2)  # C, parts, taps, L / parts
    products: Tensor = by_part @ x.unflatten(1, (parts, -1))
    return products.sum(1)


def convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, window: Window, groups: int, needed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a group convolution's input and weight, as far as they are ``needed``."""
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, *window[1:], False, (0,) * len(window.kernel), groups, (*needed, False)
    )
    return grad_x, grad_weight


class Overlapped(torch.autograd.Function):
    """y_k = A_k x_k + S_k gather(R_0 x_k), the collectives in flight while the fine convolution is computed.

    Forward: restriction, all-gather || fine convolution; the prolongation is added into its output. Backward: the
    gradient of the representatives, reduce-scatter || gradients of the fine convolution; that of the restriction is
    added into them. Nothing as large as an output is kept for backward but the input. The restriction is
    (C r, n/C, d0, d0), with C = 1 where an all-reduce sums the representatives.
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
        coarse: Window,
        groups: int,
        exchange: Exchange,
    ) -> Tensor:
        ctx.memory_format = memory_format_of(x)
        x = x.contiguous(memory_format=fine.channels_last)
        arrival = exchange.forward(_restrict(x, restriction, coarse, fine.output_size(x.shape[2:])))  # in flight
        out = fine.convolve(x, weight, bias, groups)
        out = out.contiguous(memory_format=fine.channels_last)
        gathered = arrival()  # C' r, L
        rows_of(out).addmm_(gathered.t(), prolongation.t())
        ctx.save_for_backward(x, weight, restriction, prolongation, gathered)
        ctx.fine, ctx.coarse, ctx.groups, ctx.exchange = fine, coarse, groups, exchange
        return out.contiguous(memory_format=ctx.memory_format)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, restriction, prolongation, gathered = ctx.saved_tensors
        groups = ctx.groups
        grad = grad.contiguous(memory_format=ctx.fine.channels_last)
        grad_rows = rows_of(grad)  # L, m
        arrival = ctx.exchange.backward(prolongation.t() @ grad_rows.t())  # in flight
        needed = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        grad_x, grad_weight = convolution_backward(grad, x, weight, ctx.fine, groups, needed)
        grad_prolongation = (gathered @ grad_rows).t() if ctx.needs_input_grad[3] else None
        grad_bias = grad_rows.sum(0) if ctx.needs_input_grad[4] else None
        coarse_groups = x.shape[1] // restriction.shape[1]
        taps = _restrict_transposed(arrival(), x, coarse_groups, ctx.coarse, grad.shape[2:])
        if grad_x is not None:
            grad_x = grad_x.contiguous(memory_format=ctx.fine.channels_last)
            _grouped(grad_x, coarse_groups).baddbmm_(taps.transpose(1, 2), taps_of(restriction, coarse_groups))
            grad_x = grad_x.contiguous(memory_format=ctx.memory_format)
        grad_restriction = None
        if ctx.needs_input_grad[2]:
            grad_taps = _sum_over_positions(taps, _grouped(x, coarse_groups))  # C, r * d0 * d0, n/C
            grad_restriction = from_last(grad_taps.flatten(0, 1).unflatten(0, (-1, *ctx.coarse.kernel)))
        return grad_x, grad_weight, grad_restriction, grad_prolongation, grad_bias, None, None, None, None


class Fused(torch.autograd.Function):
    """The same with the restriction as r more filters of each group's fine convolution (Section 3.2, d0 = d).

    The restriction is (G r, n/N, d, d) here, also where ``summed`` says that the representatives of the groups are.
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
        groups: int,
        summed: bool,
        exchange: Exchange,
    ) -> Tensor:
        ctx.memory_format = memory_format_of(x)
        x = x.contiguous(memory_format=fine.channels_last)
        by_group = (weight.unflatten(0, (groups, -1)), restriction.unflatten(0, (groups, -1)))
        count, filters = by_group[1].shape[1], torch.cat(by_group, 1).flatten(0, 1)
        both = fine.convolve(x, filters, None, groups)
        both = both.contiguous(memory_format=fine.channels_last)
        both_rows = rows_of(both).unflatten(1, (groups, -1))  # L, G, m/N + r
        own = both_rows[:, :, -count:]
        share = own.sum(1).t() if summed else own.permute(1, 2, 0).flatten(0, 1)
        gathered = exchange.forward(share.contiguous())()  # C' r, L
        size = (both.shape[0], weight.shape[0], *both.shape[2:])
        # Not a view of its rows: an in-place activation may follow, which autograd refuses on a view made here.
        out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=fine.channels_last)
        rows = rows_of(out)
        fine_rows, out_groups = both_rows[:, :, :-count], rows.unflatten(1, (groups, -1))
        if bias is None:
            out_groups.copy_(fine_rows)
        else:
            torch.add(fine_rows, bias.view(groups, -1), out=out_groups)
        rows.addmm_(gathered.t(), prolongation.t())
        ctx.save_for_backward(x, filters, prolongation, gathered)
        ctx.fine, ctx.groups, ctx.count, ctx.summed, ctx.exchange = fine, groups, count, summed, exchange
        return out.contiguous(memory_format=ctx.memory_format)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, filters, prolongation, gathered = ctx.saved_tensors
        groups, count = ctx.groups, ctx.count
        grad_rows = rows_of(grad.contiguous(memory_format=ctx.fine.channels_last))  # L, m
        arrival = ctx.exchange.backward(prolongation.t() @ grad_rows.t())  # in flight
        grad_prolongation = (gathered @ grad_rows).t() if ctx.needs_input_grad[3] else None
        grad_bias = grad_rows.sum(0) if ctx.needs_input_grad[4] else None
        both = grad_rows.new_empty(grad_rows.shape[0], groups, grad_rows.shape[1] // groups + count)
        both[:, :, :-count].copy_(grad_rows.unflatten(1, (groups, -1)))
        both[:, :, -count:].copy_(arrival().unflatten(0, (-1, count)).permute(2, 0, 1))
        needed = (ctx.needs_input_grad[0], ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
        grad_both = _image(both.flatten(1), grad)
        grad_x, grad_filters = convolution_backward(grad_both, x, filters, ctx.fine, groups, needed)
        if grad_x is not None:
            grad_x = grad_x.contiguous(memory_format=ctx.memory_format)
        grad_weight = grad_restriction = None
        if grad_filters is not None:
            by_group = grad_filters.unflatten(0, (groups, -1))
            grad_weight, grad_restriction = by_group[:, :-count].flatten(0, 1), by_group[:, -count:].flatten(0, 1)
        return grad_x, grad_weight, grad_restriction, grad_prolongation, grad_bias, None, None, None, None
