"""Whether an optimizer computes the same of the shares of a parameter as of the whole.

SGD and Adam update each element from its own gradient. LARS, LAMB, Adafactor and Muon take norms, means or products of
whole parameters: on a rank that holds a share they would take those of the share, and train another network.
"""

from __future__ import annotations

import gc
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from tlgc_mp.errors import UsageError
from tlgc_mp.parallel.sharded import cut_parameters

_SHAPES = ((32, 48), (32, 32, 3, 3), (64,))
"""As large as those that are factored."""

_SCALES = (1.0, 0.01, 100.0)
"""Of the gradients, a step each: norms are clipped above a size, and floored below one."""

_TOLERANCE = 1e-3
"""Of the largest update; elements that are computed alike differ by rounding."""

Group: TypeAlias = dict[str, Any]
"""Of an optimizer's parameters, with their settings."""


def check_optimizers_over_shares(model: nn.Module, ranks: int) -> None:
    """:func:`check_elementwise` of every optimizer in this process that holds a share of ``model``.

    Nobody hands it over where a model is split without an engine, so it is looked for, which takes about 0.1 s.
    """
    shares = {id(param) for _, param in cut_parameters(model)}
    if not shares:
        return
    kinds = _kinds(Optimizer)
    found: Any
    for found in gc.get_objects():
        if type(found) not in kinds:
            continue
        groups = vars(found).get("param_groups", [])
        if any(id(param) in shares for group in groups for param in group["params"]):
            check_elementwise(found, ranks)


def _kinds(kind: type[Any]) -> set[type[Any]]:
    """``kind`` and every class that inherits from it."""
    return {kind}.union(*(_kinds(each) for each in kind.__subclasses__()))


def check_elementwise(optimizer: Optimizer, ranks: int) -> None:
    """Refuses an optimizer that would compute something else of shares, by trying it on small parameters of its own.

    Its state, its parameters and torch's random state stay as they are. One that does not step on such parameters
    passes.

    Raises:
        UsageError: the two halves of a parameter are not updated as the whole is, or at random.
    """
    for inner in vars(optimizer).values():
        if isinstance(inner, Optimizer):
            check_elementwise(inner, ranks)
    if hasattr(type(optimizer), "__del__"):  # a stand-in would end what it holds, as DeepSpeed's Adam on the CPU does
        return
    for group in optimizer.param_groups:
        for shape in _SHAPES:
            for dim in range(min(2, len(shape))):
                of_whole = isinstance(optimizer, LBFGS)  # which steps with a closure alone
                if of_whole or not _halves_are_updated_as_the_whole(optimizer, group, shape, dim):
                    raise UsageError(
                        f"optimizer must update each element by itself where {ranks} tensor-parallel ranks hold a "
                        f"share of each parameter, got {type(optimizer).__name__}, which takes norms or draws of "
                        "whole ones; use SGD, Adam or AdamW, say, or one rank, or give it the layers' weights"
                    )


def _halves_are_updated_as_the_whole(optimizer: Optimizer, group: Group, shape: tuple[int, ...], dim: int) -> bool:
    given = next((p for p in group["params"] if p.is_floating_point()), None)
    if given is None:
        return True
    device = "cpu" if given.is_meta else given.device
    generator = torch.Generator().manual_seed(0)
    value, *gradients = (
        torch.randn(shape, generator=generator).mul(scale).to(device, given.dtype) for scale in (1.0, *_SCALES)
    )
    for gradient in gradients:
        gradient.narrow(dim, 0, shape[dim] // 2).mul_(10)  # so that no figure of one half is that of the other
    try:
        whole = _update(optimizer, group, value, gradients)
        halves = [
            _update(optimizer, group, part[0], part[1:])
            for part in zip(*(tensor.chunk(2, dim) for tensor in (value, *gradients)), strict=True)
        ]
    except Exception:  # it wants something else of its parameters, and says so when it is used
        return True
    difference = (torch.cat(halves, dim) - whole).abs().max()
    return bool(difference <= _TOLERANCE * whole.abs().max())


def _update(optimizer: Optimizer, group: Group, value: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    """What a few steps of ``optimizer``, with the settings of ``group``, add to a parameter that it has alone."""
    parameter = torch.nn.Parameter(value.clone(memory_format=torch.contiguous_format))
    stand_in = object.__new__(type(optimizer))
    # A scheduler puts a step of its own, which is the optimizer's, into the instance.
    vars(stand_in).update({name: held for name, held in vars(optimizer).items() if name != "step"})
    vars(stand_in).update(state=defaultdict(dict), param_groups=[{**group, "params": [parameter]}])
    vars(stand_in).update(_optimizer_step_pre_hooks=OrderedDict(), _optimizer_step_post_hooks=OrderedDict())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for gradient in gradients:
            parameter.grad = gradient.clone(memory_format=torch.contiguous_format)
            stand_in.step()
    return parameter.detach() - value
