"""Balanced group convolution (BGC).

*Balanced Group Convolution: An Improved Group Convolution Based on Approximability Estimates*, Y. Lee, J. Park,
C.-O. Lee, https://arxiv.org/abs/2310.12461. Each group reads its own channels, and the mean over all groups of theirs:

    y_k = A_k x_k + B_k (x_1 + ... + x_N) / N

For 1x1 filters it is a two-level layer with representatives that are summed: r = n/N of them, restricted by 1/N of the
identity.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tlgc_mp.nn.grouped import CheckedGroupConvNd


class BalancedConvNd(CheckedGroupConvNd):
    """What balanced group convolutions of one to three dimensions are."""

    def reset_parameters(self) -> None:
        """Draws the parameters (:meth:`initial_deviations`) from torch's own random state; the bias starts at zero."""
        if "mean_weight" not in self._parameters:  # torch's constructor calls this
            self.mean_weight = nn.Parameter(torch.empty_like(self.weight))
        for name, deviation in self.initial_deviations().items():
            nn.init.normal_(getattr(self, name), 0.0, deviation)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def initial_deviations(self) -> dict[str, float]:
        """Parameter name -> the standard deviation of its initial values, which are normal with mean 0: He's."""
        return dict.fromkeys(("weight", "mean_weight"), math.sqrt(2.0 / self.weight[0].numel()))

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, H, W) -> (B, m, h, w), in the memory format of ``x``; (n, H, W) -> (m, h, w)."""
        mean = self.mean_of_groups(x)
        convolve = getattr(F, f"conv{self.dims}d")
        y: Tensor = super().forward(x) + convolve(
            mean, self.mean_weight, None, self.stride, self.padding, self.dilation
        )
        return y

    def mean_of_groups(self, x: Tensor) -> Tensor:
        """(..., n, H, W) -> (..., n/N, H, W)."""
        channels = -1 - self.dims
        by_group: Tensor = x.movedim(channels, -1).unflatten(-1, (self.groups, -1))  # ..., H, W, N, n/N
        return by_group.mean(-2).movedim(-1, channels)


class BalancedConv2d(BalancedConvNd, nn.Conv2d):
    """(B, in_channels, H, W) -> (B, out_channels, h, w): a group convolution, and a convolution of the groups' mean.

    Arguments are those of :class:`torch.nn.Conv2d`; ``groups`` is N, and there is no bias unless asked for. It has
    twice the filters of a group convolution, and across ranks sends n/N feature maps, summed.

    Parameters:
        weight: (m, n/N, d, d), the filters A_k, one group's after the other's.
        mean_weight: (m, n/N, d, d), the filters B_k.
        bias: (m,), optional.

    Raises:
        UsageError: an argument that cannot work, such as ``groups`` that does not divide both channel counts.
    """

    dims = 2


class BalancedConv1d(BalancedConvNd, nn.Conv1d):
    """:class:`BalancedConv2d` of waveforms, (B, in_channels, L) -> (B, out_channels, l), with filters (m, n/N, d)."""

    dims = 1


class BalancedConv3d(BalancedConvNd, nn.Conv3d):
    """:class:`BalancedConv2d` of volumes, (B, in_channels, D, H, W) -> (B, out_channels, d, h, w), with filters
    (m, n/N, d, d, d)."""

    dims = 3
