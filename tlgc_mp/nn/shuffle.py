"""Group convolution with shuffled output channels.

*ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices*, X. Zhang, X. Zhou, M. Lin, J. Sun,
https://arxiv.org/abs/1707.01083, as Section 4.1.3 of https://arxiv.org/abs/2110.05060 compares with it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tlgc_mp.nn.capture import is_captured
from tlgc_mp.nn.grouped import CheckedGroupConv2d


class ShuffleConv2d(CheckedGroupConv2d):
    """(B, in_channels, H, W) -> (B, out_channels, h, w): a group convolution, then output channel k of the N groups one
    after the other, for k = 1, ..., m/N. The next group convolution so reads from every group of this one.

    Arguments and parameters are those of :class:`torch.nn.Conv2d`; ``groups`` is N, and there is no bias unless asked
    for.

    Raises:
        UsageError: an argument that cannot work, such as ``groups`` that does not divide both channel counts.
    """

    def forward(self, x: Tensor) -> Tensor:
        if is_captured(x):
            rows: Tensor = super().forward(x).unflatten(-3, (self.groups, -1))
            return rows.transpose(-4, -3).flatten(-4, -3)
        if x.dim() == 3:  # as Conv2d takes it
            return self.forward(x.unsqueeze(0)).squeeze(0)
        return self._shuffled(super().forward(x))

    def _shuffled(self, y: Tensor) -> Tensor:
        """Channel k of group g, (g, k), moves to place (k, g)."""
        if not y.is_contiguous(memory_format=torch.channels_last):
            return F.channel_shuffle(y, self.groups)
        rows: Tensor = y.permute(0, 2, 3, 1).unflatten(3, (self.groups, -1))  # B, h, w, N, m/N
        return rows.transpose(3, 4).flatten(3).permute(0, 3, 1, 2)
