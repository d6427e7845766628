"""Parameters that ZeRO 3 has partitioned: outside of a pass they are empty, and code would compute with nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tlgc_mp.errors import UsageError
from tlgc_mp.parallel.signatures import Args, Function, Kwargs


class Partitioned(Tensor):
    """What code reads of such a parameter. It says what it is, and nothing can be computed with it.

    Attributes:
        place: the parameter, in words.
    """

    place: str

    @classmethod
    def __torch_function__(cls, func: Function, types: object, args: Args = (), kwargs: Kwargs | None = None) -> object:
        if func in _SAID:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        place = next((vars(tensor)["place"] for tensor in args if type(tensor) is Partitioned), "a parameter")
        raise UsageError(
            f"{place} must be read within a pass of the model at ZeRO 3, got it partitioned; read it within "
            "deepspeed.zero.GatheredParameters(list(model.parameters()))"
        )


_TENSOR: Any = Tensor
_SAID = {
    getattr(_TENSOR, name).__get__
    for name in ("requires_grad", "dtype", "device", "layout", "is_leaf", "is_meta", "is_cuda", "grad", "grad_fn")
}


def is_partitioned(param: Tensor) -> bool:
    """Whether the values of ``param`` are elsewhere."""
    return not param.numel() and getattr(param, "ds_numel", 0) > 0


def partitioned(param: Tensor, module: nn.Module, name: str) -> Partitioned:
    """What code reads of ``param``, of which :func:`is_partitioned` holds."""
    made = param.detach().requires_grad_(param.requires_grad).as_subclass(Partitioned)
    made.place = f"{name} of a split {type(module).__name__}"
    return made
