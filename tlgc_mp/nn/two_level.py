"""Two-level group convolution (GC-2L) on one device.

*Two-level Group Convolution*, Y. Lee, J. Park, C.-O. Lee, https://arxiv.org/abs/2110.05060, Equations (3.3) to (3.5),
with the fused fine-and-restriction convolution of Section 3.2 where groups are narrow.

A group convolution keeps the diagonal blocks A_k of a convolution. The two-level form adds a coarse level: every group
restricts its channels to one representative (R_0), the N representatives are shared, and every group prolongs all of
them into its outputs (S_k):

    y_k = A_k x_k + S_k [R_0 x_1, ..., R_0 x_N]

Shape letters used below: B images, n input channels, m output channels, N groups, G groups held here (G = N on one
device), h x w output positions, L = B * h * w.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.utils import _pair

from tlgc_mp.errors import UsageError, divisors, one_of

WIDE_GROUP = 128
"""Output channels of a group from which on the restriction is computed on its own; measured in docs/performance.md."""

COARSE_MODES = ("overlapped", "fused")


class Exchange(Protocol):
    """How the representatives of the groups held here meet those of the groups held elsewhere.

    Representatives travel channel by channel, as (channels, L): joining the shares of several ranks is then a
    concatenation along the first dimension, and no side ever permutes.
    """

    def gather(self, share: Tensor) -> Callable[[], Tensor]:
        """Starts (G, L) of the groups held here -> (N, L) of all groups, which the function returned gives when it has
        arrived."""
        ...

    def reduce_scatter(self, full: Tensor) -> Callable[[], Tensor]:
        """Starts (N, L) summed over all holders -> (G, L) of the groups held here, which the function returned gives
        when it has arrived."""
        ...


class WholeExchange:
    """The exchange of a device that holds every group: there is nobody to meet."""

    def gather(self, share: Tensor) -> Callable[[], Tensor]:
        return lambda: share

    def reduce_scatter(self, full: Tensor) -> Callable[[], Tensor]:
        return lambda: full


def _rows(x: Tensor) -> Tensor:
    """(B, C, h, w), channels_last -> (L, C), a view."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])


def _image(rows: Tensor, like: Tensor) -> Tensor:
    """(L, C) -> (B, C, h, w), channels_last, with the batch and positions of ``like``."""
    batch, _, height, width = like.shape
    return rows.view(batch, height, width, rows.shape[1]).permute(0, 3, 1, 2)


class _Window(NamedTuple):
    """Where a convolution kernel reads: (vertical, horizontal) kernel size, stride, padding and dilation."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def output_size(self, rows: int, columns: int) -> tuple[int, int]:
        """(h, w) of a convolution of rows x columns positions."""
        height, width = (
            (length + 2 * padding - step * (kernel - 1) - 1) // stride + 1
            for length, kernel, stride, padding, step in zip((rows, columns), *self, strict=True)
        )
        return height, width

    def views(self, planes: Tensor, height: int, width: int) -> Tensor:
        """Padded (G, d * d, B, H, W), a plane a tap -> a view (G, d, d, B, h, w): what each tap reads, or writes."""
        groups, _, batch, rows, columns = planes.shape
        (kernel_h, kernel_w), (stride_h, stride_w), (step_h, step_w) = self.kernel, self.stride, self.dilation
        plane = batch * rows * columns
        return planes.as_strided(
            (groups, kernel_h, kernel_w, batch, height, width),
            (
                kernel_h * kernel_w * plane,
                kernel_w * plane + step_h * columns,
                plane + step_w,
                rows * columns,
                stride_h * columns,
                stride_w,
            ),
        )

    def pad(self, planes: Tensor, sign: int) -> Tensor:
        """``planes`` with (sign = 1) or without (-1) the padding; a negative padding crops."""
        vertical, horizontal = sign * self.padding[0], sign * self.padding[1]
        return F.pad(planes, (horizontal, horizontal, vertical, vertical)) if vertical or horizontal else planes


def _taps(restriction: Tensor) -> Tensor:
    """(G, n/N, d0, d0) -> (G, d0 * d0, n/N); a view where it is channels_last."""
    return restriction.permute(0, 2, 3, 1).flatten(1, 2)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(B, n, H, W), channels_last -> (G, B * H * W, n/N), a view."""
    batch, channels, rows, columns = x.shape
    width = channels // groups
    return x.as_strided((groups, batch * rows * columns, width), (width, channels, 1))


