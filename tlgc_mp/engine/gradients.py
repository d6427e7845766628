"""Gradients under ZeRO as torch has them: none is left from the step before, and none is lost.

ZeRO keeps gradients in buffers of its own and overwrites those of the parameters that get new ones. One that a pass
left out, a branch not taken or a layer that was skipped, would be stepped by its gradient of an earlier step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from deepspeed.runtime.base_optimizer import ZeROOptimizer
from torch import Tensor

from tlgc_mp.errors import UsageError


class _Forgetting:
    """What the class of an engine's ZeRO optimizer begins with."""

    tlgc_stepping = False
    tlgc_reduced = False
    """Whether the gradients of a step have been put together since the last one."""

    def step(self, *args: object, **kwargs: object) -> object:
        if _is_offloaded(self):
            # Of what the last micro-batch left out, those of the batches before it would stay behind.
            self.finalize_gradient_accumulation_boundary()  # type: ignore[attr-defined]
        self.tlgc_stepping = True
        try:
            done: object = super().step(*args, **kwargs)  # type: ignore[misc]
            return done
        finally:
            self.tlgc_stepping = False

    def zero_grad(self, *args: object, **kwargs: object) -> None:
        super().zero_grad(*args, **kwargs)  # type: ignore[misc]
        if self.tlgc_stepping:  # ZeRO 3 calls it before it uses what it keeps
            return
        self.tlgc_reduced = False
        for gradient in _kept(self):
            gradient.zero_()
        if _is_offloaded(self):
            self.norm_for_param_grads: dict[int, Tensor] = {}
            self._offload_accumulated_param_ids: set[int] = set()


def _is_offloaded(zero: object) -> bool:
    return bool(getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False))


def _kept(zero: object) -> list[Tensor]:
    """Where the ZeRO optimizer ``zero`` keeps gradients: of ZeRO 3, and of one whose state is offloaded."""
    kept = [getattr(zero, "grad_partitions_flat_buffer", None), *getattr(zero, "accumulated_grads_in_cpu", {}).values()]
    masters = (
        *getattr(zero, "single_partition_of_fp32_groups", ()),
        *getattr(zero, "fp32_partitioned_groups_flat", ()),
    )
    kept += [master.grad for master in masters if master is not None]
    return [gradient for gradient in kept if gradient is not None]


def forget_gradients(engine: Any) -> None:
    """Has the ZeRO optimizer of ``engine`` forget gradients when torch's do, at ``zero_grad`` and after a step."""
    kind: type = type(engine.optimizer)
    if issubclass(kind, ZeROOptimizer):
        engine.optimizer.__class__ = _forgetting(kind)


@functools.cache
def _forgetting(kind: type) -> type:
    return type(kind.__name__, (_Forgetting, kind), {"__module__": kind.__module__})


def once_a_step(epilogue: Callable[..., object]) -> Callable[..., object]:
    """An engine's ``_backward_epilogue`` that refuses to put the gradients of a step together a second time: at ZeRO 1
    and 2, DeepSpeed's forgets those of the first."""

    @functools.wraps(epilogue)
    def checked(engine: Any, *args: object, **kwargs: object) -> object:
        if _is_last_of_step(engine):
            if engine.optimizer.tlgc_reduced:
                raise UsageError(
                    "engine.backward must be called once before each engine.step at ZeRO 1 and 2, got a second call, "
                    "and the gradients of the first would be lost; add up the losses, or set "
                    '"managed_gradient_accumulation": false in the configuration'
                )
            engine.optimizer.tlgc_reduced = True
        return epilogue(engine, *args, **kwargs)

    return checked


def _is_last_of_step(engine: Any) -> bool:
    """Whether a backward pass that has ended puts the gradients of a step together, at ZeRO 1 and 2."""
    if not isinstance(engine.optimizer, _Forgetting) or engine.zero_optimization_stage() > 2:
        return False
    managed: bool = engine.managed_gradient_accumulation() and not engine.inside_no_sync_ctxt
    return managed and bool(engine.is_gradient_accumulation_boundary())
