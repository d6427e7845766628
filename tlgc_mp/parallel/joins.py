"""Parameters that lie as the joined channels they meet.

Channels that were joined, as ``torch.cat`` does, lie over the ranks as a row of segments. A normalization or a
row-parallel convolution that follows has its parameters in another order, and sends them at each use. Where a sample
of the inputs is given, one pass on the meta device tells who will meet what, and its parameters are cut that way once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tlgc_mp.errors import UsageError
from tlgc_mp.parallel import layout
from tlgc_mp.parallel.meta_pass import copy_on_meta, run_on_meta
from tlgc_mp.parallel.plan import Placement, channels_stay_apart


def fit_joins(model: nn.Module, placements: dict[str, Placement], ranks: int, inputs: object) -> dict[str, Placement]:
    """The placements, with the segments that each layer's parameters are needed in.

    Args:
        model: a one-device model. It is left as it is; a copy's code runs once.
        placements: by :func:`~tlgc_mp.parallel.plan.plan`.
        ranks: P.
        inputs: a tensor, or a tuple of what ``model`` takes. Only shapes and types are looked at.

    Raises:
        UsageError: the code of ``model`` reads values of tensors, which the meta device has not.
    """
    if ranks == 1 or channels_stay_apart(model):
        return placements
    twin = copy_on_meta(model, ranks, placements)
    found: dict[str, tuple[int, ...] | None] = {}
    inside: list[str] = [""]

    def note(needed: layout.Layout) -> None:
        found.setdefault(inside[-1], needed.segments)

    def enter(name: str) -> Callable[[nn.Module, object], None]:
        return lambda module, args: inside.append(name)

    for name, module in twin.named_modules():
        module.register_forward_pre_hook(enter(name))
        module.register_forward_hook(lambda module, args, output: inside.pop() and None, always_call=True)
    layout.segments_changed.append(note)
    try:
        with torch.no_grad():
            run_on_meta(twin, inputs)
    finally:
        layout.segments_changed.remove(note)
    shared = _held_twice(model)
    return {
        name: replace(placement, segments=found[name])
        if _fits(model.get_submodule(name), placement, found.get(name), ranks, shared)
        else placement
        for name, placement in placements.items()
    }


def _held_twice(model: nn.Module) -> set[int]:
    """Ids of the parameters and buffers that two layers hold."""
    seen: set[int] = set()
    twice: set[int] = set()
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                (twice if id(tensor) in seen else seen).add(id(tensor))
    return twice


def _fits(
    module: nn.Module, placement: Placement, segments: tuple[int, ...] | None, ranks: int, shared: set[int]
) -> bool:
    """Whether every cut parameter of a layer can be cut into these pieces."""
    if segments is None or placement.segments is not None or any(piece % ranks for piece in segments):
        return False
    for name, dim in placement.dims.items():
        tensor = getattr(module, name)
        if id(tensor) in shared or not isinstance(tensor, Tensor) or tensor.shape[dim] != sum(segments):
            return False
    return bool(placement.dims)


def agreed_joins(
    model: nn.Module, placements: dict[str, Placement], inputs: object, groups: list[dist.ProcessGroup]
) -> dict[str, Placement]:
    """:func:`fit_joins`, as it came out on the first rank of ``groups[0]``; the placements as they are, with a
    warning, where the model cannot be run on the meta device or with these inputs. Collective over each of ``groups``.

    Raises:
        UsageError: it came out otherwise on another rank.
    """
    try:
        fitted = fit_joins(model, placements, dist.get_world_size(groups[0]), inputs)
    except Exception as error:  # whatever the model's code raises: the numbers do not depend on it
        reason = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
        warnings.warn(f"sample_inputs are of no use: {reason}", stacklevel=3)
        fitted = placements
    own = {name: placement.segments for name, placement in fitted.items()}
    for group in groups:
        every: list[object] = [None] * dist.get_world_size(group)
        dist.all_gather_object(every, own, group=group)
        if any(theirs != every[0] for theirs in every):
            raise UsageError("sample_inputs must be of the same shapes on every rank, got others; give all ranks alike")
    return fitted
