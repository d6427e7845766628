"""What real ranks hold and send in a training step that a plan has told beforehand.

``python -m tests.planner.measured CALIBRATED`` prints plans for the device that ``tlgc-mp plan --calibrate CALIBRATED``
measured beside what ranks of it take.
"""

from __future__ import annotations

import gc
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F

from tlgc_mp import checkpoint_activations, create_model, initialize
from tlgc_mp.bench.ranks import launch
from tlgc_mp.bench.ranks.meters import CollectiveClock, peak_memory_bytes, reset_peak_memory
from tlgc_mp.host import return_freed_memory
from tlgc_mp.parallel import collectives
from tlgc_mp.planner import plan
from tlgc_mp.planner.candidates import Candidate
from tlgc_mp.planner.devices import Device, find_device

SEED = 7
TIMED = 3


def momentum_sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=5e-4)


def measure(arguments: dict[str, Any], side: int, config: dict[str, Any], checkpointing: bool) -> dict[str, Any]:
    """Of this rank: ``sent``, collective -> (calls, bytes given) among the tensor-parallel ranks in a step;
    ``replicas``, the same among the replicas, as torch.distributed sees them; ``norm``, the bytes that the engine
    reduces among the tensor-parallel ranks; ``peak``, the most bytes that the process had; ``seconds``, its
    processor time of the fastest step."""
    model = create_model(**arguments, device="meta")
    if checkpointing:
        checkpoint_activations(model)
    device = torch.device("cpu")
    gc.collect()
    reset_peak_memory(device)
    settings = {**config, "zero_allow_untested_optimizer": True}
    engine, *_ = initialize(model=model, optimizer=momentum_sgd, config=settings, seed=SEED)
    generator = torch.Generator().manual_seed(SEED)
    count = config["train_micro_batch_size_per_gpu"]
    images = torch.randn(count, 3, side, side, generator=generator).to(memory_format=torch.channels_last)
    labels = torch.zeros(count, dtype=torch.long)

    def step() -> None:
        for _ in range(config["gradient_accumulation_steps"]):
            engine.backward(F.cross_entropy(engine(images), labels))
            engine.step()

    step()
    step()
    seconds = []
    for _ in range(TIMED):
        dist.barrier()
        began = time.process_time()
        step()
        seconds.append(time.process_time() - began)
    peak = peak_memory_bytes(device)
    given: Counter[str] = Counter()
    calls: Counter[str] = Counter()

    def note(name: str, size: int) -> None:
        given[name] += size
        calls[name] += 1

    collectives.recorders.append(note)
    with CollectiveClock() as clock:
        step()
    collectives.recorders.remove(note)
    everyone = dist.get_world_size()
    ranks = config.get("tensor_parallel", {}).get("autotp_size", 1)
    replicas = list(range(dist.get_rank() % ranks, everyone, ranks))
    among: dict[str, Any] = {}
    of_engine = -given["sum_partials"] - given["all_reduce"]
    for (kind, group), traffic in clock.traffic.items():
        members = dist.get_process_group_ranks(collectives.resolve_group(group))
        if len(members) > 1 and members != replicas and kind == "all_reduce":
            of_engine += traffic.bytes
        if members == replicas and len(replicas) > 1:
            found = among.setdefault(kind, [0, 0])
            found[0] += traffic.calls
            found[1] += traffic.bytes
    return {
        "sent": {name: (calls[name], given[name]) for name in given},
        "replicas": among,
        "norm": of_engine,
        "peak": peak,
        "seconds": min(seconds),
    }


@dataclass(frozen=True)
class StepRequest(launch.Request[dict[str, Any]]):
    """:func:`measure` in a process of its own that hands freed memory back."""

    arguments: dict[str, Any]
    side: int
    config: dict[str, Any]
    checkpointing: bool
    measured_by: ClassVar[str] = "tests.planner.measured:measure_alone"


def measure_alone(request: StepRequest, device: torch.device) -> dict[str, Any]:
    return_freed_memory()
    return measure(request.arguments, request.side, request.config, request.checkpointing)


CASES = (
    ("wrn-16-4", 32, 16, (1, 1), 0, False),
    ("wrn-16-8", 32, 16, (1, 1), 0, False),
    ("wrn-16-8", 32, 16, (1, 1), 0, True),
    ("wrn-16-4", 32, 32, (2, 1), 0, False),
    ("wrn-16-8", 32, 16, (2, 1), 0, False),
    ("wrn-16-8", 32, 32, (1, 2), 2, False),
    ("wrn-16-8", 32, 32, (1, 2), 3, False),
    ("mobilenet_v2", 64, 16, (1, 1), 0, False),
    ("mobilenet_v2", 64, 32, (1, 2), 2, False),
)
"""Model, pixels, images a step, P x D, ZeRO stage, activation checkpointing."""


def main(calibrated: str) -> None:
    """Prints a table in Markdown."""
    device = find_device("", calibrated)
    heads = ("model", "P x D", "ZeRO", "recompute", "MB planned", "of it beside the fixed part", "MB measured")
    print(f"| {' | '.join([*heads, 's planned', 'processor s'])} |")
    print("| --- " * 9 + "|")
    for name, side, batch, (ranks, replicas), stage, checkpointing in CASES:
        candidate, answers = beside(device, name, side, batch, ranks, replicas, stage, checkpointing)
        held, seconds = (max(answer[key] for answer in answers) for key in ("peak", "seconds"))
        print(
            f"| {name} | {ranks} x {replicas} | {stage} | {'yes' if checkpointing else 'no'} | "
            f"{candidate.needed / 1e6:.1f} | {candidate.memory.total / 1e6:.1f} | {held / 1e6:.1f} | "
            f"{candidate.step_seconds:.3f} | {seconds:.3f} |",
            flush=True,
        )


def beside(
    device: Device, name: str, side: int, batch: int, ranks: int, replicas: int, stage: int, checkpointing: bool
) -> tuple[Candidate, list[dict[str, Any]]]:
    """What is planned, and what each rank measures."""
    arguments = {"name": name, "conv": "gc-2l", "groups": 4, "num_classes": 10}
    config = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": batch // replicas,
        "tensor_parallel": {"autotp_size": ranks},
        "zero_optimization": {"stage": stage},
    }
    images = torch.empty(2, 3, side, side, device="meta").to(memory_format=torch.channels_last)
    model = create_model(**arguments, device="meta")  # type: ignore[arg-type]
    found = plan(model, images, config, ranks=ranks * replicas, device=device, optimizer=momentum_sgd)
    candidate = next(each for each in found.candidates if each.checkpointing == checkpointing)
    request = StepRequest(arguments, side, found.config(candidate), checkpointing)
    outcome = launch.measure(request, ranks * replicas, 300.0)
    assert outcome.error is None, outcome.error
    return candidate, outcome.ranks


if __name__ == "__main__":
    from tests.planner import measured  # under its own name, by which ranks find what they measure

    measured.main(sys.argv[1])
