"""A training step of a split network against its arithmetic and its collectives, each alone.

``python -m tests.parallel.test_step_speed`` prints the figures. In each round a step is timed and another recorded: the
operators of torch that a rank calls on plain shares, and what it sends. Then the operators one after the other and the
collectives one after the other are timed. What the step takes beyond the sum is Python between them, and waiting.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ranks import run_ranks
from tlgc_mp.host import describe_machine
from tlgc_mp.parallel import collectives, shard
from tlgc_mp.parallel.split_tensor import SplitTensor

NETWORKS = ("resnet50", "efficientnet_b0", "densenet121")
SIDE = 224


class _Recorder(TorchDispatchMode):
    """The operators that are called on plain tensors, those below split ones included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], object]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if SplitTensor in types:
            return NotImplemented  # it comes again, for its share
        kwargs = kwargs or {}
        if func.namespace != "c10d":
            self.calls.append(lambda: func(*args, **kwargs))
        return func(*args, **kwargs)


def _collective(name: str, size: int, region: Any) -> Callable[[], object]:
    """Sends as much again as was sent by the collective ``name``."""
    ranks = region.ranks
    if name in ("all_gather", "coarse_gather"):
        share = torch.zeros(size // 4)
        return lambda: collectives.all_gather(share, ranks)
    if name in ("all_reduce", "sum_partials"):
        whole = torch.zeros(size // 4)
        return lambda: collectives.all_reduce(whole, ranks)
    assert name == "reduce_scatter", name
    stacked = torch.zeros(ranks.size, size // 4 // ranks.size)
    return lambda: collectives.reduce_scatter(stacked, ranks)


def _step(model: nn.Module, images: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    model(images).sum().backward()


def _seconds(run: Callable[[], object]) -> float:
    dist.barrier()
    start = time.perf_counter()
    run()
    dist.barrier()
    return time.perf_counter() - start


def _on_rank(name: str, batch: int, rounds: int) -> tuple[list[float], list[float], list[float]]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randn(batch, 3, SIDE, SIDE)
    model = shard(torchvision.models.get_model(name).train(), sample_inputs=images)
    timed: tuple[list[float], list[float], list[float]] = ([], [], [])
    for _ in range(rounds):
        _step(model, images)
        step = _seconds(lambda: _step(model, images))
        recorder, exchanges = _recorded(model, images)
        # What is held for the replay takes memory from a step that runs beside it: recorded anew in each round.
        for call in recorder.calls:
            call()
        arithmetic = _seconds(lambda calls=recorder.calls: _all(calls))
        recorder.calls.clear()
        for seconds, part in zip(timed, (step, arithmetic, _seconds(lambda calls=exchanges: _all(calls))), strict=True):
            seconds.append(part)
    return timed


def _recorded(model: Any, images: Tensor) -> tuple[_Recorder, list[Callable[[], object]]]:
    """The operators of a step, and its collectives."""
    sent: list[tuple[str, int]] = []
    collectives.recorders.append(lambda kind, size: sent.append((kind, size)))
    with _Recorder() as recorder:
        _step(model, images)
    collectives.recorders.clear()
    return recorder, [_collective(kind, size, model.tlgc_region) for kind, size in sent]


def _all(calls: list[Callable[[], object]]) -> None:
    for call in calls:
        call()


def figures(name: str, ranks: int = 2, batch: int = 8, rounds: int = 5) -> tuple[float, float, float, float]:
    """Medians in seconds of a step, of its arithmetic, of its collectives; and of the ratio of a round."""
    step, arithmetic, exchanges = run_ranks(ranks, _on_rank, name, batch, rounds, timeout=1200.0)[0]
    ratios = [s / (a + e) for s, a, e in zip(step, arithmetic, exchanges, strict=True)]
    return (*(statistics.median(seconds) for seconds in (step, arithmetic, exchanges)), statistics.median(ratios))


@pytest.mark.slow
@pytest.mark.timeout(1300)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_takes_little_more_than_its_parts(name: str) -> None:
    assert figures(name)[3] <= 1.1


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.parallel.test_step_speed", description=__doc__)
    parser.add_argument("networks", nargs="*", default=NETWORKS, help="of torchvision")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(describe_machine())
    for name in options.networks:
        step, arithmetic, exchanges, ratio = figures(name, options.ranks, options.batch_size, options.rounds)
        parts = f"arithmetic {arithmetic:.3f}, collectives {exchanges:.3f}"
        print(f"{name:20s} step {step:.3f} s, {parts}: {ratio:.3f} times the two", flush=True)


if __name__ == "__main__":
    main()
