"""Reading checkpoints into an engine of any split over ranks and any ZeRO stage."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tlgc_mp.checkpoint import folder as folders
from tlgc_mp.checkpoint.engine_state import COUNTERS, EngineState
from tlgc_mp.checkpoint.reader import CheckpointReader, Part
from tlgc_mp.engine.protocols import Engine
from tlgc_mp.errors import UsageError, is_count, told
from tlgc_mp.json_types import JsonObject

Item = TypeVar("Item")


def load_checkpoint(engine: Engine, path: str, replica_state: dict[str, Tensor] | None = None) -> JsonObject:
    """Loads a checkpoint into an engine of any split over ranks and any ZeRO stage. Collective.

    Weights, buffers, the extra state of modules, the optimizer's state, the learning-rate schedule and the engine's
    counts of steps. Every file is read once and held against its checksum before anything is loaded. No pickled code
    runs.

    Args:
        engine: of :func:`tlgc_mp.initialize`, over the same model and the same kind of optimizer.
        path: a checkpoint, or a folder of them: its newest.
        replica_state: tensors to fill with what each replica kept for itself; with the mean over the replicas where
            there were more or fewer of them.

    Returns:
        The ``client_state`` it was saved with.

    Raises:
        UsageError: there is no checkpoint, a file is damaged or missing, or the checkpoint is of another model or
            optimizer. On every rank.
    """
    state = EngineState(engine)
    ((folder, tag, names),) = all_or_none(lambda: [_found(path)])
    where = f"the checkpoint {os.path.join(folder, tag)!r}: "

    def check() -> list[CheckpointReader]:
        problem = folders.damage(folder, tag, names[dist.get_rank() :: dist.get_world_size()])
        if problem is not None:
            raise UsageError(f"{where}{problem}; {folders.offer(folder, tag)}")
        return [CheckpointReader(folder, tag)]

    (reader,) = all_or_none(check)

    def fill() -> list[None]:
        try:
            _fill(state, reader, replica_state or {})
        except Exception as error:  # whatever a checkpoint's contents may set off, every rank is to hear of it
            raise UsageError(f"{where}{told(error)}; {folders.offer(folder, tag)}") from error
        return []

    all_or_none(fill)
    state.publish()
    return dict(reader.description["client_state"])


def _found(path: str) -> tuple[str, str, list[str]]:
    """(folder, tag, names of the files) of the newest checkpoint in ``path``."""
    folder, tag = folders.find_checkpoint(path)
    return folder, tag, sorted(folders.read_description(folder, tag)["files"])


@torch.no_grad()
def _fill(state: EngineState, reader: CheckpointReader, replica_state: dict[str, Tensor]) -> None:
    saved = _described(reader.description, len(state.groups))
    if _family(saved["type"]) != _family(type(state.optimizer).__name__):
        raise UsageError(f"its optimizer must be {type(state.optimizer).__name__}, got {saved['type']}")
    parts = state.parts()
    buffers = state.buffers()
    for kind, wanted in (("weights", parts.keys() - buffers.keys()), ("buffers", buffers.keys())):
        if odd := sorted(wanted ^ set(reader.names(kind))):
            raise UsageError(f"it is of another model: only one of the two has {odd[0]}")
    keys: dict[str, list[str]] = {}
    for key, _, name in (entry.partition("/") for entry in reader.names("optimizer")):
        keys.setdefault(name, []).append(key)
    state.make_states(keys, saved["scalars"], saved["apart"])
    for slot in state.slots:
        for tensor, target in (
            (f"weights/{slot.name}", slot.values),
            *((f"optimizer/{key}/{slot.name}", state.states(slot)[key]) for key in keys.get(slot.name, ())),
        ):
            target.copy_(reader.read(tensor, slot.part, slot.start, slot.numel).view(target.shape))
    for name, buffer in buffers.items():
        buffer.copy_(reader.read_replicas(f"buffers/{name}", parts[name], state.replica, state.replicas))
    for name, target in replica_state.items():
        part = Part(tuple(target.shape), None, 0, 1)
        target.copy_(reader.read_replicas(f"replica/{name}", part, state.replica, state.replicas))
    for group, values in zip(state.groups, saved["groups"], strict=True):
        group.update({key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})
    engine = state.engine
    for name in COUNTERS:
        setattr(engine, name, reader.description["engine"][name])
    if engine.lr_scheduler is not None and folders.SCHEDULER in reader.description["files"]:
        path = os.path.join(reader.where, folders.SCHEDULER)
        engine.lr_scheduler.load_state_dict(torch.load(path, weights_only=True))
    if folders.EXTRA_STATE in reader.description["files"]:
        path = os.path.join(reader.where, folders.EXTRA_STATE)
        for name, extra in torch.load(path, weights_only=True).items():
            state.module.get_submodule(name).set_extra_state(extra)


def _described(description: folders.Description, groups: int) -> folders.OptimizerEntry:
    """The description of the optimizer, where that and the engine's counts are as they were written."""
    optimizer, engine = description.get("optimizer"), description.get("engine")
    if not isinstance(description.get("client_state"), dict):
        raise UsageError(f"its {folders.DESCRIPTION} has no client_state")
    if not isinstance(engine, dict) or not all(is_count(engine.get(name), 0) for name in COUNTERS):
        raise UsageError(f"its {folders.DESCRIPTION} does not count the engine's steps")
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("type"), str):
        raise UsageError(f"its {folders.DESCRIPTION} does not describe an optimizer")
    for key in ("groups", "scalars"):
        found = optimizer.get(key)
        if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
            raise UsageError(f"its {folders.DESCRIPTION} does not describe the optimizer's {key}")
        if len(found) != groups:
            raise UsageError(f"its optimizer must have {groups} parameter groups, got {len(found)}")
    apart = optimizer.setdefault("apart", {})
    if not isinstance(apart, dict) or not all(isinstance(each, dict) for each in apart.values()):
        raise UsageError(f"its {folders.DESCRIPTION} does not describe the optimizer's scalars")
    for scalars in (*optimizer["scalars"], *apart.values()):
        for key, scalar in scalars.items():
            if not isinstance(scalar, dict) or not isinstance(scalar.get("value"), bool | int | float):
                raise UsageError(f"its {folders.DESCRIPTION} does not give the optimizer's {key}")
    return optimizer


def _family(optimizer: str) -> str:
    """DeepSpeed's CPU and fused optimizers keep the state of the torch one that they compute."""
    name = optimizer.lower().removeprefix("deepspeed").removeprefix("fused").removeprefix("cpu")
    return "adam" if name in ("adam", "adamw") else name


def all_or_none(act: Callable[[], list[Item]]) -> list[Item]:
    """What ``act`` returns on this rank; where it raises UsageError on one of them, all raise it. Collective."""
    problems: list[str | None] = [None] * dist.get_world_size()
    problem: str | None = None
    result: list[Item] = []
    try:
        result = act()
    except UsageError as error:
        problem = str(error)
    dist.all_gather_object(problems, problem)
    for problem in filter(None, problems):
        raise UsageError(problem)
    return result
