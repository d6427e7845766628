"""Where the kernel of a convolution reads, and how what it reads lies in memory.

It reads images (B, C, H, W) or volumes (B, C, D, H, W), which may be channels_last. Torch has no such format for
waveforms (B, C, L), and takes them for images one row high; so do the layers here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

AXES = {1: ("L",), 2: ("H", "W"), 3: ("D", "H", "W")}
"""By their number, the letters of the dimensions that a kernel moves along."""


def channels_last_of(x: Tensor) -> torch.memory_format:
    """The memory format of as many dimensions as ``x`` has, in which the channels of a position lie together."""
    return torch.channels_last_3d if x.dim() == 5 else torch.channels_last


def memory_format_of(x: Tensor) -> torch.memory_format:
    """channels_last where ``x`` is that, else the contiguous one."""
    last = channels_last_of(x)
    return last if x.is_contiguous(memory_format=last) else torch.contiguous_format


def to_last(x: Tensor) -> Tensor:
    """(B, C, ...) -> (B, ..., C), a view."""
    return x.permute(0, 2, 3, 1) if x.dim() == 4 else x.permute(0, 2, 3, 4, 1)


def from_last(x: Tensor) -> Tensor:
    """(B, ..., C) -> (B, C, ...), a view; of a contiguous tensor, channels_last."""
    return x.permute(0, 3, 1, 2) if x.dim() == 4 else x.permute(0, 4, 1, 2, 3)


class Window(NamedTuple):
    """Where a convolution kernel reads in images: (vertical, horizontal) kernel size, stride, padding and dilation."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def channels_last(self) -> torch.memory_format:
        return torch.channels_last

    def resized(self, kernel: Sequence[int], padding: Sequence[int]) -> Window:
        """The same steps, with another kernel and padding."""
        return Window(tuple(kernel), self.stride, tuple(padding), self.dilation)

    def output_size(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """(h, w) of a convolution of so many positions."""
        return tuple(
            [
                (length + 2 * padding - step * (kernel - 1) - 1) // stride + 1
                for length, kernel, stride, padding, step in zip(lengths, *self, strict=True)
            ]
        )

    def padded(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """(H, W) with the padding."""
        (rows, columns), (vertical, horizontal) = lengths, self.padding
        return (rows + 2 * vertical, columns + 2 * horizontal)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
        """torch's convolution of ``x`` in this window."""
        padding = self.padding
        if padding[0] < 0 or padding[1] < 0:
            x, padding = self.pad(x, 1), (0, 0)
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, groups)

    def mix(self, x: Tensor, matrix: Tensor) -> Tensor:
        """A 1x1 convolution, whose filters are the rows of ``matrix``."""
        return F.conv2d(x, matrix[:, :, None, None])

    def views(self, planes: Tensor, sizes: Sequence[int]) -> Tensor:
        """Padded (G, d * d, B, H, W), a plane a tap -> a view (G, d, d, B, h, w): what each tap reads, or writes."""
        groups, _, batch, rows, columns = planes.shape
        (kernel_h, kernel_w), (stride_h, stride_w), (step_h, step_w) = self.kernel, self.stride, self.dilation
        plane = batch * rows * columns
        return planes.as_strided(
            (groups, kernel_h, kernel_w, batch, *sizes),
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


class VolumeWindow(Window):
    """Where one reads in volumes; of each, the value for the depth comes first."""

    @property
    def channels_last(self) -> torch.memory_format:
        return torch.channels_last_3d

    def padded(self, lengths: Sequence[int]) -> tuple[int, ...]:
        return tuple(length + 2 * each for length, each in zip(lengths, self.padding, strict=True))

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
        padding = self.padding
        if min(padding) < 0:
            x, padding = self.pad(x, 1), (0, 0, 0)
        return F.conv3d(x, weight, bias, self.stride, padding, self.dilation, groups)

    def mix(self, x: Tensor, matrix: Tensor) -> Tensor:
        return F.conv3d(x, matrix[:, :, None, None, None])

    def views(self, planes: Tensor, sizes: Sequence[int]) -> Tensor:
        """Padded (G, d * d * d, B, D, H, W) -> a view (G, d, d, d, B, ., h, w)."""
        groups, _, batch, depth, rows, columns = planes.shape
        steps = (rows * columns, columns, 1)
        plane = batch * depth * rows * columns
        taps = (self.kernel[1] * self.kernel[2] * plane, self.kernel[2] * plane, plane)
        return planes.as_strided(
            (groups, *self.kernel, batch, *sizes),
            (
                math.prod(self.kernel) * plane,
                *(tap + reach * step for tap, reach, step in zip(taps, self.dilation, steps, strict=True)),
                depth * rows * columns,
                *(stride * step for stride, step in zip(self.stride, steps, strict=True)),
            ),
        )

    def pad(self, planes: Tensor, sign: int) -> Tensor:
        depth, vertical, horizontal = (sign * each for each in self.padding)
        ends = (horizontal, horizontal, vertical, vertical, depth, depth)
        return F.pad(planes, ends) if any(ends) else planes
