"""How a tensor lies over the tensor-parallel ranks, and what it takes to put it together or cut it.

A tensor is whole on every rank, or one of its dimensions is cut into P equal shares. A dimension that was joined from
several pieces, as torch.cat does, is a row of segments, and a rank holds its share of each, side by side: so joining
sends nothing.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tlgc_mp.parallel import collectives

if TYPE_CHECKING:
    from tlgc_mp.parallel.split_tensor import SplitTensor


class Layout(NamedTuple):
    """How one tensor is cut.

    Attributes:
        dim: the dimension that is cut; ``None`` where every rank holds the whole tensor.
        segments: sizes of the pieces that the dimension was joined from, each cut into P shares; ``None`` where it is
            one piece.
    """

    dim: int | None
    segments: tuple[int, ...] | None

    def pieces(self, total: int) -> tuple[int, ...]:
        """The segments of a dimension of ``total``, one where it was not joined."""
        return self.segments or (total,)


WHOLE = Layout(None, None)

segments_changed: list[Callable[[Layout], None]] = []
"""Called with the layout that a share was brought into from other segments. Empty but for ``joins.py`` and tests."""


class Ranks:
    """The tensor-parallel ranks of one replica.

    Args:
        group: their process group, in the order of their shares. ``None`` for a plan without communication, on the
            meta device, of ``size`` ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, size: int | None = None, rank: int = 0) -> None:
        self._group = group
        self.group_name: str = "" if group is None else group.group_name
        self.size: int = dist.get_world_size(group) if group is not None else size or 1
        self.rank: int = dist.get_rank(group) if group is not None else rank

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group; looked up by its name after this was pickled."""
        if self._group is None:
            self._group = collectives.resolve_group(self.group_name)
        return self._group

    def __deepcopy__(self, memo: dict[int, object]) -> Ranks:
        return self

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_group": None}


def new_group(members: list[int], timeout: datetime.timedelta | None = None) -> dist.ProcessGroup:
    """A group of these ranks, this one among them, which call this together."""
    made = dist.new_group(members, timeout=timeout, use_local_synchronization=True)
    assert isinstance(made, dist.ProcessGroup)
    return made


def whole_geometry(share: Tensor, layout: Layout, ranks: Ranks) -> tuple[Sequence[int], Sequence[int]]:
    """Shape and strides that the whole tensor has on one device, where ``share`` has its own."""
    dim = layout.dim
    if dim is None:
        return share.shape, share.stride()
    shape, strides, size = list(share.shape), list(share.stride()), ranks.size
    own, length = strides[dim], shape[dim]
    for other, stride in enumerate(strides):
        # Outside of the cut dimension in memory, so that a step goes past all shares of it. Where this rank's share
        # is one wide, a dimension of the same stride cannot be inside.
        outside = stride > own or (stride == own and (other < dim or (length == 1 and shape[other] > 1)))
        if other != dim and outside and stride:
            strides[other] = stride * size
    shape[dim] = length * size
    return shape, strides


def contiguous_geometry(share: Tensor, layout: Layout, ranks: Ranks) -> tuple[Sequence[int], Sequence[int]]:
    """:func:`whole_geometry` where the whole tensor is contiguous, as the results of some kernels are."""
    shape = list(share.shape)
    if layout.dim is not None:
        shape[layout.dim] *= ranks.size
    strides = [1] * len(shape)
    for dim in range(len(shape) - 1, 0, -1):
        strides[dim - 1] = strides[dim] * max(shape[dim], 1)
    return shape, strides


def thin_geometry(
    share: Tensor, dim: int, ranks: Ranks, strides_like: Sequence[int]
) -> tuple[Sequence[int], Sequence[int]]:
    """:func:`whole_geometry` of a share that is one wide along the cut ``dim``, of which its own strides say nothing:
    the dimensions follow each other as in a whole tensor of strides ``strides_like``."""
    shape, strides = list(share.shape), list(share.stride())
    inner = 1
    for other, length in enumerate(shape):
        if other == dim:
            continue
        if strides_like[other] > strides_like[dim] or not strides_like[other]:  # repeated: as far out as can be
            strides[other] *= ranks.size
        elif length > 1:
            inner = max(inner, strides[other] * length)
    shape[dim], strides[dim] = ranks.size, inner
    return shape, strides


def take_share(whole: Tensor, layout: Layout, ranks: Ranks, rank: int | None = None) -> Tensor:
    """The share of a plain whole tensor that ``rank`` (default: this one) holds; a view where there is one segment."""
    dim = layout.dim
    if dim is None:
        return whole
    rank = ranks.rank if rank is None else rank
    if layout.segments is None:
        length = whole.shape[dim] // ranks.size
        return whole.narrow(dim, rank * length, length)
    parts, start = [], 0
    for segment in layout.segments:
        length = segment // ranks.size
        parts.append(whole.narrow(dim, start + rank * length, length))
        start += segment
    order = memory_order(whole)  # of which the parts say less, where they are one wide
    back = [order.index(i) for i in range(whole.dim())]
    return torch.cat([part.permute(order) for part in parts], order.index(dim)).permute(back)


def dense_share(whole: Tensor, layout: Layout, ranks: Ranks) -> Tensor:
    """:func:`take_share` without the gaps in memory that a view has. Some kernels read what others made, such as the
    indices of pooling, without a look at its strides: on one device it never has gaps."""
    share = take_share(whole, layout, ranks)
    dim = layout.dim
    if dim is None or layout.segments is not None or whole.layout != torch.strided:
        return share
    order = memory_order(whole)
    if _is_outermost(whole, dim, order) or _overlaps(whole.shape, whole.stride()):
        return share
    back = [order.index(i) for i in range(whole.dim())]
    return share.permute(order).contiguous().permute(back)


def join_shares(shares: Sequence[Tensor], layout: Layout) -> list[Tensor]:
    """The pieces of a whole tensor along its cut dimension, in order, of the shares of all ranks, as views."""
    if layout.segments is None:
        return list(shares)
    assert layout.dim is not None
    lengths = [segment // len(shares) for segment in layout.segments]
    cut = [share.split(lengths, layout.dim) for share in shares]
    return [cut[rank][piece] for piece in range(len(lengths)) for rank in range(len(shares))]


def gather_shares(tensor: SplitTensor) -> Tensor:
    """The whole of a SplitTensor, plain, in the memory format that it has on one device. Collective.

    A random draw, for one, follows that order.
    """
    return start_gather_shares(tensor)()


def start_gather_shares(tensor: SplitTensor) -> Callable[[], Tensor]:
    """Starts :func:`gather_shares`; the function returned waits for its result."""
    layout, share, ranks = tensor.cut, tensor.share, tensor.ranks
    if layout.dim is None:
        return lambda: share
    order = memory_order(share)
    arrival = collectives.start_all_gather(share.permute(order).contiguous(), ranks)
    return lambda: _joined(arrival(), tensor, order)


def _joined(stacked: Tensor, tensor: SplitTensor, order: Sequence[int]) -> Tensor:
    """The whole of ``tensor`` from the shares of all ranks: P, then a share in memory's ``order``."""
    layout, share, ranks = tensor.cut, tensor.share, tensor.ranks
    dim = layout.dim
    assert dim is not None
    back = [order.index(i) for i in range(share.dim())]
    if layout.segments is None and _is_outermost(share, dim, order):
        place = order.index(dim)
        joined = stacked.movedim(0, place).flatten(place, place + 1).permute(back)
        shape, strides = tensor.shape, tensor.stride()
        if all(n == 1 or own == whole for n, own, whole in zip(shape, joined.stride(), strides, strict=True)):
            return joined.as_strided(shape, strides)
    shares = join_shares([stacked[rank].permute(back) for rank in range(ranks.size)], layout)
    if _overlaps(tensor.shape, tensor.stride()):
        return torch.cat(shares, dim)
    out = torch.empty_strided(tensor.shape, tensor.stride(), dtype=share.dtype, device=share.device)
    return torch.cat(shares, dim, out=out)


