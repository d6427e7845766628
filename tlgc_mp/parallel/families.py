"""Split tensors that share memory.

Views of a share are views of the whole tensor, mostly. Some hold data of their own, though: a write on either side is
then carried over to the other at its next use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils._pytree import tree_leaves

from tlgc_mp.parallel.layout import dense_share, gather_shares

if TYPE_CHECKING:
    from tlgc_mp.parallel.split_tensor import SplitTensor


class Family:
    """Tensors that share memory, as far as this module must know: a view that holds data of its own, its local views,
    and the split tensor that it is a view of. A write on either side shows on the other at its next use."""

    __slots__ = ("base", "local", "seen", "share", "version", "viewed")
    linked = 0  # how many families have a base: none, mostly, and then nothing is looked at

    def __init__(self) -> None:
        self.version = 0
        self.base: SplitTensor | None = None
        self.share: Tensor | None = None
        self.viewed: Callable[[Tensor], Tensor] | None = None
        self.local = False
        self.seen = 0

    def link(self, base: SplitTensor, viewed: Callable[[Tensor], Tensor], share: Tensor, local: bool = False) -> None:
        """Makes this the family of ``share``, which is ``viewed`` of a whole copy of ``base``; or, where ``local``, of
        its share, and then the other way round, too."""
        self.base = type(base)(base.share, base.cut, base.ranks, (base.shape, base.stride()))  # as it is now
        self.base.family = family_of(base)
        self.viewed, self.share, self.local = viewed, share, local
        self.seen = self.base.family.version
        Family.linked += 1

    def __del__(self) -> None:
        if self.base is not None:
            Family.linked -= 1

    def refresh(self) -> None:
        """Brings data up to date with its base."""
        if self.base is None:
            return
        base_family = family_of(self.base)
        base_family.refresh()
        if base_family.version != self.seen:
            assert self.share is not None and self.viewed is not None
            self.share.copy_(self.viewed(self.base.share if self.local else gather_shares(self.base)))
            self.seen = base_family.version
            self.version += 1

    def written(self) -> None:
        """Carries a write to a member over to the base."""
        self.version += 1
        base = self.base
        if base is None:
            return
        assert self.share is not None and self.viewed is not None
        if self.local:
            base.share.copy_(self.viewed(self.share))
        else:
            data = gather_shares(base)
            self.viewed(data).copy_(self.share)
            base.share.copy_(dense_share(data, base.cut, base.ranks))
        family_of(base).written()
        self.seen = family_of(base).version


def family_of(tensor: SplitTensor) -> Family:
    if tensor.family is None:
        tensor.family = Family()
    return tensor.family


def refresh(tree: object) -> None:
    """Brings the split tensors in ``tree`` up to date with what they are views of. Nothing is looked at, mostly."""
    if not Family.linked:
        return
    for leaf in tree_leaves(tree):
        family = getattr(leaf, "family", None)
        if isinstance(family, Family):
            family.refresh()
