"""Two-level group convolution (GC-2L) on one device.

*Two-level Group Convolution*, Y. Lee, J. Park, C.-O. Lee, https://arxiv.org/abs/2110.05060, Equations (3.3) to (3.5),
with the fused fine-and-restriction convolution of Section 3.2.

A group convolution keeps the diagonal blocks A_k of a convolution. The two-level form adds a coarse level: every group
restricts its channels to one representative (R_0), the N representatives are shared, and every group prolongs all of
them into its outputs (S_k):

    y_k = A_k x_k + S_k [R_0 x_1, ..., R_0 x_N]

Shape letters used below: B images, n input channels, m output channels, N groups, G groups held here (G = N on one
device), h x w output positions, L = B * h * w.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.utils import _pair

from tlgc_mp.errors import UsageError, divisors, one_of


class Exchange(Protocol):
    """How the representatives of the groups held here meet those of the groups held elsewhere.

    Representatives travel channel by channel, as (channels, L): joining the shares of several ranks is then a
    concatenation along the first dimension, and no side ever permutes.
    """

    def gather(self, share: Tensor) -> Tensor:
        """(G, L) of the groups held here -> (N, L) of all groups."""
        ...

    def reduce_scatter(self, full: Tensor) -> Callable[[], Tensor]:
        """Starts (N, L) summed over all holders -> (G, L) of the groups held here, which the function returned gives
        when it has arrived."""
        ...


class WholeExchange:
    """The exchange of a device that holds every group: there is nobody to meet."""

    def gather(self, share: Tensor) -> Tensor:
        return share

    def reduce_scatter(self, full: Tensor) -> Callable[[], Tensor]:
        return lambda: full


def _rows(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (L, C); a view where ``x`` is channels_last, a copy otherwise."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


def _image(rows: Tensor, like: Tensor, memory_format: torch.memory_format) -> Tensor:
    """(L, C) -> (B, C, h, w) with the batch and positions of ``like``; a view where the format is channels_last."""
    batch, _, height, width = like.shape
    return rows.view(batch, height, width, rows.shape[1]).permute(0, 3, 1, 2).contiguous(memory_format=memory_format)


class _CoarseCorrection(torch.autograd.Function):
    """Adds the coarse level to the fine one: y_k = fine_k + S_k gather(coarse).

    ``fine`` is either (B, m, h, w), with the representatives (B, G, h, w) in ``coarse``, or the output of the fused
    convolution (B, m + G, h, w), whose every group ends with its representative, and ``coarse`` is None.
    Forward sends one all-gather of the representatives, backward one reduce-scatter of their gradients, in flight
    while the gradient of the prolongation is computed. Nothing as large as an output is kept for backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        fine: Tensor,
        coarse: Tensor | None,
        prolongation: Tensor,
        bias: Tensor | None,
        groups: int,
        exchange: Exchange,
    ) -> Tensor:
        out_channels = prolongation.shape[0]
        fine_rows = _rows(fine).view(-1, groups, fine.shape[1] // groups)  # L, G, m/N (+ 1 when fused)
        if coarse is None:
            share = fine_rows[:, :, -1].t().contiguous()  # G, L
            fine_rows = fine_rows[:, :, :-1]
        else:
            share = _rows(coarse).t().contiguous()
        gathered = exchange.gather(share)  # N, L
        prolongation = prolongation.to(fine.dtype)

        out = fine.new_empty(fine_rows.shape[0], out_channels)
        if bias is None:
            out.view(fine_rows.shape).copy_(fine_rows)
        else:
            torch.add(fine_rows, bias.to(fine.dtype).view(groups, -1), out=out.view(fine_rows.shape))
        out.addmm_(gathered.t(), prolongation.t())

        ctx.save_for_backward(gathered, prolongation)
        ctx.groups, ctx.exchange = groups, exchange
        ctx.fused, ctx.memory_format = coarse is None, _memory_format(fine)
        return _image(out, fine, ctx.memory_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gathered, prolongation = ctx.saved_tensors
        groups, exchange, memory_format = ctx.groups, ctx.exchange, ctx.memory_format
        grad_rows = _rows(grad)  # L, m
        arrival = exchange.reduce_scatter(prolongation.t() @ grad_rows.t())  # G, L, in flight
        grad_prolongation = grad_rows.t() @ gathered.t() if ctx.needs_input_grad[2] else None
        grad_bias = grad_rows.sum(0) if ctx.needs_input_grad[3] else None
        if not ctx.fused:
            grad_coarse = _image(arrival().t().contiguous(), grad, memory_format)
            return grad.contiguous(memory_format=memory_format), grad_coarse, grad_prolongation, grad_bias, None, None
        fused = grad_rows.new_empty(grad_rows.shape[0], groups, grad_rows.shape[1] // groups + 1)
        fused[:, :, :-1].copy_(grad_rows.unflatten(1, (groups, -1)))
        fused[:, :, -1].copy_(arrival().t())
        grad_fused = _image(fused.flatten(1), grad, memory_format)
        return grad_fused, None, grad_prolongation, grad_bias, None, None


class TwoLevelConv2d(nn.Module):
    """Two-level group convolution of (B, in_channels, H, W) to (B, out_channels, h, w), Equation (3.5).

    Arguments are those of :class:`torch.nn.Conv2d`; h and w are those of the convolution with ``kernel_size``.

    Args:
        in_channels: n, a multiple of ``groups``.
        out_channels: m, a multiple of ``groups``.
        kernel_size: d, an int or a pair (height, width).
        padding: an int, a pair, ``"valid"``, or ``"same"`` (stride 1, a kernel that can be centred).
        groups: N, the number of groups.
        coarse_kernel_size: d0, the kernel of the restriction R_0. ``None`` means d, and then the restriction runs as
            one more filter of the fine convolution. Otherwise it is centred on the fine kernel, so
            ``dilation * (d0 - d)`` must be even.

    Parameters, each in ``groups`` equal contiguous blocks along its first dimension, one block a group:
        weight: (m + N, n/N, d, d), a group's m/N fine filters A_k, then its restriction R_0. With d0 != d, (m, n/N,
            d, d), and the restriction stands alone.
        restriction: (N, n/N, d0, d0), with d0 != d only.
        prolongation: (m, N), the rows of S_k.
        bias: (m,), optional.

    Raises:
        UsageError: a count that is not positive, ``groups`` that does not divide both channel counts, or a padding or
            coarse kernel that cannot be centred.
    """

    restriction: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        coarse_kernel_size: int | tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_groups(groups, in_channels=in_channels, out_channels=out_channels)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.groups = groups
        self.local_groups = groups
        self.kernel_size: tuple[int, int] = _positive("kernel_size", kernel_size)
        self.stride: tuple[int, int] = _positive("stride", stride)
        self.dilation: tuple[int, int] = _positive("dilation", dilation)
        self.padding: tuple[int, int] = _padding(padding, self.kernel_size, self.stride, self.dilation)
        self.coarse_kernel_size = (
            self.kernel_size if coarse_kernel_size is None else _positive("coarse_kernel_size", coarse_kernel_size)
        )
        self.fused = self.coarse_kernel_size == self.kernel_size
        self.coarse_padding = tuple(
            _coarse_padding(p, d, d0, step)
            for p, d, d0, step in zip(
                self.padding, self.kernel_size, self.coarse_kernel_size, self.dilation, strict=True
            )
        )
        self.exchange: Exchange = WholeExchange()

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        group_in = in_channels // groups
        self.weight = parameter(out_channels + (groups if self.fused else 0), group_in, *self.kernel_size)
        if self.fused:
            self.register_parameter("restriction", None)
        else:
            self.restriction = parameter(groups, group_in, *self.coarse_kernel_size)
        self.prolongation = parameter(out_channels, groups)
        if bias:
            self.bias = parameter(out_channels)
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialization (normal, fan-in of one group: d * d * n/N, N for the prolongation) from torch's own
        random state; the bias starts at zero."""
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        if self.restriction is not None:
            nn.init.kaiming_normal_(self.restriction, nonlinearity="relu")
        nn.init.kaiming_normal_(self.prolongation, nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, H, W) -> (B, m, h, w), in the memory format of ``x``."""
        if x.dim() != 4:
            raise UsageError(
                f"input of shape {tuple(x.shape)} is no batch of images; give (B, {self.in_channels}, H, W)"
            )
        groups = self.local_groups
        fine = F.conv2d(x, self.weight, None, self.stride, self.padding, self.dilation, groups)
        coarse = None
        if self.restriction is not None:
            vertical, horizontal = self.coarse_padding
            if vertical < 0 or horizontal < 0:
                crop_h, crop_w = min(vertical, 0), min(horizontal, 0)
                x = F.pad(x, (crop_w, crop_w, crop_h, crop_h))
                vertical, horizontal = max(vertical, 0), max(horizontal, 0)
            coarse = F.conv2d(x, self.restriction, None, self.stride, (vertical, horizontal), self.dilation, groups)
        return _CoarseCorrection.apply(fine, coarse, self.prolongation, self.bias, groups, self.exchange)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        text += f", padding={self.padding}, dilation={self.dilation}, groups={self.groups}"
        if not self.fused:
            text += f", coarse_kernel_size={self.coarse_kernel_size}"
        if self.local_groups != self.groups:
            text += f", local_groups={self.local_groups}"
        return text + f", bias={self.bias is not None}"


def check_groups(groups: int, **channels: int) -> None:
    """Raises :class:`UsageError` unless ``groups`` divides every one of the named channel counts."""
    for name, count in channels.items():
        if not isinstance(count, int) or count < 1:
            raise UsageError(f"{name}={count} is not a number of channels; use 1 or more")
    for name, count in channels.items():
        if not isinstance(groups, int) or groups < 1 or count % groups:
            common = [d for d in divisors(count) if all(other % d == 0 for other in channels.values())]
            raise UsageError(f"groups={groups} does not divide {name}={count}; use {one_of(common)}")


def _positive(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    pair = _pair(value)
    if len(pair) != 2 or any(not isinstance(v, int) or v < 1 for v in pair):
        raise UsageError(f"{name}={value!r} is not a positive int or a pair of them")
    return tuple(pair)


def _padding(
    padding: int | tuple[int, int] | str, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int]:
    if padding == "valid":
        return (0, 0)
    if padding == "same":
        reach = [step * (d - 1) for step, d in zip(dilation, kernel, strict=True)]
        if stride != (1, 1) or any(r % 2 for r in reach):
            raise UsageError(
                f"padding='same' needs stride 1 and an even dilation * (kernel_size - 1), got stride={stride}, "
                f"kernel_size={kernel}, dilation={dilation}; give the padding in numbers"
            )
        return (reach[0] // 2, reach[1] // 2)
    pair = _pair(padding)
    if len(pair) != 2 or any(not isinstance(v, int) or v < 0 for v in pair):
        raise UsageError(f"padding={padding!r} is not a non-negative int, a pair of them, 'same' or 'valid'")
    return tuple(pair)


def _coarse_padding(padding: int, kernel: int, coarse: int, dilation: int) -> int:
    """The padding that puts the coarse kernel's centre on the fine one's; negative where it reads less far."""
    growth = dilation * (coarse - kernel)
    if growth % 2:
        raise UsageError(
            f"coarse_kernel_size={coarse} cannot be centred on kernel_size={kernel} with dilation={dilation}; "
            f"use one of the same parity as {kernel}"
        )
    return padding + growth // 2
