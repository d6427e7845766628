"""What a rank holds at the moments of a step when it may hold the most, under ZeRO at any stage.

The activations are those of a trace; what ZeRO holds beside them is as :mod:`tlgc_mp.bench.zero` measures it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import nn

from tlgc_mp.json_types import JsonObject
from tlgc_mp.planner.trace import Trace, recorded_step

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

MASTER = 4
"""Bytes of an element of what the optimizer steps under ZeRO, and of its gradient: float32."""

KINDS = ("parameters", "gradients", "optimizer", "activations", "copies", "workspace")
"""Of memory."""

REDUCED_AT_ONCE = 500_000_000
"""Elements after which the engine, without ZeRO, reduces what it has flattened of the gradients."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank by kind at the moment when it holds the most, beside a process's fixed part.

    Attributes:
        moment: ``start``, ``backward``, ``reduction`` or ``optimizer``.
        parameters: with buffers, whole or partitioned.
        gradients: that have arrived.
        optimizer: what the optimizer keeps, and the float32 copy that it steps under ZeRO.
        activations: kept for backward, temporary tensors and the batch.
        copies: buckets, flattened gradients, and parameters that ZeRO gathers.
        workspace: what the process keeps to compute convolutions.
    """

    moment: str
    parameters: float
    gradients: float
    optimizer: float
    activations: float
    copies: float
    workspace: float = 0.0

    @property
    def total(self) -> float:
        return float(sum(getattr(self, kind) for kind in KINDS))

    def to_dict(self) -> dict[str, float]:
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class Optimizer:
    """What an optimizer takes beside the parameters and their gradients.

    Attributes:
        state: bytes that it keeps from step to step.
        temporary: bytes that a step takes beside.
        moved: bytes that a step reads and writes.
    """

    state: float
    temporary: float
    moved: float


@dataclass(frozen=True)
class Share:
    """How ZeRO shares what a tensor-parallel rank holds.

    Attributes:
        stage: 0 to 3.
        replicas: D.
        bucket: elements that are reduced at once, in stages 1 to 3, and stepped at once in stage 3.
        offload: whether optimizer and float32 copy lie in the host's memory.
    """

    stage: int
    replicas: int
    bucket: int
    offload: bool = False

    def settings(self) -> JsonObject:
        """The section ``zero_optimization`` of a DeepSpeed configuration."""
        if self.stage == 0:
            return {"stage": 0}
        found: JsonObject = {
            "stage": self.stage,
            "reduce_bucket_size": self.bucket,
            "allgather_bucket_size": self.bucket,
        }
        if self.stage == 3:
            found |= {
                "sub_group_size": self.bucket,
                "stage3_max_live_parameters": self.bucket,
                "stage3_max_reuse_distance": 0,
                "stage3_prefetch_bucket_size": 0,
                "stage3_param_persistence_threshold": 0,
            }
        if self.offload:
            found["offload_optimizer"] = {"device": "cpu"}
        return found


def partition(elements: int, replicas: int) -> int:
    return -(-elements // replicas)


def sub_groups(sizes: tuple[int, ...], share: Share) -> list[int]:
    """Elements of a replica in each of the groups of parameters that stage 3 steps one after the other."""
    parts = [partition(size, share.replicas) for size in sizes]
    found, filled = [], 0
    for part in parts:
        filled += part
        if filled >= share.bucket:
            found.append(filled)
            filled = 0
    return [*found, filled] if filled else found


@functools.lru_cache(maxsize=1024)
def optimizer_of(make: MakeOptimizer, sizes: tuple[int, ...], item: int, by_lists: bool) -> Optimizer:
    """What the optimizer takes for parameters of ``sizes`` elements, from a step of it on the meta device.

    Args:
        item: bytes of an element.
        by_lists: whether it steps all parameters at once, as torch's do on accelerators.
    """
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[item]
    params = [nn.Parameter(torch.empty(size, dtype=dtype, device="meta")) for size in sizes]
    optimizer = make(params)
    for group in optimizer.param_groups:
        if group.get("foreach", True) is None:
            group["foreach"] = by_lists
    for param in params:
        param.grad = torch.empty_like(param)
    optimizer.step()  # after which there is state
    states = [value for state in optimizer.state.values() for value in state.values()]
    tensors = [value for value in states if isinstance(value, torch.Tensor)]
    temporary, moved = recorded_step(optimizer.step, [*params, *tensors])
    return Optimizer(sum(tensor.nbytes for tensor in tensors), temporary, moved)


def holdings(trace: Trace, share: Share, accumulation: int, make: MakeOptimizer, on_accelerator: bool) -> Memory:
    """What a rank holds at the moment when it holds the most."""
    return max(moments(trace, share, accumulation, make, on_accelerator), key=lambda memory: memory.total)


def moments(trace: Trace, share: Share, accumulation: int, make: MakeOptimizer, on_accelerator: bool) -> list[Memory]:
    """What a rank holds at each moment at which it may hold the most."""
    item, elements, stage, replicas = trace.item, trace.parameters, share.stage, share.replicas
    largest = max(trace.sizes)
    part = partition(elements, replicas) if stage else elements
    other = trace.frozen + trace.buffers
    whole = item * elements + other
    parameters = whole if stage < 3 else item * sum(partition(size, replicas) for size in trace.sizes) + other
    stepped = trace.sizes if stage == 0 else (max(sub_groups(trace.sizes, share)),) if stage == 3 else (part,)
    kept = optimizer_of(make, stepped, item if stage == 0 else MASTER, on_accelerator)
    state = kept.state if stage < 3 else kept.state * part / stepped[0]
    optimizer = state + (MASTER * part if stage else 0)
    if share.offload:
        optimizer = 0.0
    batch = float(trace.live[0]) if len(trace.live) else 0.0
    bucket = 0
    if stage:  # on a CPU what is never touched takes no memory
        bucket = item * (share.bucket if on_accelerator else min(share.bucket, elements))
    gathered = item * largest if stage == 3 else 0

    arrived = trace.arrived
    if stage == 3:
        gradients = item * arrived / replicas
    elif stage == 2:
        gradients = item * np.minimum(arrived, min(part + largest, elements))
    else:
        gradients = item * arrived
    if accumulation > 1:
        gradients = np.full_like(trace.live, item * (part if stage > 1 else elements))
    worst = int(np.argmax(gradients + trace.live))
    held = float(gradients[-1])
    found = [
        Memory(
            "backward",
            parameters,
            float(gradients[worst]),
            optimizer,
            float(trace.live[worst]),
            gathered + (bucket if stage > 1 else 0),
        )
    ]
    if stage == 0 and replicas > 1:
        found.append(Memory("reduction", parameters, held, optimizer, batch, item * min(elements, REDUCED_AT_ONCE)))
    if stage == 1:
        found.append(Memory("reduction", parameters, held, optimizer, batch, bucket))
    if stage == 0:
        found.append(Memory("optimizer", parameters, held, optimizer, batch, kept.temporary))
    else:
        flat = 0 if share.offload else MASTER * (part if stage < 3 else stepped[0])
        border = min(part + largest, elements) if stage < 3 and replicas > 1 else part
        always = bucket if stage == 3 else 0
        found.append(Memory("optimizer", parameters, item * border, optimizer, batch, flat + always))
        left = 0 if stage < 3 else item * part
        temporary = 0 if share.offload else kept.temporary
        found.append(Memory("optimizer", parameters, left, optimizer, batch, flat + always + temporary))
    if stage in (1, 2):
        found.append(Memory("start", whole, 0, optimizer, 0, item * elements))
    if stage == 3:
        found.append(Memory("start", whole, 0, optimizer, 0, parameters))
    return found
