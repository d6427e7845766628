"""What a DeepSpeed engine holds, by kind, at any ZeRO stage: the storages of its tensors, each counted once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tlgc_mp.engine.protocols import Engine

_MASTERS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
"""Where ZeRO keeps what the optimizer steps: at stages 1 and 2, at stage 3."""
_GRADIENTS = ("averaged_gradients", "all_grad_tensors", "accumulated_grads_in_cpu", "grad_partitions_flat_buffer")
"""Where ZeRO keeps gradients between backward and the optimizer's step, besides parameters' own."""


def engine_memory(engine: Engine, arriving: Tensor | None = None) -> dict[str, int]:
    """Bytes that ``engine`` holds on this rank now. A storage of two kinds counts to the first of them.

    Args:
        arriving: a gradient that backward is about to hand to its parameter.

    Returns:
        ``parameter_bytes``: of the model's parameters, whole or partitioned. ``state_bytes``: what the optimizer keeps
        from step to step. ``master_bytes``: ZeRO's copy of its partition of the parameters, which the optimizer steps.
        ``gradient_bytes``. ``bucket_bytes``: buffers in which ZeRO collects gradients to reduce. ``other_bytes``:
        whatever else ZeRO holds.
    """
    outer = engine.optimizer
    inner = getattr(outer, "optimizer", outer)
    parameters = list(engine.module.parameters())
    masters = [tensor for name in _MASTERS for tensor in getattr(outer, name, ())]
    partitions = [getattr(parameter, "ds_tensor", None) for parameter in parameters]
    gradients = [getattr(parameter, "grad_accum", None) for parameter in parameters]
    gradients += [tensor.grad for tensor in (*parameters, *masters)]
    buckets = [bucket.buffer for bucket in getattr(outer, "ipg_buckets", {}).values()]
    kinds: dict[str, Iterable[Tensor | None]] = {
        "bucket_bytes": _tensors(buckets),  # first: a gradient on its way is a view of one
        "parameter_bytes": (*parameters, *partitions),
        "state_bytes": _tensors(list(inner.state.values())),
        "master_bytes": masters,
        "gradient_bytes": (arriving, *gradients, *_tensors([getattr(outer, name, None) for name in _GRADIENTS])),
        "other_bytes": _tensors(outer) if outer is not inner else (),
    }
    counted: set[int] = set()
    held = dict.fromkeys(kinds, 0)
    for kind, tensors in kinds.items():
        for tensor in tensors:
            if tensor is None or tensor.is_meta:
                continue
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in counted:
                counted.add(storage.data_ptr())
                held[kind] += storage.nbytes()
    return held


def _tensors(owner: object) -> Iterator[Tensor]:
    """All tensors that ``owner`` holds, in containers and in objects of ZeRO's."""
    seen: set[int] = set()
    pending: list[object] = [owner]
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
            continue
        if isinstance(item, dict):
            pending.extend([*item.keys(), *item.values()])
        elif isinstance(item, (list, tuple, set, frozenset)):
            pending.extend(item)
        if type(item).__module__.startswith("deepspeed.runtime.zero") and hasattr(item, "__dict__"):
            pending.extend(vars(item).values())


@contextmanager
def peak_during_backward(
    parameters: Iterable[Tensor], measure: Callable[[Tensor], dict[str, int]]
) -> Iterator[dict[str, int]]:
    """The most that ``measure`` finds of each kind, asked as each gradient arrives at its parameter, while entered."""
    peak: dict[str, int] = {}

    def see(grad: Tensor) -> None:
        with torch.no_grad():
            for kind, found in measure(grad).items():
                peak[kind] = max(peak.get(kind, 0), found)

    handles = [parameter.register_hook(see) for parameter in parameters if parameter.requires_grad]
    try:
        yield peak
    finally:
        for handle in handles:
            handle.remove()
