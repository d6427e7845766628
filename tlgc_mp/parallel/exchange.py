"""The exchange of a two-level layer whose groups lie on several ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tlgc_mp.nn.coarse_level import Exchange
from tlgc_mp.parallel.collectives import (
    coarse_gather,
    coarse_reduce_scatter,
    start_coarse_gather,
    start_coarse_reduce_scatter,
    start_sum_partials,
    sum_partials,
)


class CoarseExchange(Exchange):
    """The exchange of representatives among the ranks of a process group, in rank order.

    Args:
        ranks: how many there are.
        group_name: the group's, which is used for nothing else, so that the coarse gather never queues behind other
            traffic.
        over_network: whether they lie on several hosts, the same on every rank. Over Gloo, sends and receives then
            make the most of the network; on one host, they would cost the computation that hides the exchange more
            than Gloo's own collectives do.
    """

    def __init__(self, ranks: int, group_name: str, over_network: bool) -> None:
        self.ranks = ranks
        self.group_name = group_name
        self.over_network = over_network

    def forward(self, share: Tensor) -> Callable[[], Tensor]:
        return self._started("coarse_gather", coarse_gather, start_coarse_gather, share)

    def backward(self, full: Tensor) -> Callable[[], Tensor]:
        return self._started("coarse_reduce_scatter", coarse_reduce_scatter, start_coarse_reduce_scatter, full)

    def _started(
        self,
        name: str,
        operator: Callable[[Tensor, int, str], Tensor],
        start: Callable[[Tensor, int, str, bool], Callable[[], Tensor]],
        tensor: Tensor,
    ) -> Callable[[], Tensor]:
        if torch.compiler.is_compiling() or type(tensor) is not Tensor:
            # What is traced is a graph of whole operators; a compiler finds its own overlap.
            result = operator(tensor, self.ranks, self.group_name)
            return lambda: result
        with torch.profiler.record_function(f"tlgc_mp::{name}"):
            return start(tensor, self.ranks, self.group_name, self.over_network)


class CoarseSum(Exchange):
    """The sum over the ranks of a process group of what the groups of each have summed, and of its gradient: each rank
    has taken on the sum by itself.

    Args:
        group_name: of a group as that of :class:`CoarseExchange`.
    """

    def __init__(self, group_name: str) -> None:
        self.group_name = group_name

    def forward(self, share: Tensor) -> Callable[[], Tensor]:
        if torch.compiler.is_compiling() or type(share) is not Tensor:
            total = sum_partials(share, self.group_name)
            return lambda: total
        with torch.profiler.record_function("tlgc_mp::sum_partials"):
            return start_sum_partials(share, self.group_name)

    def backward(self, full: Tensor) -> Callable[[], Tensor]:
        return self.forward(full)
