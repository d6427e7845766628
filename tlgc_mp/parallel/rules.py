"""What computes an operator on shares: pointwise operators, those that act along given dimensions, and reductions.

A rule gets an operator with its arguments, some of them :class:`SplitTensor`, and returns its result, or
``NotImplemented`` where the operator on these arguments is not the same on shares; it is then computed whole. The rules
of views, of layers and of random draws stand in the modules beside this one.

Writing one: which dimensions of which argument stand for themselves in the result? If the cut one does, call the
operator on the shares, and say which dimension of the result is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tlgc_mp.parallel import collectives
from tlgc_mp.parallel.layout import WHOLE, Layout, contiguous_geometry, gather_shares, thin_geometry
from tlgc_mp.parallel.signatures import Args, Kwargs, Operator, Rule
from tlgc_mp.parallel.split_tensor import SplitTensor, T, share_in
from tlgc_mp.parallel.split_tensor import like as alike

aten = torch.ops.aten

_RULES: dict[object, Rule] = {}
"""Operator, or overload of one -> its rule."""


def rule(*operators: object) -> Callable[[Rule], Rule]:
    """Registers a rule for operators (all overloads) or single overloads."""

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(operators, function))
        return function

    return register


def operators(names: str) -> list[Any]:
    """The operators of these names, separated by blanks, that this version of torch has."""
    found = []
    for name in names.split():
        operator, _, overload = name.partition(".")
        packet = getattr(aten, operator, None)
        if packet is not None and (not overload or hasattr(packet, overload)):
            found.append(getattr(packet, overload) if overload else packet)
    return found


def rule_of(func: Operator) -> Rule | None:
    """The rule of an operator's overload, or ``None``."""
    from tlgc_mp.parallel import (  # noqa: F401  (they register theirs)
        rules_convolution,
        rules_layers,
        rules_products,
        rules_random,
        rules_views,
    )

    if any(a.kwarg_only and a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments):
        return None  # a form with out=
    found = _RULES.get(func) or _RULES.get(func.overloadpacket)
    if found is not None:
        return found
    other = {torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    if torch.Tag.pointwise not in func.tags or other.intersection(func.tags):
        return None
    written = [i for i, a in enumerate(func._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    if not written:
        return pointwise
    return pointwise_in_place if written == [0] and func._schema.name.endswith("_") else None


def wrap(share: Tensor, layout: Layout, like: SplitTensor) -> SplitTensor:
    """A new SplitTensor; its shape and strides are those of ``like`` where the shares' are the same."""
    own = like.share
    if share.stride() == own.stride() and share.shape == own.shape and layout == like.cut:
        return alike(share, like)
    dim = layout.dim
    if dim is not None and layout == like.cut and share.shape == own.shape and share.shape[dim] == 1:
        kept = all(n == 1 or a == b for n, a, b in zip(share.shape, share.stride(), own.stride(), strict=True))
        if kept or not share.is_contiguous():
            geometry = thin_geometry(share, dim, like.ranks, like.stride())
        else:  # the kernel has laid it out anew
            geometry = contiguous_geometry(share, layout, like.ranks)
        return SplitTensor(share, layout, like.ranks, geometry)
    return SplitTensor(share, layout, like.ranks)


def wrap_all(out: Any, layout: Layout, like: SplitTensor) -> object:
    if isinstance(out, Tensor):
        return wrap(out, layout, like)
    return type(out)(wrap(t, layout, like) if isinstance(t, Tensor) else t for t in out)


def written(tensor: SplitTensor) -> SplitTensor:
    """To be called after the share of ``tensor`` was written."""
    if tensor.family is not None:
        tensor.family.written()
    return tensor


# Pointwise operators.


def pointwise(func: Operator, args: Args, kwargs: Kwargs) -> object:
    lead: SplitTensor | None = None
    same = not kwargs
    local = []
    for value in args:
        kind = type(value)
        if kind is SplitTensor:
            local.append(value.share)
            if value.cut.dim is None:
                same = False
            elif lead is None:
                lead = value
            elif value.cut != lead.cut or value.shape != lead.shape:
                same = False
                if value.dim() > lead.dim() or (value.dim() == lead.dim() and value.numel() > lead.numel()):
                    lead = value
        elif kind is float or kind is int:
            local.append(value)
        else:
            local.append(value)
            same = same and not isinstance(value, Tensor | list | tuple)
    if lead is None:
        return NotImplemented
    if same:
        out = func(*local)
        return wrap(out, lead.cut, lead) if type(out) is Tensor else wrap_all(out, lead.cut, lead)
    return _broadcast(func, args, kwargs, lead)


def pointwise_in_place(func: Operator, args: Args, kwargs: Kwargs) -> object:
    target = args[0]
    if type(target) is not SplitTensor or target.cut.dim is None:
        return NotImplemented
    if _broadcast(func, args, kwargs, target) is NotImplemented:
        return NotImplemented
    return written(target)


def _broadcast(func: Operator, args: Args, kwargs: Kwargs, lead: SplitTensor) -> object:
    """``func`` with every tensor brought to the layout of ``lead``, dimensions counted from the last."""
    dim = lead.cut.dim
    assert dim is not None
    place = dim - lead.dim()
    total = lead.shape[dim]

    def local(value: object) -> object:
        if isinstance(value, list | tuple):
            return type(value)(local(item) for item in value)
        if not isinstance(value, Tensor):
            return value
        if value.dim() < -place or value.shape[place] != total:
            if value.dim() >= -place and value.shape[place] != 1:
                raise _Unlike
            return gather_shares(value) if type(value) is SplitTensor else value
        layout = Layout(place + value.dim(), lead.cut.segments)
        return share_in(value, layout, lead.ranks)

    try:
        local_args = [local(value) for value in args]
        local_kwargs = {name: local(value) for name, value in kwargs.items()}
    except _Unlike:
        return NotImplemented
    out = func(*local_args, **local_kwargs)
    first = out if isinstance(out, Tensor) else out[0]
    layout = Layout(place + first.dim(), lead.cut.segments)
    if first is out and out.shape[place] == 1 and out.shape != lead.share.shape:  # its stride says nothing of the whole
        told = func(*unfilled(args), **unfilled(kwargs))
        return SplitTensor(out, layout, lead.ranks, (told.shape, told.stride()))
    return wrap_all(out, layout, lead)


def unfilled(tree: T) -> T:
    """``tree`` with every tensor in it, whole, on the meta device."""
    return tree_map_only(Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"), tree)  # type: ignore[no-any-return]


class _Unlike(Exception):
    """Sizes that do not broadcast: torch shall say so."""


# Operators of one tensor, of which every dimension but those named stands for itself.


def _first(args: Args) -> SplitTensor | None:
    """The first argument, where it is split."""
    first = args[0] if args else None
    return first if type(first) is SplitTensor and first.cut.dim is not None else None


def argument(func: Operator, args: Args, kwargs: Kwargs, name: str) -> Any:
    """The value of the argument called ``name``, given or not."""
    for index, described in enumerate(func._schema.arguments):
        if described.name == name:
            if index < len(args) and not described.kwarg_only:
                return args[index]
            return kwargs.get(name, described.default_value)
    return None


def dimension(dim: int, count: int) -> int:
    """``dim`` as a non-negative one of a tensor of ``count``, where torch would not look at it itself."""
    if not -count <= dim < count:
        raise IndexError(f"Dimension out of range (expected to be in range of [{-count}, {count - 1}], but got {dim})")
    return dim % count


def dims_of(value: int | Iterable[int], count: int) -> list[int]:
    """Dimensions, as an int or a list, as non-negative ones of a tensor of ``count``."""
    values = [value] if isinstance(value, int) else list(value)
    return [v % count if count else 0 for v in values]


@rule(*operators("clone zeros_like ones_like empty_like full_like _to_copy"))
def same_shape(func: Operator, args: Args, kwargs: Kwargs) -> object:
    x = _first(args)
    if x is None:
        return NotImplemented
    if kwargs.get("layout") not in (None, torch.strided):
        return NotImplemented
    share = func(x.share, *args[1:], **kwargs)
    if kwargs.get("memory_format", torch.preserve_format) not in (None, torch.preserve_format):
        return SplitTensor(share, x.cut, x.ranks)
    return wrap(share, x.cut, x)


@rule(*operators("fill_.Scalar zero_"))
def fill(func: Operator, args: Args, kwargs: Kwargs) -> object:
    x = _first(args)
    if x is None:
        return NotImplemented
    func(x.share, *args[1:], **kwargs)
    return written(x)


@rule(aten.copy_)
def copy(func: Operator, args: Args, kwargs: Kwargs) -> object:
    if type(args[0]) is SplitTensor:
        return pointwise_in_place(func, args, kwargs)
    return NotImplemented


@rule(
    *operators(
        "_softmax _log_softmax _safe_softmax cumsum cumprod logcumsumexp flip roll sort.default sort.stable "
        "topk.default cummax.default cummin.default kthvalue.default mode.default"
    )
)
def along_dim(func: Operator, args: Args, kwargs: Kwargs) -> object:
    """Acts along one or several dimensions, and keeps all; or, with ``keepdim``, drops one."""
    x = _first(args)
    if x is None:
        return NotImplemented
    dims = argument(func, args, kwargs, "dims" if func.overloadpacket in (aten.flip, aten.roll) else "dim")
    if dims is None or (isinstance(dims, list | tuple) and not dims) or x.cut.dim in dims_of(dims, x.dim()):
        return NotImplemented
    if func is aten._safe_softmax.default and x.shape[x.cut.dim] == x.ranks.size:  # type: ignore[index]
        return NotImplemented  # its result is contiguous, of which a share that is one wide says nothing
    out = func(x.share, *args[1:], **kwargs)
    first = out if isinstance(out, Tensor) else out[0]
    layout = x.cut
    if first.dim() < x.dim():
        layout = _without(layout, dims_of(dims, x.dim()))
    if func.overloadpacket in _SCANS and first.is_contiguous():
        return tree_map_only(
            Tensor, lambda t: SplitTensor(t, layout, x.ranks, contiguous_geometry(t, layout, x.ranks)), out
        )
    return wrap_all(out, layout, x)


_SCANS = {aten.cumsum, aten.cumprod, aten.logcumsumexp, aten.cummax, aten.cummin}
"""Whose result is contiguous whatever goes in; a share that is one wide would not say so."""


@rule(aten._softmax_backward_data, aten._log_softmax_backward_data)
def softmax_backward(func: Operator, args: Args, kwargs: Kwargs) -> object:
    grad, output, dim = args[0], args[1], args[2]
    lead = output if type(output) is SplitTensor and output.cut.dim is not None else _first(args)
    if lead is None or grad.shape != output.shape or lead.cut.dim == dim % max(lead.dim(), 1):
        return NotImplemented
    shares = [share_in(t, lead.cut, lead.ranks) for t in (grad, output)]
    return wrap(func(*shares, *args[2:], **kwargs), lead.cut, lead)


def _without(layout: Layout, dims: list[int]) -> Layout:
    """``layout`` after the dimensions ``dims`` have gone."""
    assert layout.dim is not None
    return Layout(layout.dim - sum(dim < layout.dim for dim in dims), layout.segments)


_REDUCTIONS = operators(
    "sum.dim_IntList mean.dim amax amin any.dim any.dims all.dim all.dims var.correction std.correction "
    "var_mean.correction std_mean.correction logsumexp linalg_vector_norm norm.ScalarOpt_dim prod.dim_int argmax "
    "argmin max.dim min.dim median.dim nanmedian.dim count_nonzero.dim_IntList nansum aminmax std.dim var.dim"
)


@rule(*_REDUCTIONS, *operators("sum.default mean.default"))
def reduce(func: Operator, args: Args, kwargs: Kwargs) -> object:
    x = _first(args)
    if x is None:
        return NotImplemented
    dims = argument(func, args, kwargs, "dim")
    every = dims is None or (isinstance(dims, list | tuple) and not dims)
    gone = list(range(x.dim())) if every else dims_of(dims, x.dim())
    if x.cut.dim in gone:
        return _reduce_over_ranks(func, args, kwargs, x)
    out = func(x.share, *args[1:], **kwargs)
    first = out if isinstance(out, Tensor) else out[0]
    layout = x.cut if first.dim() == x.dim() else _without(x.cut, gone)
    if isinstance(out, Tensor):
        return SplitTensor(out, layout, x.ranks)
    return tuple(SplitTensor(t, layout, x.ranks) for t in out)


def _reduce_over_ranks(func: Operator, args: Args, kwargs: Kwargs, x: SplitTensor) -> object:
    """Sums, means and extremes over the cut dimension: of the shares, then of the ranks."""
    packet = func.overloadpacket
    if packet not in (aten.sum, aten.mean, aten.amax, aten.amin) or x.share.numel() == 0:
        return NotImplemented
    out = func(x.share, *args[1:], **kwargs)
    if packet in (aten.amax, aten.amin):
        stacked = collectives.all_gather(out.contiguous(), x.ranks)  # torch knows NaN, a reduction over ranks may not
        total = stacked.amax(0) if packet is aten.amax else stacked.amin(0)
    else:
        total = collectives.all_reduce(out, x.ranks)
        if packet is aten.mean:
            total = total / x.ranks.size
    return SplitTensor(total, WHOLE, x.ranks)


@rule(*operators("constant_pad_nd"))
def pad(func: Operator, args: Args, kwargs: Kwargs) -> object:
    x = _first(args)
    if x is None:
        return NotImplemented
    assert x.cut.dim is not None
    last = x.dim() - 1 - x.cut.dim  # pairs are given from the last dimension on
    if any(args[1][2 * last : 2 * last + 2]):
        return NotImplemented
    return wrap(func(x.share, *args[1:], **kwargs), x.cut, x)


@rule(*operators("tril triu"))
def last_two(func: Operator, args: Args, kwargs: Kwargs) -> object:
    x = _first(args)
    if x is None or x.cut.dim is None or x.cut.dim >= x.dim() - 2:
        return NotImplemented
    return wrap(func(x.share, *args[1:], **kwargs), x.cut, x)


@rule(*operators("new_empty new_zeros new_ones new_full new_empty_strided"))
def new(func: Operator, args: Args, kwargs: Kwargs) -> object:
    """Only the type and the device of the tensor are looked at; its size is not that of the share."""
    x = args[0]
    if type(x) is not SplitTensor:
        return NotImplemented
    return SplitTensor(func(x.share, *args[1:], **kwargs), WHOLE, x.ranks)
