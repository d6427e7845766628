"""Process groups of several engines in one process, each with a number of tensor-parallel ranks of its own.

DeepSpeed keeps its groups in globals of one module and reads some of them in every step. So each engine keeps the
values that it was made with, and puts them in place whenever it is used. Groups that
``torch.distributed.destroy_process_group`` has destroyed are forgotten, so that engines can be made again.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Concatenate, ParamSpec, TypeVar

import deepspeed.comm.comm as deepspeed_comm
import torch.distributed as dist
from deepspeed.utils import groups

from tlgc_mp.engine.gradients import once_a_step
from tlgc_mp.engine.protocols import Engine
from tlgc_mp.engine.schedules import take_model_step

_STATE = ("mpu", "mesh_device", "_TENSOR_MODEL_PARALLEL_GROUP", "_MODEL_PARALLEL_GROUP", "_DATA_PARALLEL_GROUP")
"""What differs from engine to engine."""
_ELSE = ("_WORLD_GROUP", "_ZERO_PARAM_INTRA_PARALLEL_GROUP")
_BY_NAME = (
    *("_EXPERT_PARALLEL_GROUP", "_EXPERT_PARALLEL_GROUP_RANKS", "_ALL_TO_ALL_GROUP"),
    *("_EXPERT_DATA_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP_RANKS"),
)

_ENTRIES = (
    *("forward", "backward", "step", "_backward_epilogue", "allreduce_gradients", "deepspeed_io"),
    *("save_checkpoint", "load_checkpoint", "save_16bit_model", "_consolidated_16bit_state_dict"),
    *("get_data_parallel_rank", "get_tensor_parallel_rank", "get_model_parallel_rank"),
)
"""Methods of an engine below which DeepSpeed reads its globals."""

_OWN = "own_groups"
"""The attribute of an engine that holds its values."""
P = ParamSpec("P")
T = TypeVar("T")
_forgotten = itertools.count(1)
_GROUPS_OF_A_LIFE = 1_000_000
"""More than are made between ``init_process_group`` and ``destroy_process_group``."""

_made: dict[int, dict[str, object]] = {}
"""Number of tensor-parallel ranks -> the groups of all engines that have as many."""


def forget_destroyed_groups() -> None:
    """Has DeepSpeed start anew if its process groups are gone."""
    cached = [*(getattr(groups, name) for name in (*_STATE[2:], *_ELSE)), *groups._EXPERT_PARALLEL_GROUP.values()]
    cached += [group for state in _made.values() for group in (state[name] for name in _STATE[2:])]
    if all(group is None or _is_alive(group) for group in cached):
        return
    _made.clear()
    vars(groups).update(dict.fromkeys((*_STATE, *_ELSE)))
    for name in _BY_NAME:
        getattr(groups, name).clear()
    deepspeed_comm.cdb = None
    # Torch numbers groups from 0 again. In a store that outlives them, torchrun's say, a rank could then read where
    # another one listened before.
    world = dist.distributed_c10d._world
    world.group_count = max(world.group_count, next(_forgotten) * _GROUPS_OF_A_LIFE)


def use_torchs_names() -> None:
    """Has DeepSpeed's communication layer call collectives by the names that torch has for them now: by those that it
    looks up itself, newer releases of torch warn on every rank that they are deprecated."""
    for attribute, name in (
        ("all_gather_function", "all_gather_single"),
        ("reduce_scatter_function", "reduce_scatter_single"),
    ):
        if hasattr(dist, name) and hasattr(deepspeed_comm.cdb, attribute):
            setattr(deepspeed_comm.cdb, attribute, getattr(dist, name))


def _is_alive(group: dist.ProcessGroup) -> bool:
    try:
        dist.get_process_group_ranks(group)
    except (KeyError, ValueError):
        return False
    return True


def enter_groups(ranks: int) -> ModuleType | None:
    """Puts the groups of engines of ``ranks`` tensor-parallel ranks in place, made if need be. Collective.

    Returns:
        What DeepSpeed takes for ``mpu``; ``None`` where every rank is a replica.
    """
    if ranks not in _made:
        vars(groups).update(dict.fromkeys(_STATE))
        if ranks > 1:
            groups._init_tp_mesh_device(tensor_model_parallel_size=ranks)
            groups.mpu = groups
        _made[ranks] = {name: getattr(groups, name) for name in _STATE}
    vars(groups).update(_made[ranks])
    return None if ranks == 1 else groups


def keep_groups(engine: Engine) -> None:
    """Has ``engine`` put the groups in place that are there now, whenever it is used."""
    vars(engine)[_OWN] = {name: getattr(groups, name) for name in _STATE}
    engine.__class__ = _in_own_groups(type(engine))


@functools.cache
def _in_own_groups(engine_class: type[Engine]) -> type[Engine]:
    entries: dict[str, object] = {
        name: _entry(getattr(engine_class, name)) for name in _ENTRIES if hasattr(engine_class, name)
    }
    entries["_backward_epilogue"] = once_a_step(_entry(engine_class._backward_epilogue))  # type: ignore[attr-defined]
    entries["_take_model_step"] = take_model_step(engine_class._take_model_step)
    return type(engine_class.__name__, (engine_class,), {**entries, "__module__": engine_class.__module__})


def _entry(method: Callable[Concatenate[Engine, P], T]) -> Callable[Concatenate[Engine, P], T]:
    def entered(engine: Engine, /, *args: P.args, **kwargs: P.kwargs) -> T:
        vars(groups).update(vars(engine)[_OWN])
        return method(engine, *args, **kwargs)

    functools.update_wrapper(entered, method)
    return entered
