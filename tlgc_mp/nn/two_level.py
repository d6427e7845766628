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

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from tlgc_mp.errors import UsageError, divisors, one_of
from tlgc_mp.nn.coarse_level import Exchange, Fused, Overlapped, WholeExchange, Window

WIDE_GROUP = 128
"""Output channels of a group from which on the restriction is computed on its own; measured in docs/performance.md."""

COARSE_MODES = ("overlapped", "fused")


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
        self._fine = Window(self.kernel_size, self.stride, self.padding, self.dilation)
        self._coarse = Window(self.coarse_kernel_size, self.stride, _pair(tuple(coarse_padding)), self.dilation)
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
            return Fused.apply(*tensors, self._fine, groups, self.exchange)
        return Overlapped.apply(*tensors, self._fine, self._coarse, groups, self.exchange)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        text += f", padding={self.padding}, dilation={self.dilation}, groups={self.groups}"
        if self.coarse_kernel_size != self.kernel_size:
            text += f", coarse_kernel_size={self.coarse_kernel_size}"
        if self.local_groups != self.groups:
            text += f", local_groups={self.local_groups}"
        return text + f", bias={self.bias is not None}"


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
