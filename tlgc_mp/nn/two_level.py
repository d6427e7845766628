"""Two-level group convolution (GC-2L) on one device.

*Two-level Group Convolution*, Y. Lee, J. Park, C.-O. Lee, https://arxiv.org/abs/2110.05060, Equations (3.3) to (3.5),
with the fused fine-and-restriction convolution of Section 3.2 where groups are narrow; on a device that holds all of
them, narrow groups are composed with the coarse level into one dense convolution.

A group convolution keeps the diagonal blocks A_k of a convolution. The two-level form adds a coarse level: every group
restricts its channels to one representative (R_0), the N representatives are shared, and every group prolongs all of
them into its outputs (S_k):

    y_k = A_k x_k + S_k [R_0 x_1, ..., R_0 x_N]

How much the groups see of each other is a dial. ``coarse_channels`` gives each group r representatives in the place of
one; with enough of them the layer can be any dense convolution. ``coarse_sum`` adds up the representatives of all
groups, R_0 x_1 + ... + R_0 x_N, so that r maps are shared, whatever N is.

Shape letters used below: B images, n input channels, m output channels, N groups, G groups held here (G = N on one
device), r representatives of a group, h x w output positions, L = B * h * w.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from tlgc_mp.errors import UsageError, check_representatives, must_be, one_of
from tlgc_mp.nn.arguments import check_device, check_dtype, check_groups, check_weights, padding_sizes, positive_sizes
from tlgc_mp.nn.capture import is_captured
from tlgc_mp.nn.coarse_level import Exchange, Fused, Overlapped, WholeExchange, autocasts, is_for_cpu
from tlgc_mp.nn.composed import Dense, KeptFilters, composed_out_of_place
from tlgc_mp.nn.fusing import NotFusedByTorch
from tlgc_mp.nn.window import AXES, VolumeWindow, Window

if TYPE_CHECKING:
    from typing_extensions import Self


WIDE_GROUP = 48
"""Output channels of a group from which on the restriction is computed on its own (docs/lab/performance.md)."""
WIDE_SHARE = 32
"""The same in a layer whose groups are split over ranks, where the collectives then run under the fine convolution."""

WIDE_GROUP_OF_ACCELERATOR = 128
"""The same on an accelerator, which has to be given fewer and larger pieces of work."""

DENSE_BELOW = 256
"""Output channels of a group below which an accelerator that holds all groups is faster with the dense convolution."""

PASS_INPUT, PASS_OUTPUT = 20, 120
"""On a CPU that holds all groups: what the coarse level costs beside its arithmetic, in multiplications of a dense
convolution, for a tap of an input channel and for an output channel; measured in docs/lab/performance.md."""

COARSE_MODES = ("overlapped", "fused", "dense")

COARSE_INITS = {"zero": (1.0, 0.0), "scaled": (0.5, 0.5), "he": (1.0, 2.0)}
"""Name -> (share of He's variance that the fine filters get, the variance of a prolongation's row).

