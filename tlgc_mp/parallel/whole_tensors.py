"""Operators without a rule for shares: computed on whole tensors, alike on every rank.

What such an operator writes is computed on a whole copy, of which each rank keeps its share; a view that is none of the
shares holds whole data, and is kept like its base.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves, tree_map_only

from tlgc_mp.parallel.families import Family
from tlgc_mp.parallel.layout import WHOLE, Ranks, gather_shares, take_share
from tlgc_mp.parallel.signatures import Args, Kwargs, Operator
from tlgc_mp.parallel.split_functions import set_data
from tlgc_mp.parallel.split_tensor import SplitTensor, as_view, made_as_view


class _Facts(NamedTuple):
    """What the schema of an operator says."""

    written: tuple[int | str, ...]  # positions and names of arguments that it writes
    is_view: bool
    reshapes: bool  # in place


_FACTS: dict[Operator, _Facts] = {}
_SILENT_WRITES = {
    "aten::native_batch_norm": (3, 4),
    "aten::cudnn_batch_norm": (3, 4),
    "aten::miopen_batch_norm": (3, 4),
}
"""Operators that write arguments of which their schema does not say so."""
_SILENT_VIEWS = {"aten::_unsafe_view", "aten::unsafe_split", "aten::unsafe_split_with_sizes"}
"""Operators that return views of which their schema does not say so."""


def _facts(func: Operator) -> _Facts:
    if func not in _FACTS:
        schema = func._schema
        written: list[int | str] = list(_SILENT_WRITES.get(schema.name, ()))
        for index, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written.append(argument.name if argument.kwarg_only else index)
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        view = view or schema.name in _SILENT_VIEWS
        _FACTS[func] = _Facts(tuple(written), view, torch.Tag.inplace_view in func.tags)
    return _FACTS[func]


def compute_whole(func: Operator, args: Args, kwargs: Kwargs) -> object:
    """``func`` on whole tensors, alike on every rank."""
    facts = _facts(func)
    ranks = next(t.ranks for t in tree_leaves((args, kwargs)) if type(t) is SplitTensor)
    if facts.reshapes:
        return _reshape_in_place(func, args, kwargs)
    if facts.written:
        return _write_whole(func, args, kwargs, facts, ranks)
    plain_args, plain_kwargs = tree_map_only(SplitTensor, gather_shares, (args, kwargs))
    base = args[0] if args else None
    out = _call(func, plain_args, plain_kwargs)
    if not facts.is_view or type(base) is not SplitTensor:
        return tree_map_only(Tensor, lambda t: _whole_split(t, ranks), out)
    if base.cut.dim is None:  # a view of whole data is one of memory, too
        return tree_map_only(Tensor, lambda t: as_view(t, WHOLE, base, t.storage_offset()), out)

    def linked(index: int | None, share: Tensor) -> SplitTensor:
        def viewed(data: Tensor) -> Tensor:
            made = func(data, *plain_args[1:], **plain_kwargs)
            view: Tensor = made if index is None else made[index]
            return view

        made = made_as_view(share, WHOLE, base, share.storage_offset())
        made.family = Family()
        made.family.link(base, viewed, share)
        return made

    if isinstance(out, list | tuple):
        return type(out)(linked(index, share) for index, share in enumerate(out))
    return linked(None, out)


def _call(func: Operator, args: Args, kwargs: Kwargs) -> Any:
    """``func`` of plain tensors, as outside of a tensor subclass: there torch sees conjugates that it has only marked,
    which its own code makes of complex numbers."""
    if not any(isinstance(t, Tensor) and t.is_complex() for t in tree_leaves((args, kwargs))):
        return func(*args, **kwargs)
    keys = (torch._C.DispatchKey.Conjugate, torch._C.DispatchKey.Negative)
    before = [torch._C._dispatch_tls_is_dispatch_key_excluded(key) for key in keys]
    try:
        for key in keys:
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
        return func(*args, **kwargs)
    finally:
        for key, excluded in zip(keys, before, strict=True):
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, excluded)


def resolved(tensor: Tensor) -> Tensor:
    """``tensor``, without the marks of a conjugate or a negative that is still to be computed: operators below this
    package do not look at them any more."""
    if tensor.is_conj():
        tensor = torch.ops.aten.conj_physical(tensor.conj())
    return torch.ops.aten.neg(tensor._neg_view()) if tensor.is_neg() else tensor


def _whole_split(tensor: Tensor, ranks: Ranks) -> Tensor:
    """A result that is whole on every rank; a sparse one stays a plain tensor."""
    return SplitTensor(resolved(tensor), WHOLE, ranks) if tensor.layout == torch.strided else tensor


def _write_whole(func: Operator, args: Args, kwargs: Kwargs, facts: _Facts, ranks: Ranks) -> object:
    """An operator that writes some of its arguments: whole copies of these, and the shares written back."""
    copies: dict[int, tuple[SplitTensor, Tensor]] = {}

    def plain(tensor: SplitTensor) -> Tensor:
        if id(tensor) in copies:
            return copies[id(tensor)][1]
        return gather_shares(tensor)

    for key in facts.written:
        value = kwargs.get(key) if isinstance(key, str) else (args[key] if key < len(args) else None)
        for target in value if isinstance(value, list | tuple) else (value,):
            if type(target) is SplitTensor:
                copies[id(target)] = (target, gather_shares(target))
    plain_args, plain_kwargs = tree_map_only(SplitTensor, plain, (args, kwargs))
    out = _call(func, plain_args, plain_kwargs)
    origin: dict[int, Tensor] = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
    for target, copy in copies.values():
        origin[id(copy)] = target
        if copy.shape != target.shape:  # torch fits an empty output to its result
            set_data(target, SplitTensor(copy, WHOLE, ranks))
        elif target.cut.dim is not None:
            target.share.copy_(take_share(copy, target.cut, ranks))
        if target.family is not None:
            target.family.written()
    return tree_map_only(Tensor, lambda t: origin[id(t)] if id(t) in origin else _whole_split(t, ranks), out)


_VIEW_OVERLOADS = {"transpose": "int"}
"""Views of which the overload has another name than that of the form in place."""


def _reshape_in_place(func: Operator, args: Args, kwargs: Kwargs) -> object:
    """``squeeze_`` and the like: the view that the function without ``_`` makes takes the tensor's place."""
    target = args[0]
    if type(target) is not SplitTensor:
        return func(target, *tree_map_only(SplitTensor, gather_shares, args[1:]), **kwargs)
    name = func._schema.name.removeprefix("aten::").removesuffix("_")
    overload = getattr(getattr(torch.ops.aten, name, None), _VIEW_OVERLOADS.get(name, func._overloadname), None)
    if name == "resize_as" and target.shape == args[1].shape:
        return target
    if overload is None:
        raise RuntimeError(f"{func}: a split tensor cannot change its shape in place this way; use {name}()")
    before = as_view(target.share, target.cut, target, geometry=(target.shape, target.stride()))
    made = SplitTensor.__torch_dispatch__(overload, (), (before, *args[1:]), kwargs)
    with no_dispatch():
        func(*args, **kwargs)
    target.share, target.cut, target.family = made.share, made.cut, made.family
    return target


def as_on_one_device(error: Exception, func: Operator, args: Args, kwargs: Kwargs) -> Exception:
    """The error that ``func`` raises for whole tensors, of the shapes that its caller knows, and what is split."""
    if getattr(error, "_tlgc_mp_told", False):  # of an operator inside of another
        return error

    def shape_only(tensor: SplitTensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    def to_meta(tensor: Tensor) -> Tensor:
        return shape_only(tensor) if type(tensor) is SplitTensor else tensor.to("meta")

    try:
        func(*tree_map_only(Tensor, to_meta, args), **tree_map_only(Tensor, to_meta, kwargs))
    except type(error) as told:
        error = told
    except Exception:
        pass  # shapes alone say something else: what was raised first stands
    cut = next((t for t in tree_leaves((args, kwargs)) if type(t) is SplitTensor and t.cut.dim is not None), None)
    if cut is not None:
        where = f"[{func} of tensors that {cut.ranks.size} ranks hold in shares, along the channels]"
        error.args = (f"{error} {where}", *error.args[1:])
    error._tlgc_mp_told = True  # type: ignore[attr-defined]
    return error
