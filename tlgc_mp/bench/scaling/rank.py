"""What one rank of ``tlgc-mp bench scaling`` and ``bench bandwidth`` measures."""

from __future__ import annotations

import gc
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator

from tlgc_mp.bench.ranks import meters
from tlgc_mp.bench.ranks.accounting import profile_step
from tlgc_mp.bench.scaling import strategies
from tlgc_mp.bench.scaling.strategies import Workload
from tlgc_mp.bench.settings import WARM_UP_STEPS, CoreFigures, CoreRate, InstrumentedFigures, Memory, StepFigures, Steps
from tlgc_mp.engine.start import barrier
from tlgc_mp.host import keep_freed_memory

CORE_RATE_SHAPES = ((128, 32, 16), (256, 16, 16), (320, 32, 4), (640, 16, 4), (1280, 8, 4))
"""Channels in and out, image size and images of the convolutions of which the fastest counts."""
CORE_RATE_REPEATS = 3
ACCELERATOR_IMAGES = 32
"""Times as many images on an accelerator, which a batch for a core would leave idle."""


def measure_steps(request: Steps, device: torch.device) -> StepFigures:
    """What a training step costs this rank. Collective: all ranks are up already."""
    accelerator = get_accelerator()
    if device.type == "cpu" and request.strategy != "zero3":
        keep_freed_memory()
    meters.reset_peak_memory(device)
    work = strategies.build(request, dist.get_world_size(), dist.get_rank(), device)
    for _ in range(WARM_UP_STEPS):
        work.step()
    gc.collect()
    seconds, busy = [], []
    sent_before = meters.network_bytes()
    for _ in range(request.steps):
        wall_began, cpu_began = _together()
        work.step()
        accelerator.synchronize()
        seconds.append(time.perf_counter() - wall_began)
        busy.append(time.process_time() - cpu_began)
    barrier()
    sent = meters.network_bytes() - sent_before
    return {
        "seconds": seconds,
        "busy_cpu_seconds": busy,
        "network_bytes": sent / request.steps,
        "flops": work.flops,
        "peak_memory_bytes": meters.peak_memory_bytes(device),
        **_instrumented_step(work),
    }


def measure_core_rate(request: CoreRate, device: torch.device) -> CoreFigures:
    """How fast this rank's convolutions can be, and on what. Collective."""
    if device.type == "cpu":
        keep_freed_memory()
    return {
        "best_flops_per_second": _core_rate(device, request.dtype),
        "device": _device_name(device),
        "device_memory_bytes": None if device.type == "cpu" else int(get_accelerator().available_memory()),
    }


def _together() -> tuple[float, float]:
    """(wall clock, CPU seconds of this process) as all ranks are about to go on together."""
    get_accelerator().synchronize()
    barrier()
    return time.perf_counter(), time.process_time()


def _instrumented_step(work: Workload) -> InstrumentedFigures:
    """Steps with meters that would slow the timed ones."""
    held: list[Memory] = []
    saved = meters.SavedActivations(list(work.model.parameters()))
    clock = meters.CollectiveClock()
    _together()
    with clock, saved, meters.before_first_optimizer_step(lambda: held.append(work.memory())):
        work.step()
        get_accelerator().synchronize()
    collectives = clock.by_kind()
    _together()
    accounting, busy_device_seconds = profile_step(work.step)
    return {
        "accounting": accounting,
        "busy_device_seconds": busy_device_seconds,
        "collectives": collectives,
        "collective_seconds": clock.seconds(),
        "collective_bytes": sum(traffic["bytes"] for traffic in collectives.values()),
        "coarse_seconds": clock.seconds(work.coarse_kinds, work.coarse_groups),
        "activation_bytes": saved.peak_bytes,
        **held[0],
    }


def _device_name(device: torch.device) -> str | None:
    """Of an accelerator; ``None`` for the CPU."""
    if device.type == "cpu":
        return None
    named = getattr(torch.get_device_module(device), "get_device_name", None)
    return named(device) if named is not None else device.type


def _core_rate(device: torch.device, dtype: str) -> float:
    """The best rate, in FLOP/s, of a dense 3x3 convolution forward and backward, channels_last, all ranks at once."""
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    best = 0.0
    for channels, size, batch_size in CORE_RATE_SHAPES:
        batch_size *= 1 if device.type == "cpu" else ACCELERATOR_IMAGES
        x = torch.randn(batch_size, channels, size, size, device=device, dtype=kind)
        weight = torch.randn(channels, channels, 3, 3, device=device, dtype=kind)
        x, weight = (t.to(memory_format=torch.channels_last).requires_grad_() for t in (x, weight))
        grad = torch.randn_like(x, requires_grad=False)
        flops = 3 * 2 * weight.numel() * batch_size * size**2
        barrier()
        for _ in range(CORE_RATE_REPEATS):
            began = time.perf_counter()
            output = F.conv2d(x, weight, padding=1)
            sums = torch.autograd.grad(output, (x, weight), grad)
            sums[1].flatten()[0].item()  # has arrived, on an accelerator too
            best = max(best, flops / (time.perf_counter() - began))
    return best
