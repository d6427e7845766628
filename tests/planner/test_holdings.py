"""What a plan says that ZeRO holds, against what the engine is found to hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.parallel.common import run_ranks_once
from tlgc_mp.bench.zero import sweep as zero
from tlgc_mp.models import create_model
from tlgc_mp.planner.holdings import MASTER, Share, moments
from tlgc_mp.planner.search import Job, mean_loss
from tlgc_mp.planner.trace import trace

RANKS, REPLICAS, MODEL, GROUPS = 2, 2, "wrn-10-2", 4
REQUEST = zero.ZeroMemory(MODEL, GROUPS, RANKS, batch_size=4)


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def _measured() -> dict[str, Any]:
    from tlgc_mp.bench.zero.rank import measure_rank

    return measure_rank(REQUEST, torch.device("cpu"))


def _told(stage: int, bucket: int) -> dict[str, Any]:
    """Moment -> what is held then."""
    model = create_model(MODEL, groups=GROUPS, num_classes=10, device="meta")
    images = torch.empty(2, 3, 32, 32, device="meta")
    job = Job(model, (images,), mean_loss, _sgd, 4)
    found = trace(model, (images,), mean_loss, tensor_parallel=RANKS, placements=job.placements(RANKS))
    return {memory.moment: memory for memory in moments(found, Share(stage, REPLICAS, bucket), 1, _sgd, False)}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_is_held_is_what_the_engine_holds(stage: int) -> None:
    settings = zero.ZeroSettings(MODEL, GROUPS, RANKS, REPLICAS, 4, "", 60.0)
    rows = zero.make_rows(settings, run_ranks_once(RANKS * REPLICAS, _measured))
    name = zero.BOUNDED if stage else zero.OWN
    row = next(row for row in rows if row["stage"] == stage and row["settings"] == name)
    bucket = row["zero_optimization"].get("reduce_bucket_size", 0)
    told = _told(stage, bucket)
    buffers = 4 * row["parameters"] * 0.02  # running statistics, which the engine does not count
    after = row["after_backward"]
    held = told["backward"]
    assert held.parameters == pytest.approx(after["parameter_bytes"], abs=buffers)
    assert held.optimizer == pytest.approx(after["state_bytes"] + after["master_bytes"], rel=0.02)
    step = told["optimizer"]
    gradients = row["at_step"]["gradient_bytes"]
    flat = step.copies if stage else step.gradients
    if stage == 3:  # the partition and the copy of one sub-group, beside the bucket
        flat = step.gradients + step.copies - 4 * bucket
    assert flat == pytest.approx(gradients, rel=0.05)
    assert MASTER == 4


def test_offloaded_the_device_holds_no_optimizer() -> None:
    model = create_model(MODEL, groups=GROUPS, num_classes=10, device="meta")
    images = torch.empty(2, 3, 32, 32, device="meta")
    job = Job(model, (images,), mean_loss, _sgd, 4)
    found = trace(model, (images,), mean_loss, tensor_parallel=1, placements=job.placements(1))
    kept, offloaded = (
        {memory.moment: memory for memory in moments(found, Share(2, 2, 5000, offload), 1, _sgd, True)}
        for offload in (False, True)
    )
    assert offloaded["backward"].optimizer == 0
    assert kept["backward"].optimizer == pytest.approx(8 * found.parameters / 2, rel=0.01)
    assert offloaded["backward"].activations == kept["backward"].activations