zero: a group convolution with He initialization and no coarse term at first, the prolongation being zero. scaled: both
terms have the same variance, and their sum has that of a group convolution with He initialization. he: He
initialization of every part (fan-in d * d * n/N, N r for the prolongation), so the coarse term has twice the variance
of the fine one. docs/results.md compares them.
"""


class TwoLevelConvNd(NotFusedByTorch):
    """What two-level group convolutions of one to three dimensions are; :class:`TwoLevelConv2d` describes them."""

    dims: ClassVar[int]
    weight: nn.Parameter
    restriction: nn.Parameter
    prolongation: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = False,
        coarse_kernel_size: int | tuple[int, ...] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        coarse_init: str = "zero",
        coarse_channels: int = 1,
        coarse_sum: bool = False,
    ) -> None:
        super().__init__()
        check_groups(groups, in_channels=in_channels, out_channels=out_channels)
        check_device(device)
        check_dtype(dtype)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.groups = groups
        self.local_groups = groups
        dims = self.dims
        self.kernel_size = positive_sizes("kernel_size", kernel_size, dims)
        check_weights((out_channels, in_channels // groups, *self.kernel_size))
        self.stride = positive_sizes("stride", stride, dims)
        self.dilation = positive_sizes("dilation", dilation, dims)
        self.padding = padding_sizes(padding, self.kernel_size, self.stride, self.dilation)
        coarse_kernel = self.kernel_size if coarse_kernel_size is None else coarse_kernel_size
        self.coarse_kernel_size = positive_sizes("coarse_kernel_size", coarse_kernel, dims)
        windows = zip(self.padding, self.kernel_size, self.coarse_kernel_size, self.dilation, strict=True)
        coarse_padding = tuple(_coarse_padding(p, d, d0, step) for p, d, d0, step in windows)
        self.fine_window = self._window(self.kernel_size, self.padding)
        self.coarse_window = self._window(self.coarse_kernel_size, coarse_padding)
        self._assigned_mode: str | None = None
        self._kept = KeptFilters()
        check_representatives(coarse_channels, coarse_sum)
        self.coarse_channels, self.coarse_sum = coarse_channels, coarse_sum
        check_weights((groups * coarse_channels, in_channels // groups, *self.coarse_kernel_size))
        self.exchange: Exchange = WholeExchange()
        if coarse_init not in COARSE_INITS:
            raise must_be("coarse_init", one_of(COARSE_INITS), coarse_init)
        self.coarse_init = coarse_init

        group_in = in_channels // groups
        shapes = {
            "weight": (out_channels, group_in, *self.kernel_size),
            "restriction": (groups * coarse_channels, group_in, *self.coarse_kernel_size),
            **self._coarse_shapes(),
        }
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    def _window(self, kernel: tuple[int, ...], padding: tuple[int, ...]) -> Window:
        """Where a kernel reads in what :meth:`_computed` gets."""
        return Window(kernel, self.stride, padding, self.dilation)

    def lifted(self, filters: Tensor) -> Tensor:
        """Filters as the autograd functions take them."""
        return filters

    def _coarse_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the parameters that make the prolongation."""
        return {"prolongation": (self.out_channels, self.shared_maps)}

    @property
    def shared_maps(self) -> int:
        """How many maps every group sees of the others: N r, or r where they are summed."""
        return self.coarse_channels * (1 if self.coarse_sum else self.groups)

    def prolongation_matrix(self) -> Tensor:
        """(G m/N, N r or r), the rows of S_k of the groups held here."""
        return self.prolongation

    def restriction_filters(self) -> Tensor:
        """The restriction as filters that give the maps to share: (G r, n/N, d0, d0), of one group each, or those of
        their sum over the groups held here, (r, G n/N, d0, d0)."""
        if not self.coarse_sum:
            return self.lifted(self.restriction)
        by_group: Tensor = self.restriction.unflatten(0, (self.local_groups, -1))  # G, r, n/N, d0, d0
        return self.lifted(by_group.transpose(0, 1).flatten(1, 2))

    def initial_deviations(self) -> dict[str, float]:
        """Parameter name -> the standard deviation of its initial values, which are normal with mean 0."""
        fine_share, coarse_gain = COARSE_INITS[self.coarse_init]
        summed = self.groups if self.coarse_sum else 1
        return {
            "weight": math.sqrt(2.0 * fine_share / self.weight[0].numel()),
            "restriction": math.sqrt(2.0 / (summed * self.restriction[0].numel())),
            **self._coarse_deviations(coarse_gain),
        }

    def _coarse_deviations(self, gain: float) -> dict[str, float]:
        """Of the parameters that make the prolongation, whose rows get the variance ``gain``."""
        return {"prolongation": math.sqrt(gain / self.shared_maps)}

    @property
    def coarse_mode(self) -> str:
        modes = self._coarse_modes()
        if self._assigned_mode in modes:  # the layer may have been split since
            return self._assigned_mode
        n, m, groups, taps = self.in_channels, self.out_channels, self.groups, math.prod(self.kernel_size)
        weight = self._parameters.get("weight")  # in the place of which torch.fx puts no proxy
        if is_for_cpu(self.weight if weight is None else weight):
            wide = WIDE_GROUP if self.local_groups == groups else WIDE_SHARE
            passes = PASS_INPUT * n * taps + PASS_OUTPUT * m
            further = (self.coarse_channels - 1) * n * taps + (self.shared_maps - groups) * m
            prefers_dense = n * m * taps * (groups - 1) < groups * (passes + max(further, 0))
        else:
            wide, prefers_dense = WIDE_GROUP_OF_ACCELERATOR, m // groups < DENSE_BELOW
        if prefers_dense and "dense" in modes:
            return "dense"
        return "fused" if "fused" in modes and m // groups < wide else "overlapped"

    @coarse_mode.setter
    def coarse_mode(self, mode: str) -> None:
        modes = self._coarse_modes()
        if mode not in modes:
            raise UsageError(
                f"coarse_mode must be {one_of(modes)} for a layer of coarse_kernel_size={self.coarse_kernel_size}, "
                f"kernel_size={self.kernel_size} and {self.local_groups} of {self.groups} groups here, got {mode!r}"
            )
        self._assigned_mode = mode

    def _coarse_modes(self) -> tuple[str, ...]:
        if self.coarse_kernel_size != self.kernel_size:
            return COARSE_MODES[:1]
        return COARSE_MODES if self.local_groups == self.groups else COARSE_MODES[:2]

    def reset_parameters(self) -> None:
        """Draws the parameters (:meth:`initial_deviations`) from torch's own random state; the bias starts at zero."""
        for name, deviation in self.initial_deviations().items():
            nn.init.normal_(getattr(self, name), 0.0, deviation)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, H, W) -> (B, m, h, w), in the memory format of ``x``; (n, H, W) -> (m, h, w)."""
        if self.local_groups == self.groups and is_captured(x):
            return self._in_torch(x)
        if x.dim() == self.dims + 1:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        channels = self.in_channels * self.local_groups // self.groups
        if x.dim() != self.dims + 2 or x.shape[1] != channels or min(self._output_size(x)) < 1:
            shape, size = f"(B, {channels}, {', '.join(AXES[self.dims])})", " x ".join(AXES[self.dims])
            raise UsageError(f"input must be of shape {shape}, {size} at least the kernel, got {tuple(x.shape)}")
        return self._computed(x)

    def _output_size(self, x: Tensor) -> tuple[int, ...]:
        return self.fine_window.output_size(x.shape[2:])

    def _computed(self, x: Tensor) -> Tensor:
        groups, weight = self.local_groups, self.lifted(self.weight)
        mode = self.coarse_mode
        if mode == "dense":
            (x,) = _computed_in(x)
            tensors = (weight, self.restriction_filters(), self.prolongation_matrix())
            kept = self._kept.filters(x, groups, *tensors) if self._keeps(x) else None
            y: Tensor = Dense.apply(x, *tensors, self.bias, self.fine_window, kept)
            return y
        restriction = self.lifted(self.restriction) if mode == "fused" else self.restriction_filters()
        tensors = _computed_in(x, weight, restriction, self.prolongation_matrix(), self.bias)
        if mode == "fused":
            y = Fused.apply(*tensors, self.fine_window, groups, self.coarse_sum, self.exchange)
        else:
            y = Overlapped.apply(*tensors, self.fine_window, self.coarse_window, groups, self.exchange)
        return y

    def _keeps(self, x: Tensor) -> bool:
        """Whether this call may take filters that an earlier one composed: on a CPU, which need not wait to compare."""
        if self.training or type(x) is not Tensor or x.device.type != "cpu":
            return False
        return not torch.compiler.is_compiling() and not torch.jit.is_tracing()

    def train(self, mode: bool = True) -> Self:
        if mode:
            self._kept.clear()
        return super().train(mode)

    def _in_torch(self, x: Tensor) -> Tensor:
        """The same in torch's own functions, for tools that know no others."""
        weight = self.lifted(self.weight)
        restriction, prolongation = self.restriction_filters(), self.prolongation_matrix()
        coarse_groups = 1 if self.coarse_sum else self.groups
        if self.coarse_mode == "dense":
            shape = (self.in_channels, *self.fine_window.kernel)
            filters = composed_out_of_place(weight, restriction, prolongation, self.groups, coarse_groups, shape)
            return self.fine_window.convolve(x, filters, self.bias)
        fine = self.fine_window.convolve(x, weight, self.bias, self.groups)
        coarse = self.coarse_window.convolve(x, restriction, None, coarse_groups)
        return fine + self.fine_window.mix(coarse, prolongation)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        text += f", padding={self.padding}, dilation={self.dilation}, groups={self.groups}"
        if self.coarse_kernel_size != self.kernel_size:
            text += f", coarse_kernel_size={self.coarse_kernel_size}"
        if self.coarse_channels > 1:
            text += f", coarse_channels={self.coarse_channels}"
        if self.coarse_sum:
            text += ", coarse_sum=True"
        if self.local_groups != self.groups:
            text += f", local_groups={self.local_groups}"
        return text + f", bias={self.bias is not None}"


