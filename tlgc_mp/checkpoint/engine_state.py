"""Where a DeepSpeed engine keeps its weights and its optimizer's state, at every ZeRO stage.

Below ZeRO 1 each parameter is its own master copy and the key of its optimizer state. ZeRO 1 and 2 flatten each
parameter group and give each replica a range of it in fp32; ZeRO 3 flattens the ranges themselves. Either way a rank's
state is a number of *holders*, the tensors that the optimizer steps on, in which ranges of parameters lie.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tlgc_mp.checkpoint.folder import Scalar
from tlgc_mp.checkpoint.reader import Part
from tlgc_mp.engine.protocols import Engine
from tlgc_mp.errors import UsageError, must_be
from tlgc_mp.parallel.layout import WHOLE
from tlgc_mp.parallel.sharded import ShardedLayer, extra_state

COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
"""What an engine counts, by the names of its attributes."""

_MASTERS = {
    0: "param_groups",
    1: "single_partition_of_fp32_groups",
    2: "single_partition_of_fp32_groups",
    3: "fp32_partitioned_groups_flat",
}
"""Where the engine's optimizer keeps the master weights, at each ZeRO stage."""


@dataclass(frozen=True)
class Slot:
    """A range of one parameter's part, in this rank's care.

    Attributes:
        name: of the parameter in the module.
        part: what of the whole parameter this rank's replica holds.
        start, numel: the range, in elements of the flattened part.
        holder: the tensor that the optimizer steps on; ``None`` where the parameter is frozen.
        values: this range's master weights: a view, of the part's shape where it is whole and flat otherwise.
        offset: where the range begins in a flat holder; ``None`` where the holder is the parameter itself.
        group: the optimizer's parameter group.
    """

    name: str
    part: Part
    start: int
    numel: int
    holder: Tensor | None
    values: Tensor
    offset: int | None
    group: int | None


