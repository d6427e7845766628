"""Whether code that took shares for whole parameters has left every rank with the same ones.

``model.parameters()`` are shares. Drawn, or broadcast, as if they were whole, they come out alike on all ranks: a model
of repeated filters, which no single device has drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tlgc_mp.errors import UsageError
from tlgc_mp.parallel import checksums
from tlgc_mp.parallel.collectives import start_all_gather
from tlgc_mp.parallel.layout import Ranks
from tlgc_mp.parallel.sharded import cut_parameters

LOOKED_AT = 16
"""Of the cut parameters, how many are compared, at most: some from the first to the last."""

_ELEMENTS = 256
_LEAST = 32
"""A share counts as drawn where more than half of its first elements have values of their own, and so many at least.
Zeros, ones and fixed kernels are alike on every rank by right."""


class EqualShares:
    """Finds shares that have become the same on every rank since the model was split. Collective as it is made.

    Args:
        device: where tensors lie that ``ranks`` send.
    """

    def __init__(self, model: nn.Module, ranks: Ranks, device: torch.device) -> None:
        self._names, sums = _sums(model)
        rows = start_all_gather(torch.tensor(sums, device=device), ranks, of_pass=False)().tolist()
        self._by_right = _equal(rows)

    def slots(self, model: nn.Module) -> list[int]:
        """The numbers of this rank that :meth:`check` is to compare."""
        return _sums(model)[1]

    def check(self, rows: list[list[int]]) -> None:
        """Raises :class:`UsageError` where the :meth:`slots` of all ranks say that a share has become the same.

        Filters that a user has repeated before the split may be.
        """
        for index in _equal(rows):
            if index not in self._by_right:
                raise UsageError(
                    f"{self._names[index]} must be written whole, got the same share on every tensor-parallel rank, "
                    "as of parameters() that are drawn or broadcast; write to the layer's own, or before the split"
                )


def _sums(model: nn.Module) -> tuple[list[str], list[int]]:
    """Names of cut parameters, and :data:`LOOKED_AT` checksums of their shares: 0 of one that was not drawn."""
    shares = cut_parameters(model)
    count = min(len(shares), LOOKED_AT)
    chosen = [shares[index * (len(shares) - 1) // max(count - 1, 1)] for index in range(count)]
    sums = [int(checksums.exact(share)) if _is_drawn(share) else 0 for _, share in chosen]
    return [name for name, _ in chosen], sums + [0] * (LOOKED_AT - count)


def _is_drawn(share: Tensor) -> bool:
    first = checksums.flattened(share)[:_ELEMENTS]
    return first.is_floating_point() and len(torch.unique(first)) > max(_LEAST - 1, len(first) // 2)


def _equal(rows: list[list[int]]) -> list[int]:
    """The slots in which all ranks have the same, and something."""
    return [index for index, values in enumerate(zip(*rows, strict=True)) if values[0] and len(set(values)) == 1]
