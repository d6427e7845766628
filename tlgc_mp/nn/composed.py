"""A two-level group convolution as one dense convolution, with the composed filters A_k + S_k R_0.

Shape letters as in :mod:`tlgc_mp.nn.coarse_level`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tlgc_mp.nn.coarse_level import Window, convolution_backward, memory_format_of, rows_of, taps_of, without_autocast


def composed(weight: Tensor, restriction: Tensor, prolongation: Tensor) -> Tensor:
    """The dense filters (m, n, d, d) of a whole layer, channels_last: A_k on the diagonal, and S_k R_0 everywhere."""
    groups, width, kernel_h, kernel_w = restriction.shape
    taps = restriction.permute(2, 3, 0, 1)  # d, d, N, n/N
    filters = (prolongation.view(-1, 1, 1, groups, 1) * taps).contiguous()  # m, d, d, N, n/N
    diagonal = filters.unflatten(0, (groups, -1)).diagonal(dim1=0, dim2=4)  # m/N, d, d, n/N, N
    diagonal.add_(weight.unflatten(0, (groups, -1)).permute(1, 3, 4, 2, 0))
    return filters.view(-1, kernel_h, kernel_w, groups * width).permute(0, 3, 1, 2)


def composed_out_of_place(
    weight: Tensor, restriction: Tensor, prolongation: Tensor, groups: int, shape: tuple[int, ...]
) -> Tensor:
    """The same, of ``shape`` (n, d, d) an output, where no tensor may be written in place, nor asked for its shape."""
    coarse = prolongation @ _in_blocks(restriction, groups, shape[0]).flatten(1)
    filters: Tensor = _in_blocks(weight, groups, shape[0]) + coarse.unflatten(1, shape)
    return filters


def _in_blocks(filters: Tensor, groups: int, channels: int) -> Tensor:
    """Filters that read the channels of their group -> (..., n, d, d), zero for all others."""
    width, blocks = channels // groups, filters.unflatten(0, (groups, -1))
    placed = [
        F.pad(blocks[group], (0, 0, 0, 0, group * width, (groups - 1 - group) * width)) for group in range(groups)
    ]
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
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        restriction: Tensor,
        prolongation: Tensor,
        bias: Tensor | None,
        fine: Window,
        kept: Tensor | None,
    ) -> Tensor:
        ctx.memory_format = memory_format_of(x)
        x = x.contiguous(memory_format=torch.channels_last)
        filters = composed(weight, restriction, prolongation).to(x.dtype) if kept is None else kept
        bias = None if bias is None else bias.to(x.dtype)
        out = F.conv2d(x, filters, bias, fine.stride, fine.padding, fine.dilation)
        ctx.save_for_backward(x, filters, restriction, prolongation)
        ctx.fine = fine
        return out.contiguous(memory_format=ctx.memory_format)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, filters, restriction, prolongation = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        needed = (ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:4]))
        grad_x, grad_filters = convolution_backward(grad, x, filters, ctx.fine, 1, needed)
        if grad_x is not None:
            grad_x = grad_x.contiguous(memory_format=ctx.memory_format)
        grad_weight = grad_restriction = grad_prolongation = None
        if grad_filters is not None:
            groups, width, *kernel = restriction.shape
            dtype = restriction.dtype
            by_group = grad_filters.to(dtype).permute(0, 2, 3, 1).reshape(filters.shape[0], -1, groups, width)
            blocks = by_group.unflatten(0, (groups, -1)).diagonal(dim1=0, dim2=3)  # m/N, d * d, n/N, N
            grad_weight = blocks.permute(3, 0, 1, 2).reshape(-1, *kernel, width).permute(0, 3, 1, 2)
            by_group = by_group.permute(2, 0, 1, 3).flatten(2)  # N, m, d * d * n/N
            taps = taps_of(restriction).flatten(1).unsqueeze(2)  # N, d * d * n/N, 1
            grad_prolongation = (by_group @ taps).squeeze(2).t()
            sums = prolongation.t().unsqueeze(1) @ by_group  # N, 1, d * d * n/N
            grad_restriction = sums.view(groups, *kernel, width).permute(0, 3, 1, 2)
        grad_bias = None
        if ctx.needs_input_grad[4]:
            grad_bias = rows_of(grad).sum(0, dtype=restriction.dtype)
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

    def filters(self, dtype: torch.dtype, *parameters: Tensor) -> Tensor:
        """Those of ``parameters``, in ``dtype``."""
        kept = self._kept
        if kept is None or kept[1].dtype != dtype or not all(map(_same, kept[0], parameters)):
            with torch.inference_mode(False), torch.no_grad():  # else no gradient could be taken through them later
                kept = tuple(each.clone() for each in parameters), composed(*parameters).to(dtype)
            self._kept = kept
        return kept[1]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