class EngineState:
    """The master weights, optimizer state and buffers that one rank of an engine holds.

    Args:
        engine: as :func:`tlgc_mp.initialize` or ``deepspeed.initialize`` returns it.

    Raises:
        UsageError: it is no engine, or its optimizer keeps its state in a way that is not known.
    """

    def __init__(self, engine: Engine) -> None:
        if not isinstance(getattr(engine, "module", None), nn.Module) or not hasattr(engine, "zero_optimization_stage"):
            raise must_be("engine", "the one that tlgc_mp.initialize returns", type(engine))
        self.engine = engine
        self.module: nn.Module = engine.module
        self.stage = int(engine.zero_optimization_stage())
        optimizer = engine.optimizer
        inner = optimizer if self.stage == 0 else getattr(optimizer, "optimizer", None)
        if not isinstance(inner, torch.optim.Optimizer) or not hasattr(optimizer, _MASTERS[self.stage]):
            raise UsageError(
                f"the engine's optimizer must be one whose state can be saved, got {type(optimizer).__name__} at ZeRO "
                f"{self.stage}; in bf16 or fp16 use ZeRO 1, 2 or 3, and leave out data_types.grad_accum_dtype"
            )
        self.optimizer = inner
        self.replicas = int(engine.dp_world_size)
        self.replica = int(dist.get_rank(engine.data_parallel_group)) if self.replicas > 1 else 0
        self.tensor_parallel = dist.get_world_size() // self.replicas
        self.tensor_rank = dist.get_rank() % self.tensor_parallel
        self.slots = list(self._slots())

    @property
    def groups(self) -> list[dict[str, object]]:
        """The optimizer's parameter groups."""
        return list(self.optimizer.param_groups)

    def parts(self) -> dict[str, Part]:
        """Name -> part, of every parameter and every persistent buffer of the module, each under its first name."""
        found = {}
        seen: set[int] = set()
        for prefix, module in self.module.named_modules():
            tensors = {**module._parameters, **module._buffers}
            for key, tensor in tensors.items():
                if tensor is None or key in module._non_persistent_buffers_set or id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                dim, segments = module.tlgc_placement.layout(key) if isinstance(module, ShardedLayer) else WHOLE
                index, count = (0, 1) if dim is None else (module.tp_index, module.tp_world_size)
                shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
                found[f"{prefix}.{key}" if prefix else key] = Part(shape, dim, index, count, segments)
        return found

    def buffers(self) -> dict[str, Tensor]:
        """Name -> every persistent buffer of the module."""
        names = self.parts().keys()
        return {name: buffer for name, buffer in self.module.named_buffers() if name in names}

    def extra_states(self) -> dict[str, object]:
        """Name of a module -> its extra state, of those that have one."""
        return {name: extra for name, part in self.module.named_modules() for extra in extra_state(part).values()}

    def schedule(self) -> bytes | None:
        """The state of the learning-rate schedule, for a file; ``None`` where there is none.

        Raises:
            UsageError: it has no state, or one that cannot be loaded safely.
        """
        scheduler = self.engine.lr_scheduler
        if scheduler is None:
            return None
        kind = type(scheduler).__name__
        for method in ("state_dict", "load_state_dict"):
            if not callable(getattr(scheduler, method, None)):
                raise UsageError(
                    f"lr_scheduler must have state_dict() and load_state_dict() to be saved, got {kind} without "
                    f"{method}; add it, or leave it out and step it in your own loop"
                )
        return saved_safely(kind, scheduler.state_dict())

    def states(self, slot: Slot) -> dict[str, Tensor]:
        """Key -> the part of the optimizer's state that belongs to a slot, as views of the same shape as its values."""
        if slot.holder is None:
            return {}
        return {
            key: value if slot.offset is None else value.flatten().narrow(0, slot.offset, slot.numel)
            for key, value in self.optimizer.state[slot.holder].items()
            if torch.is_tensor(value) and value.shape == slot.holder.shape and (value.dim() or key in self._keys())
        }

    def _keys(self) -> set[str]:
        """Of the optimizer's state, what has a value for each element of a parameter.

        A parameter of shape () does not tell that from a count of steps.
        """
        return {
            key
            for holder, state in self.optimizer.state.items()
            for key, value in state.items()
            if torch.is_tensor(value) and value.shape == holder.shape and value.dim() > 0
        }

    def scalars(self) -> tuple[list[dict[str, Scalar]], dict[str, dict[str, Scalar]]]:
        """What the optimizer keeps beside tensors of the parameters' shape: counts of steps.

        Returns:
            (for each parameter group, what most of its parameters have; by name, what others have)
        """
        keys = self._keys()
        found: list[dict[str, dict[str, Scalar]]] = [{} for _ in self.groups]
        for slot in self.slots:
            state = {} if slot.holder is None or slot.group is None else self.optimizer.state[slot.holder]
            own: dict[str, Scalar] = {}
            for key, value in state.items():
                scalar = value.item() if torch.is_tensor(value) and value.dim() == 0 else value
                if key not in keys and isinstance(scalar, (bool, int, float)):
                    own[key] = {"value": scalar, "tensor": torch.is_tensor(value)}
            if own and slot.group is not None:
                found[slot.group][slot.name] = own
        usual = [Counter(map(repr, group.values())).most_common(1) for group in found]
        apart: dict[str, dict[str, Scalar]] = {}
        scalars: list[dict[str, Scalar]] = []
        for group, most in zip(found, usual, strict=True):
            scalars.append(next((own for own in group.values() if repr(own) == most[0][0]), {}))
            apart |= {name: own for name, own in group.items() if own != scalars[-1]}
        return scalars, apart

    def make_states(
        self, keys: dict[str, list[str]], scalars: list[dict[str, Scalar]], apart: dict[str, dict[str, Scalar]]
    ) -> None:
        """Gives the holders state of the keys that each parameter has, zero where there is none, and those scalars."""
        for slot in self.slots:
            if slot.holder is None or slot.group is None or not keys.get(slot.name):
                continue
            state = self.optimizer.state[slot.holder]
            for key in keys[slot.name]:
                if not torch.is_tensor(state.get(key)):
                    state[key] = torch.zeros_like(slot.holder)
            own = apart.get(slot.name) if slot.offset is None else None
            for key, saved in (own or scalars[slot.group]).items():
                kept = state.get(key)
                if torch.is_tensor(kept):
                    kept.fill_(saved["value"])
                else:
                    state[key] = torch.tensor(float(saved["value"])) if saved["tensor"] else saved["value"]

    def publish(self) -> None:
        """Brings the weights that the module computes with in line with the master weights.

        Collective at ZeRO 1 and 2.
        """
        optimizer = self.engine.optimizer
        if self.stage in (1, 2):
            optimizer.update_lp_params()
        elif self.stage == 3:
            for flat, master in zip(
                optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True
            ):
                if master.numel() > 0:
                    flat.data.copy_(master.data)
            for flat, parameters in zip(
                optimizer.fp16_partitioned_groups_flat, optimizer.fp16_partitioned_groups, strict=True
            ):
                for parameter, values in zip(parameters, optimizer.unflatten(flat, parameters), strict=True):
                    parameter.data = values.data
            persistent = optimizer.persistent_parameters
            if len(persistent) > 0:
                persistent[0].partition(persistent)  # the next forward pass gathers them, as the first one does

    def _slots(self) -> Iterator[Slot]:
        parts = self.parts()
        group_of = {id(p): i for i, group in enumerate(self.optimizer.param_groups) for p in group["params"]}
        param: Any
        for name, param in self.module.named_parameters():
            part = parts[name]
            if self.stage == 3:
                yield from self._slot_at_stage_3(name, param, part)
            elif self.stage == 0 or not param.requires_grad:
                group = group_of.get(id(param))
                holder = param if group is not None and param.requires_grad else None
                yield Slot(name, part, 0, param.numel(), holder, param.data, None, group)
            elif getattr(param, "_hp_mapping", None) is not None:
                fragment: Any = param._hp_mapping
                holder = self.engine.optimizer.single_partition_of_fp32_groups[fragment.param_group_index]
                offset, numel = fragment.hp_fragment_address.start, fragment.hp_fragment_address.numel
                values = holder.data.narrow(0, offset, numel)
                start = fragment.lp_fragment_address.start
                yield Slot(name, part, start, numel, holder, values, offset, fragment.param_group_index)

    def _slot_at_stage_3(self, name: str, param: Any, part: Part) -> Iterator[Slot]:
        share = param.ds_tensor.numel()  # padded, so that all replicas hold as many
        start = share * self.replica
        numel = min(share, math.prod(part.shape) - start)
        if numel <= 0:
            return
        if not param.requires_grad:
            yield Slot(name, part, start, numel, None, param.ds_tensor.data.narrow(0, 0, numel), None, None)
            return
        optimizer = self.engine.optimizer
        subgroup, offset, _ = optimizer.grad_position[optimizer.get_param_id(param)]
        holder = optimizer.fp32_partitioned_groups_flat[subgroup]
        if optimizer.fp16_partitioned_groups_flat[subgroup] is None or optimizer._swappable_optimizer_subgroup(
            subgroup
        ):
            raise UsageError(
                "the optimizer's state must be in memory to be saved, got one that ZeRO 3 offloads to NVMe; offload "
                "it to the CPU"
            )
        values = holder.data.narrow(0, offset, numel)
        yield Slot(name, part, start, numel, holder, values, offset, optimizer.sub_group_to_group_id[subgroup])


def saved_safely(owner: str, state: object) -> bytes:
    """``state`` as torch saves it, where torch loads it again without running code of its."""
    content = io.BytesIO()
    try:
        torch.save(state, content)
        torch.load(io.BytesIO(content.getvalue()), weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError):  # a function inside another has no name to load it by
        raise UsageError(
            f"the state of {owner} must be numbers, tensors and containers, got Python objects, which would run code "
            "when they are loaded; have its state_dict() leave them out"
        ) from None
    return content.getvalue()
