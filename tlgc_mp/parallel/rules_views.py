"""Rules of views, of their gradients, and of joins.

A view of a share is a view of the whole tensor as long as the cut dimension is looked at as a whole. Where it is not, a
view is computed whole, and ``split_tensor`` keeps both sides alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from tlgc_mp.parallel.concatenation import MOST_SEGMENTS, joined_layout
from tlgc_mp.parallel.families import Family
from tlgc_mp.parallel.layout import WHOLE, Layout
from tlgc_mp.parallel.rules import _first, aten, dimension, operators, rule, unfilled, wrap
from tlgc_mp.parallel.signatures import Args, Kwargs, Operator
from tlgc_mp.parallel.split_tensor import SplitTensor, as_view, made_as_view, share_in


@rule(aten.detach, aten.alias)
def same(func: Operator, args: Args, kwargs: Kwargs) -> object:
    x = args[0]
    return as_view(func(x.share), x.cut, x, geometry=(x.shape, x.stride()))


@rule(aten._conj, aten._neg_view)
def mark(func: Operator, args: Args, kwargs: Kwargs) -> object:
    """Computed at once, since operators on shares come after those that look at such a mark."""
    x = args[0]
    computed = aten.conj_physical if func.overloadpacket is aten._conj else aten.neg
    share = computed(x.share)
    made = made_as_view(share, x.cut, x, x.storage_offset())
    made.family = Family()
    made.family.link(x, computed, share, local=True)
    return made


@rule(aten.lift_fresh)
def lift(func: Operator, args: Args, kwargs: Kwargs) -> object:
    return args[0]


@rule(aten.permute)
def permute(func: Operator, args: Args, kwargs: Kwargs) -> object:
    x, dims = args
    if x.cut.dim is None:
        return NotImplemented
    order = [dimension(dim, x.dim()) for dim in dims]
    return as_view(func(x.share, dims), Layout(order.index(x.cut.dim), x.cut.segments), x)


@rule(aten.transpose.int, aten.t)
def transpose(func: Operator, args: Args, kwargs: Kwargs) -> object:
    x = args[0]
    if x.cut.dim is None:
        return NotImplemented
    first, second = [dimension(dim, x.dim()) for dim in args[1:]] if len(args) == 3 else (0, x.dim() - 1)
    dim = {first: second, second: first}.get(x.cut.dim, x.cut.dim)
    return as_view(func(*[x.share, *args[1:]]), Layout(dim, x.cut.segments), x)


@rule(aten.unsqueeze)
def unsqueeze(func: Operator, args: Args, kwargs: Kwargs) -> object:
    x, at = args
    if x.cut.dim is None:
        return NotImplemented
    at = dimension(at, x.dim() + 1)
    return as_view(func(x.share, at), Layout(x.cut.dim + (at <= x.cut.dim), x.cut.segments), x)


@rule(aten.squeeze)
def squeeze(func: Operator, args: Args, kwargs: Kwargs) -> object:
    x = args[0]
    dim = x.cut.dim
    if dim is None:
        return NotImplemented
    dims = range(x.dim()) if len(args) == 1 else [args[1]] if isinstance(args[1], int) else args[1]
    gone = [dimension(d, x.dim()) for d in dims if x.shape[d] == 1]  # never the cut one, though a share of it may be 1
    share = aten.squeeze.dims(x.share, gone)
    return as_view(share, Layout(dim - sum(d < dim for d in gone), x.cut.segments), x)


@rule(aten.expand)
def expand(func: Operator, args: Args, kwargs: Kwargs) -> object:
    x, size = args[0], list(args[1])
    if x.cut.dim is None:
        return NotImplemented
    dim = x.cut.dim + len(size) - x.dim()
    if size[dim] not in (-1, x.shape[x.cut.dim]):
        return NotImplemented
    size[dim] = -1
    return as_view(func(x.share, size, **kwargs), Layout(dim, x.cut.segments), x)


@rule(aten.view.default, aten._unsafe_view, aten._reshape_alias)
def view(func: Operator, args: Args, kwargs: Kwargs) -> object:
    x, size = args[0], list(args[1])
    if x.cut.dim is None or x.numel() == 0:
        return NotImplemented
    if -1 in size:
        size[size.index(-1)] = x.numel() // -math.prod(size)
    found = viewed(tuple(x.shape), size, x.cut, x.ranks.size)
    if found is None:
        return NotImplemented
    layout = found
    assert layout.dim is not None
    local = list(size)
    local[layout.dim] //= x.ranks.size
    try:
        share = x.share.view(local)
        geometry = None
        if local[layout.dim] == 1:  # its stride says nothing of the whole
            whole = unfilled(x).view(size)
            geometry = whole.shape, whole.stride()
    except RuntimeError:  # a share may lie otherwise in memory than the whole
        return NotImplemented
    return as_view(share, layout, x, geometry=geometry)


def viewed(shape: Sequence[int], size: Sequence[int], layout: Layout, ranks: int) -> Layout | None:
    """The layout of a tensor of ``shape`` seen as ``size``; ``None`` where a share of the one is no share of the other.

    Both shapes fall into groups of dimensions with the same product; only the group of the cut dimension matters.
    """
    assert layout.dim is not None
    old, new = _group(shape, size, layout.dim)
    if old is None or new is None:
        return None
    outer = math.prod(shape[old.start : layout.dim])
    inner = math.prod(shape[layout.dim + 1 : old.stop])
    pieces = [piece * inner for piece in layout.pieces(shape[layout.dim])] * outer
    # The group is now one dimension of these pieces, each cut. Its rows are the first of the new dimensions.
    wide = [dim for dim in new if size[dim] > 1]
    if not wide:
        return None
    first = wide[0]
    row = math.prod(size[dim] for dim in wide[1:])
    if len(pieces) > 1 and len(set(pieces)) == 1 and size[first] == len(pieces) and len(wide) > 1:
        pieces, first, row = pieces[:1], wide[1], math.prod(size[dim] for dim in wide[2:])  # one piece a row
    if any(piece % (row * ranks) for piece in pieces) or len(pieces) > MOST_SEGMENTS:
        return None
    segments = tuple(piece // row for piece in pieces) if len(pieces) > 1 else None
    return Layout(first, segments)


def _group(shape: Sequence[int], size: Sequence[int], dim: int) -> tuple[range, range] | tuple[None, None]:
    """The dimensions of ``shape`` and of ``size`` with the same product among which ``dim`` is; as few as there are."""
    i = j = 0
    while i < len(shape):
        start, other = i, j
        left, right = shape[i], size[j] if j < len(size) else 1
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                if i >= len(shape):
                    return None, None
                left, i = left * shape[i], i + 1
            else:
                if j >= len(size):
                    return None, None
                right, j = right * size[j], j + 1
        if start <= dim < i:
            return range(start, i), range(other, min(j, len(size)))
    return None, None


def _start_stop(args: Args, length: int) -> tuple[int, int, int]:
    """Of ``slice(x, dim, start, end, step)``."""
    start = args[2] if len(args) > 2 else None
    end = args[3] if len(args) > 3 else None
    step = args[4] if len(args) > 4 else 1
    begin, stop, _ = slice(start, end, step).indices(length)
    return begin, max(stop, begin), step


@rule(aten.slice)
def slices(func: Operator, args: Args, kwargs: Kwargs) -> object:
    x = args[0]
    if x.cut.dim is None or kwargs:
        return NotImplemented
    dim = dimension(args[1] if len(args) > 1 else 0, x.dim())
    begin, stop, step = _start_stop(args, x.shape[dim])
    offset = x.storage_offset() + begin * x.stride(dim)
    if dim != x.cut.dim:
        return as_view(func(x.share, dim, begin, stop, step), x.cut, x, offset)
    if begin == 0 and stop == x.shape[dim] and step == 1:
        return as_view(aten.alias(x.share), x.cut, x, geometry=(x.shape, x.stride()))
    if step != 1:
        return NotImplemented
    part = _between(x.cut.pieces(x.shape[dim]), begin, stop)
    if part is None:
        return NotImplemented
    segments = part if len(part) > 1 else None
    share = x.share.narrow(dim, begin // x.ranks.size, (stop - begin) // x.ranks.size)
    return as_view(share, Layout(dim, segments), x, offset)


def _between(pieces: Sequence[int], begin: int, stop: int) -> tuple[int, ...] | None:
    """The pieces from ``begin`` to ``stop``; ``None`` where these are not between pieces."""
    found, at = [], 0
    for piece in pieces:
        if begin <= at and at + piece <= stop:
            found.append(piece)
        at += piece
    return tuple(found) if found and sum(found) == stop - begin else None


@rule(aten.select.int)
def select(func: Operator, args: Args, kwargs: Kwargs) -> object:
    x, dim, index = args
    if x.cut.dim is None or dimension(dim, x.dim()) == x.cut.dim:
        return NotImplemented
    dim, index = dim % x.dim(), index % x.shape[dim] if -x.shape[dim] <= index < x.shape[dim] else index
    share = func(x.share, dim, index)
    layout = Layout(x.cut.dim - (dim < x.cut.dim), x.cut.segments)
    return as_view(share, layout, x, x.storage_offset() + index * x.stride(dim))


@rule(aten.split.Tensor, aten.split_with_sizes, aten.unsafe_split, aten.unsafe_split_with_sizes, aten.unbind)
def split(func: Operator, args: Args, kwargs: Kwargs) -> object:
    """As many slices."""
    x = args[0]
    if x.cut.dim is None:
        return NotImplemented
    at = 1 if func is aten.unbind.int else 2
    dim = dimension(args[at] if len(args) > at else kwargs.get("dim", 0), x.dim())
    length = x.shape[dim]
    if func is aten.unbind.int:
        if dim == x.cut.dim:
            return NotImplemented
        return [select(aten.select.int, (x, dim, index), {}) for index in range(length)]
    sizes = args[1]
    if isinstance(sizes, int):
        if sizes < 1:
            return NotImplemented
        sizes = [min(sizes, length - start) for start in range(0, max(length, 1), sizes)]
    if sum(sizes) != length:
        return NotImplemented
    parts, start = [], 0
    for size in sizes:
        part = slices(aten.slice.Tensor, (x, dim, start, start + size, 1), {})
        if part is NotImplemented:
            return NotImplemented
        parts.append(part)
        start += size
    return parts


@rule(aten.unfold)
def unfold(func: Operator, args: Args, kwargs: Kwargs) -> object:
    x, dim = args[0], args[1]
    if x.cut.dim is None or dimension(dim, x.dim()) == x.cut.dim:
        return NotImplemented
    return as_view(func(x.share, *args[1:]), x.cut, x)


@rule(aten.slice_backward, aten.select_backward)
def slice_backward(func: Operator, args: Args, kwargs: Kwargs) -> object:
    grad, sizes, dim = args[0], list(args[1]), args[2]
    x = _first(args)
    if x is None:
        return NotImplemented
    dim %= len(sizes)
    cut = x.cut.dim
    assert cut is not None
    if func.overloadpacket is aten.select_backward:
        cut += dim <= cut
    if cut == dim:
        return NotImplemented
    sizes[cut] //= x.ranks.size
    return SplitTensor(func(grad.share, sizes, dim, *args[3:]), Layout(cut, x.cut.segments), x.ranks)


@rule(aten.cat.default)
def cat(func: Operator, args: Args, kwargs: Kwargs) -> object:
    tensors = list(args[0])
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    lead = next((t for t in tensors if type(t) is SplitTensor and t.cut.dim is not None), None)
    if lead is None:
        return NotImplemented
    dim = dimension(dim, lead.dim())
    found = joined_layout(tensors, dim, lead)
    if found is None:
        return NotImplemented
    layout, own = found
    shares = [share_in(t, of_it, lead.ranks) for t, of_it in zip(tensors, own, strict=True)]
    return SplitTensor(func(shares, dim), layout, lead.ranks)


@rule(aten.stack.default)
def stack(func: Operator, args: Args, kwargs: Kwargs) -> object:
    tensors = list(args[0])
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    lead = next((t for t in tensors if type(t) is SplitTensor and t.cut.dim is not None), None)
    if lead is None or any(t.shape != lead.shape for t in tensors):
        return NotImplemented
    dim = dimension(dim, lead.dim() + 1)
    assert lead.cut.dim is not None
    shares = [share_in(t, lead.cut, lead.ranks) for t in tensors]
    layout = Layout(lead.cut.dim + (dim <= lead.cut.dim), lead.cut.segments)
    share = func(shares, dim)
    if lead.share.shape[lead.cut.dim] > 1:
        return SplitTensor(share, layout, lead.ranks)
    shapes = unfilled(tensors)
    return SplitTensor(share, layout, lead.ranks, (list(func(shapes, dim).shape), func(shapes, dim).stride()))


@rule(*operators("index_select.default"))
def index_select(func: Operator, args: Args, kwargs: Kwargs) -> object:
    x, dim, index = args
    if _first(args) is None or dimension(dim, x.dim()) == x.cut.dim:
        return NotImplemented
    plain = share_in(index, WHOLE, x.ranks) if isinstance(index, Tensor) else index
    return wrap(func(x.share, dim, plain), x.cut, x)