class TwoLevelConv2d(TwoLevelConvNd):
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
        coarse_init: the initial weights, one of :data:`COARSE_INITS`.
        coarse_channels: r, how many representatives a group has; 1 is the paper's layer. A layer whose r is the
            smaller of n/N * d * d and m (N - 1)/N can have the values of any dense convolution.
        coarse_sum: whether the representatives of all groups are summed, the first ones, the second ones and so on.

    Parameters, each in ``groups`` equal contiguous blocks along its first dimension, one block a group:
        weight: (m, n/N, d, d), the fine filters A_k.
        restriction: (N r, n/N, d0, d0), the R_0 of each group.
        prolongation: (m, N r), the rows of S_k; (m, r) with ``coarse_sum``.
        bias: (m,), optional.

    Attributes:
        coarse_mode: how the coarse level is computed; the results are the same but for rounding. ``"overlapped"``:
            the restriction on its own and first, and the collectives run under the fine convolution. ``"fused"``:
            the restriction as one more filter of each group's fine convolution, d0 = d only. ``"dense"``: one dense
            convolution with the composed filters A_k + S_k R_0, d0 = d and all groups on this device only; in
            evaluation on a CPU they are composed anew only when a parameter has changed. Chosen by the layer's
            channels, groups and kernel, whether all groups are here, and the device that its parameters are on, never
            by a clock, so that a run can be repeated; it may be assigned, and a mode that is none raises UsageError.

    Raises:
        UsageError: a count that is not positive, ``groups`` that does not divide both channel counts, a padding or
            coarse kernel that cannot be centred, or a ``coarse_sum`` that is no bool.
    """

    dims = 2


class TwoLevelConv1d(TwoLevelConvNd):
    """:class:`TwoLevelConv2d` of waveforms, (B, in_channels, L) -> (B, out_channels, l).

    Arguments are those of :class:`torch.nn.Conv1d` and, of the coarse level, those of :class:`TwoLevelConv2d`. The fine
    filters are (m, n/N, d), the restriction (N r, n/N, d0). It computes on images one row high.
    """

    dims = 1

    def _window(self, kernel: tuple[int, ...], padding: tuple[int, ...]) -> Window:
        return Window((1, *kernel), (1, *self.stride), (0, *padding), (1, *self.dilation))

    def lifted(self, filters: Tensor) -> Tensor:
        return filters.unsqueeze(2)

    def _output_size(self, x: Tensor) -> tuple[int, ...]:
        return self.fine_window.output_size((1, *x.shape[2:]))

    def _computed(self, x: Tensor) -> Tensor:
        return super()._computed(x.unsqueeze(2)).squeeze(2)

    def _in_torch(self, x: Tensor) -> Tensor:
        return super()._in_torch(x.unsqueeze(-2)).squeeze(-2)


class TwoLevelConv3d(TwoLevelConvNd):
    """:class:`TwoLevelConv2d` of volumes or videos, (B, in_channels, D, H, W) -> (B, out_channels, d, h, w).

    Arguments are those of :class:`torch.nn.Conv3d` and, of the coarse level, those of :class:`TwoLevelConv2d`. The fine
    filters are (m, n/N, d, d, d), the restriction (N r, n/N, d0, d0, d0). The memory format of the input is kept,
    channels_last_3d included.
    """

    dims = 3

    def _window(self, kernel: tuple[int, ...], padding: tuple[int, ...]) -> Window:
        return VolumeWindow(kernel, self.stride, padding, self.dilation)


def _computed_in(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The tensors in the type that autocast has a convolution compute in; as they are where it is off."""
    if not autocasts(x) or x.dtype == torch.float64:
        return (x, *others)
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in (x, *others))


def _coarse_padding(padding: int, kernel: int, coarse: int, dilation: int) -> int:
    """The padding that puts the coarse kernel's centre on the fine one's; negative where it reads less far."""
    growth = dilation * (coarse - kernel)
    if growth % 2:
        raise UsageError(
            f"coarse_kernel_size must have the parity of kernel_size={kernel} to be centred on it with "
            f"dilation={dilation}, got {coarse}"
        )
    return padding + growth // 2
