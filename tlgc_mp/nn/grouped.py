"""What the group convolutions have in common that take :class:`torch.nn.Conv2d`'s arguments and give another output."""

from __future__ import annotations

import torch
from torch import nn

from tlgc_mp.nn.arguments import check_device, check_dtype, check_groups, check_weights, padding_pair, positive_pair
from tlgc_mp.nn.fusing import NotFusedByTorch


class CheckedGroupConv2d(NotFusedByTorch, nn.Conv2d):
    """A group convolution of zeros padding, whose arguments are checked."""

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
        check_groups(groups, in_channels=in_channels, out_channels=out_channels)
        check_device(device)
        check_dtype(dtype)
        kernel, steps = positive_pair("kernel_size", kernel_size), positive_pair("stride", stride)
        check_weights((out_channels, in_channels // groups, *kernel))
        reach = positive_pair("dilation", dilation)
        if padding != "same" or steps != (1, 1):  # torch pads for an even kernel too
            padding_pair(padding, kernel, steps, reach)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device=device, dtype=dtype
        )
