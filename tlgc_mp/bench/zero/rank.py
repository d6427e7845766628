"""What one rank of ``tlgc-mp bench zero`` measures."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tlgc_mp.bench.ranks.launch import T
from tlgc_mp.bench.ranks.meters import before_first_optimizer_step
from tlgc_mp.bench.scaling.strategies import LEARNING_RATE, MOMENTUM, SEED
from tlgc_mp.bench.settings import IMAGE_SIZE, NUM_CLASSES
from tlgc_mp.bench.zero.sweep import (
    BOUNDED,
    OWN,
    STAGES,
    Case,
    Cases,
    Moments,
    Setting,
    TrainingEngine,
    ZeroMemory,
    bounds,
)
from tlgc_mp.engine import initialize
from tlgc_mp.engine.memory import engine_memory, peak_during_backward
from tlgc_mp.engine.protocols import Engine
from tlgc_mp.host import keep_freed_memory, return_freed_memory
from tlgc_mp.json_types import JsonObject
from tlgc_mp.models import create_model
from tlgc_mp.parallel.topology import Topology


def measure_rank(request: ZeroMemory, device: torch.device) -> Cases:
    """What this rank holds at each stage. Collective: all ranks are up already."""
    cases: list[Case] = []
    shares: list[int] = []  # of each parameter, what this rank holds; known from the first engine, without ZeRO
    for stage in STAGES:
        for name in (OWN, BOUNDED) if stage else (OWN,):
            zero = bounds(max(shares)) if name == BOUNDED else {}
            engine, step = training_engine(request, {"stage": stage, **zero}, device)
            shares = shares or [parameter.numel() for parameter in engine.module.parameters()]
            step()  # after which there is momentum
            case: Setting = {"stage": stage, "settings": name, "zero_optimization": zero, "parameters": sum(shares)}
            cases.append({**case, **_moments(engine, step)})
            del engine, step
            gc.collect()
    return {"cases": cases}


def training_engine(
    request: TrainingEngine[T], zero: dict[str, int], device: torch.device
) -> tuple[Engine, Callable[..., None]]:
    """An engine, and a training step of it, which calls what it is given between backward and the optimizer."""
    topology = Topology(dist.get_world_size(), dist.get_rank(), request.tensor_parallel)
    model = create_model(request.model, groups=request.groups, num_classes=NUM_CLASSES, device="meta")
    config: JsonObject = {
        "train_batch_size": request.batch_size,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }
    if topology.tensor_parallel > 1:
        config["tensor_parallel"] = {"autotp_size": topology.tensor_parallel}

    def optimizer(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=MOMENTUM)

    if device.type == "cpu":
        return_freed_memory() if zero["stage"] == 3 else keep_freed_memory()
    engine, *_ = initialize(model=model, optimizer=optimizer, config=config, seed=SEED)
    generator = torch.Generator().manual_seed(SEED + topology.dp_rank)
    count = request.batch_size // topology.data_parallel
    images = torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator).to(device)
    labels = torch.randint(0, NUM_CLASSES, (count,), generator=generator).to(device)

    def step(between: Callable[[], None] = lambda: None) -> None:
        engine.backward(F.cross_entropy(engine(images), labels))
        between()
        engine.step()

    return engine, step


def _moments(engine: Engine, step: Callable[..., None]) -> Moments:
    """What the engine holds in a step."""
    after_backward: dict[str, int] = {}
    at_step: dict[str, int] = {}
    parameters = list(engine.module.parameters())
    with (
        peak_during_backward(parameters, functools.partial(engine_memory, engine)) as in_backward,
        before_first_optimizer_step(lambda: at_step.update(engine_memory(engine))),
    ):
        step(lambda: after_backward.update(engine_memory(engine)))
    return {"in_backward": in_backward, "after_backward": after_backward, "at_step": at_step}
