"""Group convolution whose groups are learned (FLGC).

*Fully Learnable Group Convolution for Acceleration of Deep Neural Networks*, X. Wang, M. Kan, S. Shan, X. Chen, CVPR
2019, https://arxiv.org/abs/1904.00346, as Section 4.1.3 of https://arxiv.org/abs/2110.05060 compares with it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tlgc_mp.errors import UsageError
from tlgc_mp.nn.arguments import check_device, check_dtype, check_groups, check_weights, padding_sizes, positive_sizes
from tlgc_mp.nn.capture import is_captured
from tlgc_mp.nn.fusing import NotFusedByTorch


class FullyLearnableGroupConv2d(nn.Module):
    """(B, in_channels, H, W) -> (B, out_channels, h, w): a dense convolution of which each filter reads only the input
    channels of its group, the group of every channel and every filter being learned.

    Which group a channel or filter is in is the largest entry of its row in a selection matrix. The weight is masked by
    T S^T, the rows of S and T set to one at their largest entry and zero elsewhere; gradients reach S and T as if
    they had been softmaxes (straight-through). Groups may come out unequal, or empty. While it learns, the layer
    costs as much as a dense convolution; :meth:`frozen` is as cheap as its groups are small.

    Arguments are those of :class:`torch.nn.Conv2d`; ``groups`` is N, and there is no bias unless asked for.

    Parameters:
        weight: (m, n, d, d), of all pairs of a filter and a channel.
        input_selection: (n, N), S. filter_selection: (m, N), T.
        bias: (m,), optional.

    Raises:
        UsageError: ``groups`` does not divide both channel counts, or another argument that cannot work.
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_groups(groups, in_channels=in_channels, out_channels=out_channels)
        check_device(device)
        check_dtype(dtype)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.groups = groups
        self.kernel_size = positive_sizes("kernel_size", kernel_size, 2)
        check_weights((out_channels, in_channels // groups, *self.kernel_size))
        self.stride = positive_sizes("stride", stride, 2)
        self.dilation = positive_sizes("dilation", dilation, 2)
        self.padding = padding_sizes(padding, self.kernel_size, self.stride, self.dilation)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight = parameter(out_channels, in_channels, *self.kernel_size)
        self.input_selection = parameter(in_channels, groups)
        self.filter_selection = parameter(out_channels, groups)
        self.register_parameter("bias", parameter(out_channels) if bias else None)
        self.reset_parameters()

    @property
    def balanced_parameters(self) -> int:
        """Weights that survive where all groups are equal, d * d * m * n / N, and the bias. Reads no values."""
        return self.weight.numel() // self.groups + (0 if self.bias is None else self.out_channels)

    @property
    def effective_parameters(self) -> int:
        """Weights that survive the grouping as it is now, and the bias."""
        channels = _group_of(self.input_selection).bincount(minlength=self.groups)
        filters = _group_of(self.filter_selection).bincount(minlength=self.groups)
        pairs = int((channels * filters).sum())
        return pairs * math.prod(self.kernel_size) + (0 if self.bias is None else self.out_channels)

    def initial_deviations(self) -> dict[str, float]:
        """Parameter name -> the standard deviation of its initial values, which are normal with mean 0.

        He initialization with the fan-in of a group of n/N channels, and 1 for the selections.
        """
        fan_in = self.weight[0].numel() / self.groups
        return {"weight": math.sqrt(2.0 / fan_in), "input_selection": 1.0, "filter_selection": 1.0}

    def reset_parameters(self) -> None:
        """Draws the parameters (:meth:`initial_deviations`) from torch's own random state; the bias starts at zero."""
        for name, deviation in self.initial_deviations().items():
            nn.init.normal_(getattr(self, name), 0.0, deviation)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        mask = _straight_through(self.filter_selection) @ _straight_through(self.input_selection).t()  # m, n
        weight = self.weight * mask[:, :, None, None]
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation)

    @torch.no_grad()
    def frozen(self) -> PermutedGroupConv2d:
        """The same function with the groups as they are now: a group convolution between two permutations.

        Groups smaller than the largest are filled up with zero weights. It shares no storage with this layer.
        """
        channel_group, filter_group = _group_of(self.input_selection), _group_of(self.filter_selection)
        channels = [(channel_group == group).nonzero().flatten() for group in range(self.groups)]
        filters = [(filter_group == group).nonzero().flatten() for group in range(self.groups)]
        width = max(1, *(len(group) for group in channels))
        height = max(len(group) for group in filters)
        input_order = channel_group.new_zeros(self.groups, width)  # a filler reads channel 0, with weight zero
        output_order = filter_group.new_empty(self.out_channels)
        weight = self.weight.new_zeros(self.groups, height, width, *self.kernel_size)
        for group, (reads, writes) in enumerate(zip(channels, filters, strict=True)):
            input_order[group, : len(reads)] = reads
            output_order[writes] = group * height + torch.arange(len(writes), device=writes.device)
            weight[group, : len(writes), : len(reads)] = self.weight[writes][:, reads]
        return PermutedGroupConv2d(
            weight.flatten(0, 1),
            None if self.bias is None else self.bias.clone(),
            input_order.flatten(),
            output_order,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        text += f", padding={self.padding}, dilation={self.dilation}, groups={self.groups}"
        return text + f", bias={self.bias is not None}"


class PermutedGroupConv2d(NotFusedByTorch):
    """A group convolution of picked input channels, of which output channels are picked.

    (B, n, H, W) -> (B, len(output_order), h, w).

    Args:
        weight: (m', n'/N, d, d).
        bias: of each picked output channel, or ``None``.
        input_order: (n',), the channel of the input that each channel of the convolution reads.
        output_order: the channel of the convolution that each output channel is.
        stride, padding, dilation, groups: of the convolution.

    Raises:
        UsageError: a tensor of another kind or shape than these.
    """

    bias: nn.Parameter | None
    input_order: Tensor
    output_order: Tensor

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        input_order: Tensor,
        output_order: Tensor,
        *,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
    ) -> None:
        super().__init__()
        if not isinstance(weight, Tensor) or weight.dim() != 4 or not weight.is_floating_point():
            raise UsageError("weight must be a tensor of filters (m', n'/N, d, d), got another")
        for name, order in (("input_order", input_order), ("output_order", output_order)):
            if not isinstance(order, Tensor) or order.dim() != 1 or order.dtype != torch.int64:
                raise UsageError(f"{name} must be a list of channels, an int64 tensor of one dimension, got another")
        check_groups(groups, out_channels=weight.shape[0], input_order=len(input_order))
        if len(input_order) != groups * weight.shape[1]:
            raise UsageError(
                f"input_order must name the {groups * weight.shape[1]} channels that {groups} groups read, got "
                f"{len(input_order)}"
            )
        if bias is not None and (not isinstance(bias, Tensor) or bias.shape != output_order.shape):
            raise UsageError(
                f"bias must be one number for each of {len(output_order)} output channels, got another tensor"
            )
        self.weight = nn.Parameter(weight)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self.register_buffer("input_order", input_order)
        self.register_buffer("output_order", output_order)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups

    def forward(self, x: Tensor) -> Tensor:
        if is_captured(x):
            picked = x.index_select(-3, self.input_order)
            y = F.conv2d(picked, self.weight, None, self.stride, self.padding, self.dilation, self.groups)
            y = y.index_select(-3, self.output_order)
            return y if self.bias is None else y + self.bias[:, None, None]
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        memory_format = torch.channels_last if last else torch.contiguous_format
        picked = x.index_select(-3, self.input_order).contiguous(memory_format=memory_format)
        y = F.conv2d(picked, self.weight, None, self.stride, self.padding, self.dilation, self.groups)
        y = y.index_select(-3, self.output_order).contiguous(memory_format=memory_format)
        return y if self.bias is None else y + self.bias[:, None, None]


def _group_of(selection: Tensor) -> Tensor:
    """(count, N) -> (count,), the group that each row selects."""
    return selection.detach().argmax(1)


def _straight_through(selection: Tensor) -> Tensor:
    """(count, N) -> (count, N): one at the largest entry of each row, zero elsewhere, with the softmax's gradient."""
    soft = selection.softmax(1)
    hard = F.one_hot(_group_of(selection), selection.shape[1]).to(soft.dtype)
    return hard + (soft - soft.detach())
