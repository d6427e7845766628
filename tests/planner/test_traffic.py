"""The bytes of a plan, against those that real ranks are counted to give to each collective."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.parallel.common import run_ranks_once
from tests.planner.measured import measure, momentum_sgd
from tlgc_mp.models import create_model
from tlgc_mp.planner import plan, search
from tlgc_mp.planner.candidates import Candidate, Plan
from tlgc_mp.planner.traffic import REPLICAS, TENSOR_PARALLEL

MODEL = {"name": "wrn-10-1", "conv": "gc-2l", "groups": 4, "num_classes": 10}
SIDE, BATCH = 8, 16
GATHERS = ("all_gather", "coarse_gather")


def _plan(tensor_parallel: int, replicas: int, stage: int, micro_batch: int) -> Plan:
    config = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": micro_batch,
        "tensor_parallel": {"autotp_size": tensor_parallel},
        "zero_optimization": {"stage": stage},
    }
    images = torch.empty(2, 3, SIDE, SIDE, device="meta").to(memory_format=torch.channels_last)
    model = create_model(**MODEL, device="meta")  # type: ignore[arg-type]
    return plan(model, images, config, ranks=tensor_parallel * replicas, optimizer=momentum_sgd)


def _measured(found: Plan, candidate: Candidate) -> dict[str, Any]:
    ranks = candidate.tensor_parallel * candidate.data_parallel
    return run_ranks_once(ranks, _rank, repr(found.config(candidate)), candidate.checkpointing)[0]


def _rank(config: str, checkpointing: bool) -> dict[str, Any]:
    return measure(MODEL, SIDE, eval(config), checkpointing)  # arguments that run_ranks_once can compare


CASES = [
    *(((1, 2), stage, False) for stage in (0, 1, 2, 3)),
    *(((2, 2), stage, False) for stage in (0, 1, 2, 3)),
    *(((2, 2), stage, True) for stage in (0, 3)),
    ((2, 1), 2, False),
]


@pytest.mark.parametrize(("shape", "stage", "checkpointing"), CASES)
def test_bytes_are_those_that_are_counted(
    shape: tuple[int, int], stage: int, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "SMALLEST_BUCKET", 2000)  # several buckets
    found = _plan(*shape, stage, BATCH // shape[1])
    candidate = next(
        each for each in found.candidates if each.checkpointing == checkpointing and not each.share.offload
    )
    measured = _measured(found, candidate)
    planned = {each.name: each for each in candidate.collectives if each.ranks == TENSOR_PARALLEL}
    of_engine = planned.pop("all_reduce", None)  # on the norm: the recorders see those of passes
    assert {name: (each.calls, each.given) for name, each in planned.items()} == measured["sent"]
    assert (0 if of_engine is None else of_engine.given) == measured["norm"]
    told = {}
    for each in candidate.collectives:
        if each.ranks == REPLICAS:
            told[each.name] = each.given * (shape[1] if each.name in GATHERS else 1)
    assert told == {name: given for name, (_, given) in measured["replicas"].items()}
    if shape[1] > 1:
        calls = {each.name: each.calls for each in candidate.collectives if each.ranks == REPLICAS}
        assert calls == {name: count for name, (count, _) in measured["replicas"].items()}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_micro_batches_count_as_they_are_run(stage: int) -> None:
    found = _plan(2, 2, stage, BATCH // 4)
    candidate = next(each for each in found.candidates if not each.checkpointing and not each.share.offload)
    assert candidate.accumulation == 2
    measured = _measured(found, candidate)
    told = {e.name: e.given * (2 if e.name in GATHERS else 1) for e in candidate.collectives if e.ranks == REPLICAS}
    assert told == {name: given for name, (_, given) in measured["replicas"].items()}
    passes = {e.name: e.given for e in candidate.collectives if e.ranks == TENSOR_PARALLEL and e.name != "all_reduce"}
    assert passes == {name: given for name, (_, given) in measured["sent"].items()}
