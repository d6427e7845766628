"""Group convolution with shuffled output channels.

*ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices*, X. Zhang, X. Zhou, M. Lin, J. Sun,
https://arxiv.org/abs/1707.01083, as Section 4.1.3 of https://arxiv.org/abs/2110.05060 compares with it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tlgc_mp.nn.capture import is_captured
from tlgc_mp.nn.grouped import CheckedGroupConvNd
from tlgc_mp.nn.window import from_last, memory_format_of, to_last


class ShuffleConvNd(CheckedGroupConvNd):
    """What shuffled group convolutions of one to three dimensions are."""

    def forward(self, x: Tensor) -> Tensor:
        if is_captured(x):
            channels = -1 - self.dims
            rows: Tensor = super().forward(x).unflatten(channels, (self.groups, -1))
            return rows.transpose(channels - 1, channels).flatten(channels - 1, channels)
        if x.dim() == self.dims + 1:  # as torch's convolutions take it
            return self.forward(x.unsqueeze(0)).squeeze(0)
        return self._shuffled(super().forward(x))

    def _shuffled(self, y: Tensor) -> Tensor:
        """Channel k of group g, (g, k), moves to place (k, g)."""
        if memory_format_of(y) == torch.contiguous_format:
            return F.channel_shuffle(y, self.groups)
        rows: Tensor = to_last(y).unflatten(-1, (self.groups, -1))  # B, h, w, N, m/N
        return from_last(rows.transpose(-2, -1).flatten(-2))


class ShuffleConv2d(ShuffleConvNd, nn.Conv2d):
    """(B, in_channels, H, W) -> (B, out_channels, h, w): a group convolution, then output channel k of the N groups one
    after the other, for k = 1, ..., m/N. The next group convolution so reads from every group of this one.

    Arguments and parameters are those of :class:`torch.nn.Conv2d`; ``groups`` is N, and there is no bias unless asked
    for.

    Raises:
        UsageError: an argument that cannot work, such as ``groups`` that does not divide both channel counts.
    """

    dims = 2


class ShuffleConv1d(ShuffleConvNd, nn.Conv1d):
    """:class:`ShuffleConv2d` of waveforms, (B, in_channels, L) -> (B, out_channels, l)."""

    dims = 1


class ShuffleConv3d(ShuffleConvNd, nn.Conv3d):
    """:class:`ShuffleConv2d` of volumes, (B, in_channels, D, H, W) -> (B, out_channels, d, h, w)."""

    dims = 3
