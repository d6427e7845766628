"""The coarse level's collectives beside ZeRO's: whichever rank is late, none is reordered and no loss changes.

Each rank sleeps at random layers of its backward pass, from a random stream of its own. ZeRO's buckets hold less than
most layers, and nothing is too small to be split, so that its collectives fall between those of the coarse level.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parallel.common import SEED, batches, run_ranks_once, sgd, smooth_network
from tests.ranks import run_ranks
from tlgc_mp.bench.ranks.meters import CollectiveClock
from tlgc_mp.engine import initialize
from tlgc_mp.nn import TwoLevelConv2d
from tlgc_mp.parallel.topology import Topology

RANKS, REPLICAS, BATCH = 2, 2, 8
STEPS, MANY_STEPS = 25, 500
LAYERS = 3
"""Of two levels."""
SLEEP_SECONDS = 0.01
SLEEP_CHANCE = 0.2
SMALL_BUCKETS = {
    "reduce_bucket_size": 200,
    "allgather_bucket_size": 200,
    "overlap_comm": True,
    "sub_group_size": 1000,
    "stage3_prefetch_bucket_size": 200,
    "stage3_max_live_parameters": 1000,
    "stage3_max_reuse_distance": 200,
    "stage3_param_persistence_threshold": 0,
}
"""In parameters, of which the network has 3000 a rank."""


class Delays:
    """Sleeps, 0 to :data:`SLEEP_SECONDS`, in the backward pass of random layers.

    Attributes:
        slept: how long each sleep was to be, in seconds.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.slept: list[float] = []
        self._random = random.Random(seed)
        for layer in model.modules():
            if next(layer.children(), None) is None:
                layer.register_forward_hook(self._see)

    def _see(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(self._sleep)

    def _sleep(self, grad: Tensor) -> None:
        if self._random.random() < SLEEP_CHANCE:
            self.slept.append(self._random.uniform(0, SLEEP_SECONDS))
            time.sleep(self.slept[-1])


def _losses(topology: Topology, stage: int, steps: int, delayed: bool) -> dict[str, Any]:
    config = {
        "train_batch_size": BATCH,
        "gradient_clipping": 1.0,
        "tensor_parallel": {"autotp_size": topology.tensor_parallel},
        "zero_optimization": {"stage": stage, **SMALL_BUCKETS},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = initialize(model=smooth_network("meta"), optimizer=sgd, config=config, seed=SEED)
    delays = Delays(engine.module, SEED + topology.rank) if delayed else None
    losses, forward, backward = [], CollectiveClock(), CollectiveClock()
    for images, labels in batches(steps, BATCH, torch.float32):
        part, part_labels = (t.chunk(topology.data_parallel)[topology.dp_rank] for t in (images, labels))
        with forward:
            loss = F.cross_entropy(engine(part), part_labels)
        with backward:
            engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    coarse = {m.tlgc_region.ranks.group_name for m in engine.module.modules() if isinstance(m, TwoLevelConv2d)}
    calls = Counter(
        {
            (name, "coarse" if group in coarse else "ZeRO", kind): traffic.calls
            for name, clock in (("forward", forward), ("backward", backward))
            for (kind, group), traffic in clock.traffic.items()
        }
    )
    return {"losses": torch.stack(losses), "slept": delays.slept if delays else [], "calls": calls}


def _with_and_without(stages: tuple[int, ...], steps: int) -> dict[int, list[dict[str, Any]]]:
    topology = Topology(dist.get_world_size(), dist.get_rank(), RANKS)
    return {stage: [_losses(topology, stage, steps, delayed) for delayed in (False, True)] for stage in stages}


def _check(answers: list[dict[int, list[dict[str, Any]]]], stage: int, steps: int) -> None:
    streams = []
    for answer in answers:
        plain, delayed = answer[stage]
        assert plain["losses"].unique().numel() == steps, "nothing was trained"
        assert torch.equal(delayed["losses"], plain["losses"]), f"stage {stage}, seed {SEED}"
        assert delayed["calls"] == plain["calls"]
        calls = plain["calls"]
        for when, kind in (("forward", "all_gather"), ("backward", "reduce_scatter")):
            assert calls[when, "coarse", kind] == LAYERS * steps
        for direction in ("send", "receive"):
            assert calls["forward", "coarse", direction] == (RANKS - 1) * 2 * steps, "of the head, and of the logits"
        reductions = sum(n for (when, whose, _), n in calls.items() if (when, whose) == ("backward", "ZeRO"))
        assert stage == 0 or reductions >= 4 * steps, "ZeRO's collectives lie after backward, not in it"
        assert sum(delayed["slept"]) > steps * SLEEP_SECONDS / 2, "nobody was late"
        streams.append(tuple(delayed["slept"]))
    assert len(set(streams)) == RANKS * REPLICAS, "all were late together"
    first_replica, second_replica = answers[0][stage][0]["losses"], answers[RANKS][stage][0]["losses"]
    assert not torch.equal(first_replica, second_replica)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_late_ranks_change_nothing(stage: int) -> None:
    _check(run_ranks_once(RANKS * REPLICAS, _with_and_without, (0, 1, 2, 3), STEPS), stage, STEPS)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_late_ranks_change_nothing_in_many_steps(stage: int) -> None:
    answers = run_ranks(RANKS * REPLICAS, _with_and_without, (stage,), MANY_STEPS, timeout=1100.0)
    _check(answers, stage, MANY_STEPS)
