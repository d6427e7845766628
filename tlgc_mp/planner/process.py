"""What a process holds beside its tensors: what a rank measures for ``tlgc-mp plan --calibrate`` on a CPU."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypedDict

from tlgc_mp.bench.ranks.launch import Request

if TYPE_CHECKING:
    import torch

SMALL, LARGE = "wrn-10-1", "mobilenet_v2"
"""A network of next to nothing, and one of convolutions of many shapes."""
SIDE, IMAGES = {SMALL: 8, LARGE: 64}, 2


class MemoryFigures(TypedDict):
    """Bytes of a process that has trained and let go of all tensors: a network of next to nothing without ZeRO, then
    with it, and then one of convolutions of many shapes."""

    plain: int
    zero: int
    many_shapes: int


@dataclass(frozen=True)
class MemoryRequest(Request[MemoryFigures]):
    """What the ranks are asked."""

    measured_by: ClassVar[str] = "tlgc_mp.planner.process:measure_memory"


def measure_memory(request: MemoryRequest, device: torch.device) -> MemoryFigures:
    """Of this rank. Collective."""
    from tlgc_mp.host import return_freed_memory

    return_freed_memory()
    return {"plain": _left(SMALL, 0), "zero": _left(SMALL, 1), "many_shapes": _left(LARGE, 0)}


def _left(name: str, stage: int) -> int:
    """Bytes of this process after a step of an engine that is gone."""
    import psutil
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F

    from tlgc_mp.engine import initialize
    from tlgc_mp.models import create_model

    config = {
        "train_batch_size": IMAGES * dist.get_world_size(),
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    model = create_model(name, groups=2, num_classes=10, device="meta")
    engine, *_ = initialize(model=model, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), config=config)
    images = torch.zeros(IMAGES, 3, SIDE[name], SIDE[name]).to(memory_format=torch.channels_last)
    engine.backward(F.cross_entropy(engine(images), torch.zeros(IMAGES, dtype=torch.long)))
    engine.step()
    del engine, model, images
    gc.collect()
    return int(psutil.Process().memory_info().rss)