def _restrict(x: Tensor, restriction: Tensor, window: _Window, height: int, width: int) -> Tensor:
    """The representatives (G, B * h * w) of ``x``, whose (G, d0 * d0) taps are one matrix product.

    A convolution with one output channel a group would cost what one with 16 costs.
    """
    groups, (batch, _, rows, columns) = restriction.shape[0], x.shape
    planes = _taps(restriction) @ _grouped(x, groups).transpose(1, 2)  # G, d0 * d0, B * H * W
    planes = window.pad(planes.view(groups, -1, batch, rows, columns), 1)
    return window.views(planes, height, width).sum((1, 2)).view(groups, -1)


def _restrict_transposed(grad: Tensor, x: Tensor, groups: int, window: _Window, height: int, width: int) -> Tensor:
    """(G, B * h * w) -> (G, d0 * d0, B * H * W): by tap and position it read, the gradient of the outcome."""
    batch, _, rows, columns = x.shape
    (vertical, horizontal), (kernel_h, kernel_w) = window.padding, window.kernel
    planes = grad.new_zeros(groups, kernel_h * kernel_w, batch, rows + 2 * vertical, columns + 2 * horizontal)
    window.views(planes, height, width).copy_(grad.view(groups, 1, 1, batch, height, width))
    return window.pad(planes, -1).reshape(groups, kernel_h * kernel_w, -1)


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, window: _Window, groups: int, needed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a group convolution's input and weight, as far as they are ``needed``."""
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, window.stride, window.padding, window.dilation, False, (0, 0), groups, (*needed, False)
    )
    return grad_x, grad_weight


