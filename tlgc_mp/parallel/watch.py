"""Refuses what a plan cannot see: a forward pass that joins, cuts or reduces split channels between layers.

A plan reads layers. What a model's own code does between them is mostly the same for a share of the channels as for
all: adding, activations, pooling. But two shares joined are no share of the two whole tensors joined, so a DenseNet
would run, and compute something else. The first forward pass of a split model is watched for the usual ones; later
passes cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from tlgc_mp.errors import UsageError
from tlgc_mp.parallel.layers import RowParallelLinear, ShardedLayer

_DIM_AT = {
    **dict.fromkeys(("cat", "concat", "concatenate"), 1),
    **dict.fromkeys(("chunk", "split", "tensor_split"), 2),
    **dict.fromkeys(("narrow", "select", "index_select", "unbind"), 1),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "max", "min", "softmax", "log_softmax"), 1),
}
"""Name of a function -> the place of its argument ``dim``."""

_WATCHED: dict[Any, int] = {
    getattr(owner, name): place
    for owner in (torch, Tensor, functional)
    for name, place in _DIM_AT.items()
    if hasattr(owner, name)
}

_ALWAYS_MIX = (torch.channel_shuffle, functional.pixel_shuffle, functional.pixel_unshuffle)


def watch_first_pass(model: nn.Module) -> None:
    """Has the first forward pass of ``model``, which is split, raise :class:`UsageError` where it mixes channels."""
    _Watch(model)


class _Watch(TorchFunctionMode):
    """Sees every torch function between the layers, by way of hooks that leave with the first pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.names = {module: name for name, module in model.named_modules()}
        self.inside: list[nn.Module] = []
        self.split = False
        self.hooks = [module.register_forward_pre_hook(self.enter) for module in self.names]
        self.hooks += [module.register_forward_hook(self.leave, always_call=True) for module in self.names]

    def enter(self, module: nn.Module, inputs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if module is self.model:
            self.__enter__()
        self.inside.append(module)
        if isinstance(module, RowParallelLinear):
            self.split = False

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self.inside.pop()
        if isinstance(module, ShardedLayer) and not isinstance(module, RowParallelLinear):
            self.split = True
        if module is self.model:
            self.__exit__(None, None, None)
            for hook in self.hooks:
                hook.remove()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.split and not isinstance(self.inside[-1], ShardedLayer) and _mixes(func, args, kwargs):
            name = self.names[self.inside[-1]] or "the model"
            raise UsageError(
                f"{name}: {func.__name__} along the channels gives something else where they are split over ranks; "
                "use a model without, or tensor_parallel=1"
            )
        return func(*args, **kwargs)


def _mixes(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the call joins, cuts, reduces or reorders the second dimension of a tensor."""
    if func in _ALWAYS_MIX:
        return True
    if func is Tensor.__getitem__:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        plain = args[0].dim() == 4 and not any(part is None or part is Ellipsis for part in index[:2])
        return plain and len(index) > 1 and index[1] != slice(None)
    if func not in _WATCHED:
        return False
    place = _WATCHED[func]
    dims = kwargs.get("dim", args[place] if len(args) > place else None)
    tensor = args[0] if args else kwargs.get("input", kwargs.get("tensors"))
    tensor = tensor[0] if isinstance(tensor, list | tuple) else tensor
    if not isinstance(tensor, Tensor) or tensor.dim() < 2:
        return False
    dims = dims if isinstance(dims, list | tuple) else (dims,)
    return any(isinstance(dim, int) and dim % tensor.dim() == 1 for dim in dims)
