"""A tensor that looks whole and lies in shares over the tensor-parallel ranks.

Every operator that meets a :class:`SplitTensor` arrives here, below autograd. An operator with a rule (``rules.py``)
computes on the shares; any other gathers and computes on whole tensors, alike on every rank. So a network gives what it
gives on one device whatever its code does between layers; a missing rule costs time, never a wrong number.

No tensor is ever a partial sum: what ranks have to add up is added up at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, SupportsIndex, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from tlgc_mp.errors import UsageError
from tlgc_mp.parallel.containers import map_leaves
from tlgc_mp.parallel.families import Family, family_of, refresh
from tlgc_mp.parallel.layout import WHOLE, Layout, Ranks, change_segments, dense_share, gather_shares, whole_geometry
from tlgc_mp.parallel.signatures import Args, Context, Function, Geometry, Kwargs, Offset, Operator, Rule

T = TypeVar("T")
RULES: dict[Operator, Rule] = {}
"""Operator overload -> what computes it on shares, or gives ``NotImplemented`` for arguments that it does not know."""

FUNCTIONS: dict[Function, Callable[..., object]] = {}
"""Function of torch above its operators -> what to call in its place; ``NotImplemented`` leaves it to torch."""

observers: list[Callable[[Operator, str], None]] = []
"""Called with each operator and ``"shares"`` or ``"whole"``: how it was computed. Empty but for reports and tests."""

_make = torch.Tensor._make_wrapper_subclass
"""Of a tensor that every rank holds whole."""

_NO_MEMORY = "a split tensor has no memory of its own; use tlgc_mp.parallel.split_tensor.whole(tensor) first"


class SplitTensor(Tensor):
    """A whole tensor to all code that uses it, of which this rank holds its share.

    Attributes:
        share: a plain tensor: this rank's share, or all of it where ``cut.dim`` is ``None``.
        cut: which dimension is cut, and how.
        ranks: the tensor-parallel ranks.
        held: the plain parameter or buffer, this rank's share, that code has read from a layer as this tensor. What is
            asked of the tensor itself, its gradient, its hooks, is asked of that (``split_functions.py``).
        entered: version, share and plain share with which this tensor was last joined (``concatenation.py``).
    """

    share: Tensor
    cut: Layout
    ranks: Ranks
    family: Family | None = None
    held: Tensor | None = None
    entered: tuple[int, Tensor, Tensor] | None = None

    @staticmethod
    def __new__(
        cls,
        share: Tensor,
        layout: Layout,
        ranks: Ranks,
        geometry: Geometry | None = None,
        offset: Offset = 0,
    ) -> SplitTensor:
        if not share.shape:  # one value, which torch.tensor, for one, reads from memory
            made = torch.Tensor._make_subclass(cls, share)
            made.share, made.cut, made.ranks = share, layout, ranks
            return made
        shape, strides = geometry or whole_geometry(share, layout, ranks)
        made = _make(cls, shape, strides=strides, storage_offset=offset, dtype=share.dtype, device=share.device)
        made.share, made.cut, made.ranks = share, layout, ranks
        return made

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__()

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        # Never a collective: one rank alone may print.
        how = "whole" if self.cut.dim is None else f"dimension {self.cut.dim} over {self.ranks.size} ranks"
        return f"SplitTensor({tuple(self.shape)}, {self.dtype}, {how}, requires_grad={self.requires_grad})"

    @classmethod
    def __torch_function__(cls, func: Function, types: object, args: Args = (), kwargs: Kwargs | None = None) -> object:
        if func not in FUNCTIONS:
            return through_torch(func, args, kwargs)
        result = FUNCTIONS[func](*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs) if kwargs else func(*args)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Operator, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> Any:
        refresh((args, kwargs))
        rule = RULES.get(func) or _resolve(func)
        try:
            with torch._C.DisableTorchFunctionSubclass():  # autograd's thread has it enabled
                result = rule(func, args, kwargs or {})
                on_shares = result is not NotImplemented and rule is not whole_tensors.compute_whole
                if result is NotImplemented:
                    result = whole_tensors.compute_whole(func, args, kwargs or {})
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            raise whole_tensors.as_on_one_device(error, func, args, kwargs or {}) from None
        for observe in observers:
            observe(func, "shares" if on_shares else "whole")
        return result

    # What reads memory without an operator.
    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else super().__format__(spec)  # type: ignore[no-untyped-call]

    def numpy(self, *, force: bool = False) -> Any:
        """The whole tensor as a NumPy array that cannot be written to, since writes would not reach the shares."""
        array = whole(self.detach() if force else self).numpy(force=force)
        array.flags.writeable = False
        return array

    def __array__(self, dtype: object = None) -> object:
        return self.numpy() if dtype is None else self.numpy().astype(dtype)

    def tolist(self) -> Any:
        return whole(self.detach()).tolist()

    def __dlpack__(self, **options: Any) -> object:  # type: ignore[override]
        return whole(self.detach()).__dlpack__(**options)

    def data_ptr(self) -> NoReturn:
        raise RuntimeError(_NO_MEMORY)

    const_data_ptr = mutable_data_ptr = untyped_storage = data_ptr

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        plain = whole(self.detach()).clone()
        return plain.requires_grad_(self.requires_grad).__reduce_ex__(protocol)

    def __copy__(self) -> SplitTensor:
        return self.detach().requires_grad_(self.requires_grad)  # type: ignore[return-value]

    def __deepcopy__(self, memo: dict[int, object]) -> object:
        if not self.is_leaf:
            return Tensor.__deepcopy__(self, memo)  # type: ignore[no-untyped-call]  # raises as torch does
        return memo.setdefault(id(self), self.detach().clone().requires_grad_(self.requires_grad))


def through_torch(func: Function, args: Args, kwargs: Kwargs | None) -> Any:
    """Calls a function of torch's, with plain tensors that need gradients as split ones that are whole."""
    if torch.is_grad_enabled():
        for value in args if not kwargs else (*args, *kwargs.values()):
            kind = type(value)
            if kind is SplitTensor or kind is int or kind is float:
                continue
            if (isinstance(value, Tensor) and value.requires_grad) or (
                isinstance(value, list | tuple | dict) and _holds_plain(value)
            ):
                args, kwargs = split_functions.entered(func, args, kwargs or {})
                break
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs) if kwargs else func(*args)


