"""The prototype of the two-level group convolution (GC-2L-proto).

*Two-level Group Convolution*, Y. Lee, J. Park, C.-O. Lee, https://arxiv.org/abs/2110.05060, Equation (3.2). Between
restriction and prolongation stands a dense 1x1 convolution A_0 among the N coarse channels, and each group prolongs one
of its outputs only:

    y_k = A_k x_k + r_k (A_0 [R_0 x_1, ..., R_0 x_N])_k

So it is the final form with S_k = r_k (A_0)_k, of rank one, and is computed as that. With r representatives a group,
A_0 gives r coarse channels to each, and S_k is of rank r.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from tlgc_mp.nn.two_level import TwoLevelConv1d, TwoLevelConv2d, TwoLevelConv3d, TwoLevelConvNd


class TwoLevelPrototypeConvNd(TwoLevelConvNd):
    """What prototypes of one to three dimensions are."""

    coarse: nn.Parameter
    spread: nn.Parameter

    def _coarse_shapes(self) -> dict[str, tuple[int, ...]]:
        count = self.coarse_channels
        spread = (self.out_channels,) if count == 1 else (self.out_channels, count)
        return {"coarse": (self.groups * count, self.shared_maps), "spread": spread}

    def prolongation_matrix(self) -> Tensor:
        by_group = self.spread.view(self.local_groups, -1, self.coarse_channels, 1)  # G, m/N, r, 1
        rows: Tensor = by_group * self.coarse.unflatten(0, (self.local_groups, 1, -1))  # G, m/N, r, N r or r
        return rows.sum(2).flatten(0, 1)

    def _coarse_deviations(self, gain: float) -> dict[str, float]:
        return {
            "coarse": math.sqrt(2.0 / self.shared_maps),
            "spread": math.sqrt(gain / (2.0 * self.coarse_channels)),
        }


class TwoLevelPrototypeConv2d(TwoLevelPrototypeConvNd, TwoLevelConv2d):
    """The prototype (3.2) of :class:`TwoLevelConv2d`, with the same arguments.

    Parameters, in ``groups`` equal contiguous blocks along their first dimension, one block a group:
        weight, restriction, bias: as in the final form.
        coarse: (N r, N r), or (N r, r) with ``coarse_sum``, the 1x1 convolution A_0 among the coarse channels.
        spread: (m,), or (m, r) for r > 1, the factors r_k with which a group's outputs take on its coarse channels.
    """


class TwoLevelPrototypeConv1d(TwoLevelPrototypeConvNd, TwoLevelConv1d):
    """The prototype (3.2) of :class:`TwoLevelConv1d`, with the same arguments."""


class TwoLevelPrototypeConv3d(TwoLevelPrototypeConvNd, TwoLevelConv3d):
    """The prototype (3.2) of :class:`TwoLevelConv3d`, with the same arguments."""
