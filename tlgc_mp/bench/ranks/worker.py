"""One rank of one measurement: ``python -m tlgc_mp.bench.ranks.worker REQUEST RESULT``, started by ``bench.launch``.

REQUEST is JSON, RESULT the file for what was measured. The rank then stays until its standard input ends.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

from tlgc_mp.engine.start import barrier
from tlgc_mp.host import keep_freed_memory, replace_file, use_huge_pages

if TYPE_CHECKING:
    import torch

    from tlgc_mp.bench.scaling.strategies import Workload

ZERO_MEMORY = "zero-memory"
"""In place of a strategy: measure the memory of each ZeRO stage."""
SAVING = "saving"
"""In place of a strategy: measure what a checkpoint costs."""
ZERO_3 = "zero3"

CORE_RATE = "core-rate"
"""In place of a strategy: measure the best rate of a dense 3x3 convolution."""

WARM_UP_STEPS = 2
"""The first allocates, the second finds what the first has freed."""

INSTRUMENTED_STEPS = 2
"""After the timed ones."""

CORE_RATE_SHAPES = ((128, 32, 16), (256, 16, 16), (320, 32, 4), (640, 16, 4), (1280, 8, 4))
"""Channels in and out, image size and images of the convolutions of which the fastest counts."""
CORE_RATE_REPEATS = 3
ACCELERATOR_IMAGES = 32
"""Times as many images on an accelerator, which a batch for a core would leave idle."""


def main(arguments: list[str]) -> None:
    """Runs the measurement and leaves its result, or why there is none, in the file."""
    request, path = json.loads(arguments[0]), arguments[1]
    _prepare_process()
    try:
        result = run(request)
    except BaseException as error:
        traceback.print_exc()
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        result = {"error": reason[:300], "out_of_memory": _is_memory(error)}
    replace_file(path, json.dumps(result))
    while True:
        signal.pause()


def run(request: dict[str, Any]) -> dict[str, Any]:
    """What this rank measures.

    Args:
        request: ``strategy`` (or ``"core-rate"``), ``dtype``, and for a strategy ``depth``, ``width``, ``groups``,
            ``batch_size``, ``momentum``, ``update_in_backward``, ``micro_batches``, ``activation_checkpointing`` and
            ``steps``; or ``"zero-memory"`` and what :func:`tlgc_mp.bench.zero.rank.measure_rank` takes.

    Returns:
        ``best_flops_per_second``, and ``device`` and ``device_memory_bytes`` (name and free memory of this rank's
        accelerator, else null) for the core rate; what ``measure_rank`` returns for ``"zero-memory"``; for a strategy
        ``seconds`` and ``busy_cpu_seconds`` of each timed step, ``network_bytes`` that its host sent in one,
        ``busy_device_seconds`` of one (null on the CPU), ``flops``, ``accounting`` and ``collectives`` by kind,
        ``collective_seconds``, ``collective_bytes``, ``coarse_seconds``, ``peak_memory_bytes``, ``parameter_bytes``,
        ``gradient_bytes``, ``optimizer_bytes`` and
        ``activation_bytes``.
    """
    from tlgc_mp.engine.quiet import quiet_start
    from tlgc_mp.engine.start import start_distributed

    with quiet_start():
        import torch
        import torch.distributed as dist
        from deepspeed.accelerator import get_accelerator

        from tlgc_mp.bench.ranks import meters
        from tlgc_mp.bench.scaling import strategies
    start_distributed()
    accelerator = get_accelerator()
    device = torch.device(accelerator.current_device_name())
    if device.type == "cpu" and request["strategy"] != ZERO_3:  # whose holes would stay
        keep_freed_memory()
    if request["strategy"] == CORE_RATE:
        memory = None if device.type == "cpu" else int(accelerator.available_memory())
        return {
            "best_flops_per_second": _core_rate(device, request["dtype"]),
            "device": _device_name(device),
            "device_memory_bytes": memory,
        }
    if request["strategy"] == ZERO_MEMORY:
        from tlgc_mp.bench.zero.rank import measure_rank

        return measure_rank(request, device)
    if request["strategy"] == SAVING:
        from tlgc_mp.bench.saving.rank import measure_saving

        return measure_saving(request, device)

    meters.reset_peak_memory(device)
    work = strategies.build(request, dist.get_world_size(), dist.get_rank(), device)
    for _ in range(WARM_UP_STEPS):
        work.step()
    gc.collect()
    seconds, busy = [], []
    sent_before = meters.network_bytes()
    for _ in range(request["steps"]):
        wall_began, cpu_began = _together(accelerator)
        work.step()
        accelerator.synchronize()
        seconds.append(time.perf_counter() - wall_began)
        busy.append(time.process_time() - cpu_began)
    barrier()
    sent = meters.network_bytes() - sent_before
    return {
        "seconds": seconds,
        "busy_cpu_seconds": busy,
        "network_bytes": sent / request["steps"],
        "flops": work.flops,
        "peak_memory_bytes": meters.peak_memory_bytes(device),
        **_instrumented_step(work, accelerator),
    }


def _together(accelerator: Any) -> tuple[float, float]:
    """(wall clock, CPU seconds of this process) as all ranks are about to go on together."""
    accelerator.synchronize()
    barrier()
    return time.perf_counter(), time.process_time()


def _instrumented_step(work: Workload, accelerator: Any) -> dict[str, Any]:
    """Steps with meters that would slow the timed ones."""
    from tlgc_mp.bench.ranks import meters
    from tlgc_mp.bench.ranks.accounting import profile_step

    memory: dict[str, int] = {}
    saved = meters.SavedActivations(list(work.model.parameters()))
    clock = meters.CollectiveClock()
    _together(accelerator)
    with clock, saved, meters.before_first_optimizer_step(lambda: memory.update(work.memory())):
        work.step()
        accelerator.synchronize()
    collectives = clock.by_kind()
    _together(accelerator)
    accounting, busy_device_seconds = profile_step(work.step)
    return {
        "accounting": accounting,
        "busy_device_seconds": busy_device_seconds,
        "collectives": collectives,
        "collective_seconds": clock.seconds(),
        "collective_bytes": sum(traffic["bytes"] for traffic in collectives.values()),
        "coarse_seconds": clock.seconds(("all_gather", "reduce_scatter", "send", "receive"), work.coarse_groups),
        "activation_bytes": saved.peak_bytes,
        **memory,
    }


def _device_name(device: torch.device) -> str | None:
    """Of an accelerator; ``None`` for the CPU."""
    import torch

    if device.type == "cpu":
        return None
    named = getattr(torch.get_device_module(device), "get_device_name", None)
    return named(device) if named is not None else device.type


def _core_rate(device: torch.device, dtype: str) -> float:
    """The best rate, in FLOP/s, of a dense 3x3 convolution forward and backward, channels_last, all ranks at once."""
    import torch
    import torch.nn.functional as F

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


def _prepare_process() -> None:
    """Pins this process to its core; has it end with the one that started it, and before any other one when memory runs
    out."""
    use_huge_pages()
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(os.environ["RANK"]) % len(cores)]})
    threading.Thread(target=_end_with_standard_input, daemon=True).start()
    if sys.platform == "linux":
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("1000")


def _end_with_standard_input() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


def _is_memory(error: BaseException) -> bool:
    """Whether ``error`` is that of an allocation."""
    text = f"{type(error).__name__} {error}".lower()
    return isinstance(error, MemoryError) or any(
        sign in text for sign in ("out of memory", "outofmemory", "can't allocate memory", "not enough memory")
    )


if __name__ == "__main__":
    main(sys.argv[1:])