def change_segments(tensor: SplitTensor, layout: Layout) -> Tensor:
    """This rank's share of a SplitTensor in another ``layout`` of the same cut dimension. Collective."""
    for note in segments_changed:
        note(layout)
    share, ranks = tensor.share, tensor.ranks
    dim = layout.dim
    assert dim is not None
    if type(share) is not Tensor or not share.is_contiguous():
        return take_share(gather_shares(tensor), layout, ranks)
    stacked = collectives.all_gather(share, ranks)
    places = _places(tensor.cut, layout, tensor.shape[dim], ranks.size, ranks.rank, share.device)
    return stacked.movedim(0, dim).flatten(dim, dim + 1).index_select(dim, places)


@functools.lru_cache(maxsize=4096)
def _places(old: Layout, new: Layout, length: int, size: int, rank: int, device: torch.device) -> Tensor:
    """Where in a row of all ranks' shares in the layout ``old`` those elements are that ``rank`` holds in ``new``."""
    ranks = Ranks(size=size)
    with torch.inference_mode(False):
        every = torch.arange(length)
        row = torch.cat([take_share(every, Layout(0, old.segments), ranks, of) for of in range(size)])
        return row.argsort()[take_share(every, Layout(0, new.segments), ranks, rank)].to(device)


def _is_outermost(tensor: Tensor, dim: int, order: Sequence[int]) -> bool:
    """Whether nothing but dimensions of one lies outside of ``dim`` in memory, as in a batch of one image: the shares
    of all ranks lie one after the other then."""
    return all(tensor.shape[other] == 1 for other in order[: order.index(dim)])


def _overlaps(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether some elements may share memory: to write one would write another."""
    end = 1
    for stride, length in sorted(zip(strides, shape, strict=True)):
        if length > 1:
            if stride < end:
                return True
            end += (length - 1) * stride
    return False


def memory_order(tensor: Tensor) -> list[int]:
    """The dimensions of ``tensor`` from the outermost in memory to the innermost."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda i: -strides[i])


def scatter_sum(partial: Tensor, layout: Layout, ranks: Ranks) -> Tensor:
    """This rank's share, in ``layout``, of the sum of ``partial`` over the ranks. Collective."""
    return start_scatter_sum(partial, layout, ranks)()


def start_scatter_sum(partial: Tensor, layout: Layout, ranks: Ranks) -> Callable[[], Tensor]:
    """Starts :func:`scatter_sum`; the function returned waits for its result."""
    if layout.dim is None:
        total = collectives.all_reduce(partial, ranks)
        return lambda: total
    order = memory_order(partial)
    if layout.segments is None and _is_outermost(partial, layout.dim, order):
        place = order.index(layout.dim)
        stacked = partial.permute(order).unflatten(place, (ranks.size, -1)).movedim(place, 0).contiguous()
    else:
        shares = [take_share(partial, layout, ranks, rank) for rank in range(ranks.size)]
        stacked = torch.stack([share.permute(order) for share in shares])
    back = [order.index(i) for i in range(partial.dim())]
    arrival = collectives.start_reduce_scatter(stacked, ranks)
    return lambda: arrival().permute(back)