def _holds_plain(tree: object) -> bool:
    if isinstance(tree, list | tuple) and all(type(item) is int or type(item) is SplitTensor for item in tree):
        return False  # sizes, strides, what is joined: the most frequent by far
    return any(type(t) is not SplitTensor and isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(tree))


def _resolve(func: Operator) -> Rule:
    """The rule of ``func``, looked up at its first use."""
    from tlgc_mp.parallel import rules

    RULES[func] = rules.rule_of(func) or whole_tensors.compute_whole
    return RULES[func]


def as_view(
    share: Tensor, layout: Layout, base: SplitTensor, offset: int | None = None, geometry: Geometry | None = None
) -> SplitTensor:
    """A view of ``base`` whose ``share`` is a view of its share: they share memory, and their family."""
    made = made_as_view(share, layout, base, base.storage_offset() if offset is None else offset, geometry)
    made.family = family_of(base)
    return made


def made_as_view(
    share: Tensor, layout: Layout, base: SplitTensor, offset: Offset, geometry: Geometry | None = None
) -> SplitTensor:
    """A view of ``base``, of which the family is still to be said."""
    if torch.is_inference_mode_enabled() and not base.is_inference():  # then neither is its view
        with torch.inference_mode(False):
            return SplitTensor(share, layout, base.ranks, geometry, offset)
    return SplitTensor(share, layout, base.ranks, geometry, offset)


def like(share: Tensor, model: SplitTensor) -> SplitTensor:
    """A SplitTensor of ``share``, which lies in memory as the share of ``model`` does. The fast way to make one."""
    made = _make(SplitTensor, model.shape, strides=model.stride(), dtype=share.dtype, device=share.device)
    made.share, made.cut, made.ranks = share, model.cut, model.ranks
    return made


class _Enter(torch.autograd.Function):
    """A plain tensor, alike on every rank -> a SplitTensor that holds it whole. Its gradient comes back plain."""

    @staticmethod
    def forward(ctx: Context, tensor: Tensor, ranks: Ranks) -> SplitTensor:  # type: ignore[override]
        ctx.set_materialize_grads(False)
        data = tensor.detach()
        if data.is_conj() or data.is_neg():
            return SplitTensor(data.resolve_conj().resolve_neg(), WHOLE, ranks)
        return SplitTensor(data, WHOLE, ranks, (tensor.shape, tensor.stride()), tensor.storage_offset())

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return whole(grad), None


class _Leave(torch.autograd.Function):
    """A SplitTensor -> the plain whole tensor, of which every rank computes the same."""

    @staticmethod
    def forward(ctx: Context, tensor: SplitTensor) -> Tensor:  # type: ignore[override]
        ctx.ranks = tensor.ranks
        ctx.set_materialize_grads(False)
        refresh(tensor)
        return gather_shares(tensor).detach()

    @staticmethod
    def backward(ctx: Context, grad: Tensor | None) -> Tensor | None:  # type: ignore[override]
        if grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad):
            raise UsageError("is_grads_batched and vectorize must be False of a split model, got True; take row by row")
        return grad if grad is None or type(grad) is SplitTensor else _Enter.apply(grad, ctx.ranks)