class _Overlapped(torch.autograd.Function):
    """y_k = A_k x_k + S_k gather(R_0 x_k), the collectives in flight while the fine convolution is computed.

    Forward: restriction, all-gather || fine convolution; the prolongation is added into its output. Backward: the
    gradient of the representatives, reduce-scatter || gradients of the fine convolution; that of the restriction is
    added into them. Nothing as large as an output is kept for backward but the input.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        restriction: Tensor,
        prolongation: Tensor,
        bias: Tensor | None,
        fine: _Window,
        coarse: _Window,
        groups: int,
        exchange: Exchange,
    ) -> Tensor:
        ctx.memory_format = _memory_format(x)
        x = x.contiguous(memory_format=torch.channels_last)
        height, width = fine.output_size(x.shape[2], x.shape[3])
        arrival = exchange.gather(_restrict(x, restriction, coarse, height, width))  # in flight
        out = F.conv2d(x, weight, bias, fine.stride, fine.padding, fine.dilation, groups)
        out = out.contiguous(memory_format=torch.channels_last)
        gathered = arrival()  # N, L
        _rows(out).addmm_(gathered.t(), prolongation.t())
        ctx.save_for_backward(x, weight, restriction, prolongation, gathered)
        ctx.fine, ctx.coarse, ctx.groups, ctx.exchange = fine, coarse, groups, exchange
        return out.contiguous(memory_format=ctx.memory_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, restriction, prolongation, gathered = ctx.saved_tensors
        groups = ctx.groups
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_rows = _rows(grad)  # L, m
        arrival = ctx.exchange.reduce_scatter(prolongation.t() @ grad_rows.t())  # in flight
        grad_x, grad_weight = _convolution_backward(grad, x, weight, ctx.fine, groups, ctx.needs_input_grad[:2])
        grad_prolongation = (gathered @ grad_rows).t() if ctx.needs_input_grad[3] else None
        grad_bias = grad_rows.sum(0) if ctx.needs_input_grad[4] else None
        taps = _restrict_transposed(arrival(), x, groups, ctx.coarse, grad.shape[2], grad.shape[3])
        if grad_x is not None:
            grad_x = grad_x.contiguous(memory_format=torch.channels_last)
            _grouped(grad_x, groups).baddbmm_(taps.transpose(1, 2), _taps(restriction))
            grad_x = grad_x.contiguous(memory_format=ctx.memory_format)
        grad_restriction = None
        if ctx.needs_input_grad[2]:
            grad_taps = taps @ _grouped(x, groups)  # G, d0 * d0, n/N
            grad_restriction = grad_taps.unflatten(1, ctx.coarse.kernel).permute(0, 3, 1, 2)
        return grad_x, grad_weight, grad_restriction, grad_prolongation, grad_bias, None, None, None, None


class _Fused(torch.autograd.Function):
    """The same with the restriction as one more filter of each group's fine convolution (Section 3.2, d0 = d)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        restriction: Tensor,
        prolongation: Tensor,
        bias: Tensor | None,
        fine: _Window,
        groups: int,
        exchange: Exchange,
    ) -> Tensor:
        ctx.memory_format = _memory_format(x)
        x = x.contiguous(memory_format=torch.channels_last)
        filters = torch.cat((weight.unflatten(0, (groups, -1)), restriction.unsqueeze(1)), 1).flatten(0, 1)
        both = F.conv2d(x, filters, None, fine.stride, fine.padding, fine.dilation, groups)
        both = both.contiguous(memory_format=torch.channels_last)
        both_rows = _rows(both).unflatten(1, (groups, -1))  # L, G, m/N + 1
        gathered = exchange.gather(both_rows[:, :, -1].t().contiguous())()  # N, L
        out = x.new_empty(both_rows.shape[0], weight.shape[0])
        fine_rows, out_groups = both_rows[:, :, :-1], out.unflatten(1, (groups, -1))
        if bias is None:
            out_groups.copy_(fine_rows)
        else:
            torch.add(fine_rows, bias.view(groups, -1), out=out_groups)
        out.addmm_(gathered.t(), prolongation.t())
        ctx.save_for_backward(x, filters, prolongation, gathered)
        ctx.fine, ctx.groups, ctx.exchange = fine, groups, exchange
        return _image(out, both).contiguous(memory_format=ctx.memory_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, filters, prolongation, gathered = ctx.saved_tensors
        groups = ctx.groups
        grad_rows = _rows(grad.contiguous(memory_format=torch.channels_last))  # L, m
        arrival = ctx.exchange.reduce_scatter(prolongation.t() @ grad_rows.t())  # in flight
        grad_prolongation = (gathered @ grad_rows).t() if ctx.needs_input_grad[3] else None
        grad_bias = grad_rows.sum(0) if ctx.needs_input_grad[4] else None
        both = grad_rows.new_empty(grad_rows.shape[0], groups, grad_rows.shape[1] // groups + 1)
        both[:, :, :-1].copy_(grad_rows.unflatten(1, (groups, -1)))
        both[:, :, -1].copy_(arrival().t())
        needed = (ctx.needs_input_grad[0], ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
        grad_both = _image(both.flatten(1), grad)
        grad_x, grad_filters = _convolution_backward(grad_both, x, filters, ctx.fine, groups, needed)
        if grad_x is not None:
            grad_x = grad_x.contiguous(memory_format=ctx.memory_format)
        grad_weight = grad_restriction = None
        if grad_filters is not None:
            by_group = grad_filters.unflatten(0, (groups, -1))
            grad_weight, grad_restriction = by_group[:, :-1].flatten(0, 1), by_group[:, -1]
        return grad_x, grad_weight, grad_restriction, grad_prolongation, grad_bias, None, None, None


class TwoLevelConv2d(nn.Module):
    """Two-level group convolution of (B, in_channels, H, W) to (B, out_channels, h, w), Equation (3.5).

    Arguments are those of :class:`torch.nn.Conv2d`; h and w are those of the convolution with ``kernel_size``.

    Args:
        in_channels: n, a multiple of ``groups``.
        out_channels: m, a multiple of ``groups``.
        kernel_size: d, an int or a pair (height, width).
        padding: an int, a pair, ``"valid"``, or ``"same"`` (stride 1, a kernel that can be centred).
        groups: N, the number of groups.
        coarse_kernel_size: d0, the kernel of the restriction R_0; ``None`` means d. It is centred on the fine kernel,
            so ``dilation * (d0 - d)`` must be even.

    Parameters, each in ``groups`` equal contiguous blocks along its first dimension, one block a group:
        weight: (m, n/N, d, d), the fine filters A_k.
        restriction: (N, n/N, d0, d0), the R_0 of each group.
        prolongation: (m, N), the rows of S_k.
        bias: (m,), optional.

    Attributes:
        coarse_mode: how the coarse level is computed; the results are the same but for rounding. ``"overlapped"``:
            the restriction on its own and first, and the collectives run under the fine convolution. ``"fused"``:
            the restriction as one more filter of each group's fine convolution, d0 = d only. Chosen by the width of a
            group, and may be assigned; a mode that is none raises UsageError.

    Raises:
        UsageError: a count that is not positive, ``groups`` that does not divide both channel counts, or a padding or
            coarse kernel that cannot be centred.
    """

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
        coarse_padding = [
            _coarse_padding(p, d, d0, step)
            for p, d, d0, step in zip(
                self.padding, self.kernel_size, self.coarse_kernel_size, self.dilation, strict=True
            )
        ]
        self._fine = _Window(self.kernel_size, self.stride, self.padding, self.dilation)
        self._coarse = _Window(self.coarse_kernel_size, self.stride, _pair(tuple(coarse_padding)), self.dilation)
        narrow = out_channels // groups < WIDE_GROUP and self.coarse_kernel_size == self.kernel_size
        self.coarse_mode = "fused" if narrow else "overlapped"
        self.exchange: Exchange = WholeExchange()

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        group_in = in_channels // groups
        self.weight = parameter(out_channels, group_in, *self.kernel_size)
        self.restriction = parameter(groups, group_in, *self.coarse_kernel_size)
        self.prolongation = parameter(out_channels, groups)
        if bias:
            self.bias = parameter(out_channels)
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @property
    def coarse_mode(self) -> str:
        return self._coarse_mode

    @coarse_mode.setter
    def coarse_mode(self, mode: str) -> None:
        modes = COARSE_MODES if self.coarse_kernel_size == self.kernel_size else COARSE_MODES[:1]
        if mode not in modes:
            raise UsageError(
                f"coarse_mode={mode!r} is none of this layer's, coarse_kernel_size being {self.coarse_kernel_size} and "
                f"kernel_size {self.kernel_size}; use {one_of(modes)}"
            )
        self._coarse_mode = mode

    def reset_parameters(self) -> None:
        """He initialization (normal, fan-in of one group: d * d * n/N, N for the prolongation) from torch's own
        random state; the bias starts at zero."""
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        nn.init.kaiming_normal_(self.restriction, nonlinearity="relu")
        nn.init.kaiming_normal_(self.prolongation, nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, H, W) -> (B, m, h, w), in the memory format of ``x``."""
        groups = self.local_groups
        channels = self.in_channels * groups // self.groups
        if x.dim() != 4 or x.shape[1] != channels or min(self._fine.output_size(x.shape[2], x.shape[3])) < 1:
            raise UsageError(
                f"input of shape {tuple(x.shape)} does not fit; give (B, {channels}, H, W), H x W at least the kernel"
            )
        tensors = _computed_in(x, self.weight, self.restriction, self.prolongation, self.bias)
        if self.coarse_mode == "fused":
            return _Fused.apply(*tensors, self._fine, groups, self.exchange)
        return _Overlapped.apply(*tensors, self._fine, self._coarse, groups, self.exchange)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        text += f", padding={self.padding}, dilation={self.dilation}, groups={self.groups}"
        if self.coarse_kernel_size != self.kernel_size:
            text += f", coarse_kernel_size={self.coarse_kernel_size}"
        if self.local_groups != self.groups:
            text += f", local_groups={self.local_groups}"
        return text + f", bias={self.bias is not None}"


def _memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


def _computed_in(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The tensors in the type that autocast has a convolution compute in; as they are where it is off."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return (x, *others)
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in (x, *others))


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
