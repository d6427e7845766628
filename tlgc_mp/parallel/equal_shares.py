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
        names = [name for name, _ in cut_parameters(model)]
        count = min(len(names), LOOKED_AT)
        self._names = [names[index * (len(names) - 1) // max(count - 1, 1)] for index in range(count)]
        sums = torch.tensor(self.slots(model), device=device)
        self._by_right = _equal(start_all_gather(sums, ranks, of_pass=False)().tolist())

    def slots(self, model: nn.Module) -> list[int]:
        """The numbers of this rank that :meth:`check` is to compare: 0 of a share that was not drawn."""
        shares = {name: param.detach() for name, param in cut_parameters(model) if name in self._names}
        sums = [int(checksums.exact(shares[n])) if n in shares and _is_drawn(shares[n]) else 0 for n in self._names]
        return sums + [0] * (LOOKED_AT - len(sums))

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


def _is_drawn(share: Tensor) -> bool:
    first = checksums.flattened(share)[:_ELEMENTS]
    return first.is_floating_point() and len(torch.unique(first)) > max(_LEAST - 1, len(first) // 2)


def _equal(rows: list[list[int]]) -> list[int]:
    """The slots in which all ranks have the same, and something."""
    return [index for index, values in enumerate(zip(*rows, strict=True)) if values[0] and len(set(values)) == 1]