class _FromShare(torch.autograd.Function):
    """Each rank's share -> the SplitTensor."""

    @staticmethod
    def forward(ctx: Context, share: Tensor, layout: Layout, ranks: Ranks) -> SplitTensor:  # type: ignore[override]
        ctx.layout, ctx.ranks = layout, ranks
        ctx.set_materialize_grads(False)
        return SplitTensor(share.detach(), layout, ranks)

    @staticmethod
    def backward(ctx: Context, grad: Tensor | None) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        return None if grad is None else to_share(grad, ctx.layout, ctx.ranks), None, None


class _ToShare(torch.autograd.Function):
    """A SplitTensor, or a plain whole tensor -> this rank's share in the given layout, plain."""

    @staticmethod
    def forward(ctx: Context, tensor: Tensor, layout: Layout, ranks: Ranks) -> Tensor:  # type: ignore[override]
        ctx.layout, ctx.ranks = layout, ranks
        ctx.set_materialize_grads(False)
        refresh(tensor)
        return share_in(tensor, layout, ranks).detach()

    @staticmethod
    def backward(ctx: Context, grad: Tensor | None) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        if grad is None or torch.is_grad_enabled():
            return None if grad is None else _FromShare.apply(grad, ctx.layout, ctx.ranks), None, None
        return SplitTensor(grad.detach(), ctx.layout, ctx.ranks), None, None


def share_in(tensor: Tensor, layout: Layout, ranks: Ranks) -> Tensor:
    """This rank's share of ``tensor``, split or plain and whole, in ``layout``. Not differentiable."""
    if type(tensor) is SplitTensor:
        if tensor.cut == layout:
            return tensor.share
        if tensor.cut.dim is not None and tensor.cut.dim == layout.dim:
            return change_segments(tensor, layout)
        return dense_share(gather_shares(tensor), layout, ranks)
    return dense_share(tensor, layout, ranks)


def enter_ranks(tensor: Tensor, ranks: Ranks) -> SplitTensor:
    """A plain tensor that every rank holds alike, as a SplitTensor. Differentiable."""
    return _Enter.apply(tensor, ranks)  # type: ignore[no-any-return]


def from_share(share: Tensor, layout: Layout, ranks: Ranks) -> SplitTensor:
    """The SplitTensor of which each rank holds its ``share``. Differentiable."""
    return _FromShare.apply(share, layout, ranks)  # type: ignore[no-any-return]


def to_share(tensor: Tensor, layout: Layout, ranks: Ranks) -> Tensor:
    """This rank's share of ``tensor``, split or plain and whole, in ``layout``. Differentiable."""
    if not torch.is_grad_enabled() and type(tensor) is SplitTensor:  # as every parameter's gradient is
        refresh(tensor)
        return share_in(tensor, layout, ranks).detach()
    return _ToShare.apply(tensor, layout, ranks)  # type: ignore[no-any-return]


def enter_leaves(tree: T, ranks: Ranks) -> T:
    """``tree`` with every plain tensor in it that needs a gradient as a SplitTensor, as the whole of it."""
    if not torch.is_grad_enabled() or not _holds_plain(tree):
        return tree

    def enter(tensor: Tensor) -> Tensor:
        if type(tensor) is SplitTensor or not tensor.requires_grad or tensor.layout != torch.strided:
            return tensor
        return enter_ranks(tensor, ranks)

    return tree_map_only(Tensor, enter, tree)  # type: ignore[no-any-return]


def plain_gradient(grad: Tensor) -> Tensor | None:
    """A hook of a plain tensor: its gradient is plain, too."""
    return whole(grad) if type(grad) is SplitTensor else None


def split(tensor: Tensor, dim: int, ranks: Ranks) -> SplitTensor:
    """``tensor``, plain and alike on every rank, cut along ``dim``; kept whole where the ranks do not divide it.

    Differentiable; the gradient of ``tensor`` is plain and whole.
    """
    if tensor.dim() == 0 or tensor.shape[dim] == 0 or tensor.shape[dim] % ranks.size:
        return enter_ranks(tensor, ranks)
    layout = Layout(dim % tensor.dim(), None)
    return from_share(to_share(enter_ranks(tensor, ranks), layout, ranks).clone(), layout, ranks)


def whole(tree: T) -> T:
    """``tree`` with every :class:`SplitTensor` in it as a plain whole tensor. Collective, and differentiable."""
    return map_leaves(lambda leaf: _Leave.apply(leaf) if type(leaf) is SplitTensor else leaf, tree)


from tlgc_mp.parallel import concatenation, split_functions, whole_tensors  # noqa: E402, F401  (they need what stands above)
