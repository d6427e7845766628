"""The meters of one rank, against what is known beforehand."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from tests.ranks import run_ranks
from tlgc_mp.bench.ranks.meters import (
    CollectiveClock,
    SavedActivations,
    before_first_optimizer_step,
    peak_memory_bytes,
    reset_peak_memory,
)


def _collectives() -> dict[str, Any]:
    """A known set of them, timed on this rank of two; the second rank is late."""
    rank, originals = dist.get_rank(), (dist.ProcessGroup.allreduce, dist.Work.wait)
    other, world = dist.new_group([0, 1]), dist.group.WORLD
    alone = [dist.new_group([index]) for index in range(2)][rank]
    assert isinstance(other, dist.ProcessGroup) and isinstance(alone, dist.ProcessGroup) and world is not None
    with CollectiveClock() as clock:
        if rank == 1:
            time.sleep(0.5)
        entered = time.monotonic()
        dist.all_reduce(torch.ones(1000))
        gathered, share = torch.empty(200), torch.ones(100)
        dist.all_gather_into_tensor(gathered, share, group=other)
        work = dist.reduce_scatter_tensor(share, gathered, group=other, async_op=True)
        assert work is not None
        work.wait()
        if rank == 0:
            dist.send(torch.ones(10), 1)
        else:
            dist.recv(torch.ones(10), 0)
        dist.all_reduce(torch.ones(5), group=alone)
    dist.all_reduce(torch.ones(1))
    assert (dist.ProcessGroup.allreduce, dist.Work.wait) == originals
    return {
        "kinds": clock.by_kind(),
        "gather": clock.seconds(("all_gather", "reduce_scatter"), frozenset([other.group_name])),
        "elsewhere": clock.seconds(("all_gather", "reduce_scatter"), frozenset([world.group_name])),
        "all": clock.seconds(),
        "entered": entered,
    }


def test_collectives_are_timed_by_kind_and_group() -> None:
    first, second = run_ranks(2, _collectives)
    for result, message in ((first, "send"), (second, "receive")):
        kinds = result["kinds"]
        assert {kind: (traffic["calls"], traffic["bytes"]) for kind, traffic in kinds.items()} == {
            "all_reduce": (2, 4000),  # the second has nobody to send to
            "all_gather": (1, 800),
            "reduce_scatter": (1, 800),
            message: (1, 40),
        }
        assert result["gather"] == pytest.approx(kinds["all_gather"]["seconds"] + kinds["reduce_scatter"]["seconds"])
        assert result["all"] == pytest.approx(sum(traffic["seconds"] for traffic in kinds.values()))
        assert result["gather"] > 0 and result["elsewhere"] == 0
    late = second["entered"] - first["entered"]  # half a second, less what the first one started behind the second
    assert first["kinds"]["all_reduce"]["seconds"] > 0.8 * late > 0, "waiting for the late rank counts"


def test_saved_activations_are_counted_once_and_change_nothing() -> None:
    torch.manual_seed(7)
    layer, x = nn.Linear(8, 8, bias=False), torch.randn(4, 8)

    def run() -> torch.Tensor:
        layer.zero_grad()
        hidden = F.relu(layer(x))  # keeps x, and its own result
        (hidden * hidden).sum().backward()  # keeps that result twice more
        assert layer.weight.grad is not None
        return layer.weight.grad.clone()

    expected = run()
    with SavedActivations(list(layer.parameters())) as saved:
        assert torch.equal(run(), expected)
        assert torch.equal(run(), expected)
    assert saved.peak_bytes == 2 * 4 * 8 * 4  # one run's, since backward lets go
    assert not saved._holders


def test_gradients_are_there_when_the_optimizer_is_about_to_step() -> None:
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizers = [torch.optim.SGD([parameter], lr=0.5) for parameter in parameters]
    seen = []
    with before_first_optimizer_step(lambda: seen.append([(p.tolist(), p.grad is not None) for p in parameters])):
        sum(parameter.sum() for parameter in parameters).backward()  # type: ignore[union-attr]
        for optimizer in optimizers:
            optimizer.step()
    assert seen == [[([1.0, 1.0], True)] * 2]


def test_peak_memory_is_that_since_the_reset() -> None:
    cpu = torch.device("cpu")
    size = 256 << 20
    torch.ones(size // 4)
    reset_peak_memory(cpu)
    before = peak_memory_bytes(cpu)
    torch.ones(size // 4)
    assert peak_memory_bytes(cpu) - before == pytest.approx(size, rel=0.2)
