"""Gradients of shares, whose norms are those of whole gradients.

``torch.nn.utils.clip_grad_norm_`` is given parameters, and ``GradScaler`` an optimizer: nothing tells them that other
ranks hold other shares. So the gradients themselves do. All else that is computed with them, an optimizer's step for
one, is computed with the shares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tlgc_mp.parallel import collectives
from tlgc_mp.parallel.layout import Layout, Ranks
from tlgc_mp.parallel.signatures import Args, Function, Kwargs
from tlgc_mp.parallel.split_tensor import SplitTensor


class GradientShare(Tensor):
    """This rank's share of a gradient: a plain tensor but for what :data:`OF_WHOLE` computes of it.

    Attributes:
        cut: how the whole is cut.
        ranks: the ranks that hold it.
    """

    cut: Layout
    ranks: Ranks

    @classmethod
    def __torch_function__(cls, func: Function, types: object, args: Args = (), kwargs: Kwargs | None = None) -> object:
        replaced = OF_WHOLE.get(func)
        with torch._C.DisableTorchFunctionSubclass():
            if replaced is not None:
                return replaced(func, args, kwargs or {})
            made = func(*args, **(kwargs or {}))
            if func in _SAME and type(args[0]) is GradientShare and isinstance(made, Tensor):
                return args[0].mark(made)
            return made

    def mark(self, share: Tensor) -> GradientShare:
        """Another share, on its own memory, as one that is cut as this is."""
        return marked(share, self.cut, self.ranks)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, object]) -> object:
        return memo.setdefault(id(self), self.mark(self.as_subclass(Tensor).detach().clone()))


def marked(share: Tensor, cut: Layout, ranks: Ranks) -> GradientShare:
    """``share`` as a :class:`GradientShare`, on the same memory."""
    made = share.as_subclass(GradientShare)
    made.cut, made.ranks = cut, ranks
    return made


def mark_gradient(param: nn.Parameter, cut: Layout, ranks: Ranks) -> None:
    """Has each gradient of ``param``, a share, be a :class:`GradientShare` once a backward pass has added it up.

    Neither copy nor pickle of ``param`` keeps that.
    """

    def mark(param: Tensor) -> None:
        grad = param.grad
        if type(grad) is Tensor:
            param.grad = marked(grad, cut, ranks)

    trained = param.requires_grad
    param.requires_grad_()  # torch takes no hook of a frozen one, which may be trained later
    param.register_post_accumulate_grad_hook(mark)
    param.requires_grad_(trained)


# What is computed of the whole.

Replacement = Callable[[Function, Args, Kwargs], Any]


def _reduced(func: Function, args: Args, kwargs: Kwargs) -> object:
    """``func`` of the whole gradient: this rank's share of what comes out, where it is still cut."""
    if not args and "input" in kwargs:
        args, kwargs = (kwargs["input"],), {name: value for name, value in kwargs.items() if name != "input"}
    share, *rest = args
    if type(share) is not GradientShare or any(isinstance(value, Tensor) for value in (*rest, *kwargs.values())):
        return func(*args, **kwargs)  # element by element, as torch.max of two tensors
    of_whole = SplitTensor(share.as_subclass(Tensor), share.cut, share.ranks)
    return tree_map_only(SplitTensor, lambda made: made.share, func(of_whole, *rest, **kwargs))


def _norms(func: Function, args: Args, kwargs: Kwargs) -> list[Tensor]:
    """``torch._foreach_norm``, with one collective for all."""
    tensors = args[0]
    own: list[Tensor] = list(func(*args, **kwargs))
    order = float(args[1] if len(args) > 1 else kwargs.get("ord", 2))
    cut = [index for index, tensor in enumerate(tensors) if type(tensor) is GradientShare]
    ranks = tensors[cut[0]].ranks
    shares = torch.stack([own[index] for index in cut])
    total = norm_over_ranks(shares, order, ranks)
    for index, norm in zip(cut, total.unbind(), strict=True):
        own[index] = norm
    return own


def norm_over_ranks(shares: Tensor, order: float, ranks: Ranks) -> Tensor:
    """Norms of which each rank has that of its share, element by element. Collective."""
    if order == float("inf"):
        return collectives.all_reduce(shares, ranks, dist.ReduceOp.MAX)
    if order == float("-inf"):
        return collectives.all_reduce(shares, ranks, dist.ReduceOp.MIN)
    if order == 0:
        return collectives.all_reduce(shares, ranks)
    return collectives.all_reduce(shares.pow(order), ranks).pow(1 / order)


def _unscale(func: Function, args: Args, kwargs: Kwargs) -> None:
    """``GradScaler`` skips a step on all ranks, or on none."""
    tensors: Sequence[Tensor] = args[0]
    found: Tensor = args[1]
    func(*args, **kwargs)
    ranks = next(tensor.ranks for tensor in tensors if type(tensor) is GradientShare)
    found.copy_(collectives.all_reduce(found, ranks, dist.ReduceOp.MAX))


OF_WHOLE: dict[Function, Replacement] = {
    torch._foreach_norm: _norms,
    torch._amp_foreach_non_finite_check_and_unscale_: _unscale,
    **dict.fromkeys(
        (
            *(torch.norm, Tensor.norm, torch.linalg.norm, torch.linalg.vector_norm, torch.linalg.matrix_norm),
            *(torch.sum, Tensor.sum, torch.mean, Tensor.mean, torch.var, Tensor.var, torch.std, Tensor.std),
            *(torch.max, Tensor.max, torch.min, Tensor.min, torch.amax, Tensor.amax, torch.amin, Tensor.amin),
            *(torch.any, Tensor.any, torch.all, Tensor.all, torch.count_nonzero, Tensor.count_nonzero),
        ),
        _reduced,
    ),
}
"""Function of torch -> what it gives of gradients whose other shares are on other ranks. Collective, all of them."""

_DATA: Any = Tensor
_SAME = {
    *(Tensor.detach, Tensor.clone, torch.clone, _DATA.data.__get__, Tensor.float, Tensor.double, Tensor.to),
    *(torch.abs, Tensor.abs, torch.square, Tensor.square, torch.pow, Tensor.pow, Tensor.__pow__, Tensor.cpu),
    *(torch.isnan, Tensor.isnan, torch.isinf, Tensor.isinf, torch.isfinite, Tensor.isfinite),
}
"""What gives a share again, element by element."""
