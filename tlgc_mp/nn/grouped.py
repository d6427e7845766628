"""What the group convolutions have in common that take torch's arguments and give another output."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.nn.modules.conv import _ConvNd

from tlgc_mp.nn.arguments import check_device, check_dtype, check_groups, check_weights, padding_sizes, positive_sizes
from tlgc_mp.nn.fusing import NotFusedByTorch


class CheckedGroupConvNd(NotFusedByTorch, _ConvNd):
    """A group convolution of zeros padding, whose arguments are checked; before torch's class of as many dimensions."""

    dims: ClassVar[int]

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_groups(groups, in_channels=in_channels, out_channels=out_channels)
        check_device(device)
        check_dtype(dtype)
        kernel = positive_sizes("kernel_size", kernel_size, self.dims)
        steps = positive_sizes("stride", stride, self.dims)
        check_weights((out_channels, in_channels // groups, *kernel))
        reach = positive_sizes("dilation", dilation, self.dims)
        if padding != "same" or max(steps) > 1:  # torch pads for an even kernel too
            padding_sizes(padding, kernel, steps, reach)
        super().__init__(  # type: ignore[call-arg]
            *(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias),  # type: ignore[arg-type]
            device=device,
            dtype=dtype,
        )
