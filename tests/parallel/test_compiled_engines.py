"""Engines that train a compiled model, against one device, at every ZeRO stage."""

from __future__ import annotations

import functools
import os
import shutil
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from tests.networks import BATCH, SIDE, engine_of, network, sgd, train
from tests.parallel.common import (
    SEED,
    TrainingRun,
    assert_close,
    batches,
    run_ranks_once,
    smooth_activations,
    train_one_device,
)
from tlgc_mp import create_model
from tlgc_mp.engine import initialize
from tlgc_mp.engine.compiled import backend_here, compile_training
from tlgc_mp.nn import TwoLevelConv2d
from tlgc_mp.parallel import gather_state_dict

STEPS, CLIP, TOLERANCE = 3, 0.2, 1e-5
STAGES = (0, 1, 2, 3)


def _model(name: str) -> nn.Module:
    torch.manual_seed(SEED)
    return network(name) if name == "converted" else create_model(name, groups=4, coarse_init="scaled")


def _on_ranks(ranks: int, name: str, stages: tuple[int, ...]) -> dict[int, tuple[list[float], dict[str, Any], int]]:
    """By stage: the losses, the state in the end, and how many graphs were made."""
    from torch._dynamo.utils import counters

    answers = {}
    with mock.patch("tests.networks.network", _model):
        for stage in stages:
            counters.clear()
            engine = engine_of(name, ranks, stage, gradient_clipping=CLIP)
            assert compile_training(engine, "aot_eager") == "aot_eager"
            losses = train(engine, range(STEPS))
            engine.eval()
            engine(batches(1, 3, torch.float32, side=SIDE)[0][0])  # of another size: not compiled
            answers[stage] = losses, gather_state_dict(engine.module), counters["stats"]["unique_graphs"]
    return answers


@functools.cache
def _one_device(name: str) -> TrainingRun:
    with smooth_activations():
        return train_one_device(_model(name), batches(STEPS, BATCH, torch.float32, side=SIDE), sgd, clip=CLIP)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("ranks", "name", "stage"),
    [
        *((2, "wrn-10-1", stage) for stage in STAGES),
        *(pytest.param(1, "wrn-10-1", stage, marks=pytest.mark.slow) for stage in STAGES),
        *((1, "converted", stage) for stage in (1, 3)),
    ],
)
def test_losses_and_final_state(ranks: int, name: str, stage: int) -> None:
    """In every run two ranks stand for the project's own network, one for a library's."""
    expected = _one_device(name)
    assert min(expected.norms) > 1.2 * CLIP, "nothing was clipped"
    stages = STAGES if name == "wrn-10-1" else (1, 3)
    for answers in run_ranks_once(ranks, _on_ranks, ranks, name, stages):
        losses, state, graphs = answers[stage]
        assert graphs == 1 if stage < 3 else graphs > 1
        assert losses == pytest.approx(expected.losses[0], rel=TOLERANCE)
        assert_close(state, expected.states[0], TOLERANCE, least=1e-2)


def _by_inductor() -> tuple[list[list[float]], str]:
    """The losses of one engine as it is and of one compiled, and what compiled it."""
    losses, backend = [], ""
    for compiled in (False, True):
        torch.manual_seed(SEED)
        layer = TwoLevelConv2d(3, 8, 3, padding=1, groups=1, coarse_init="scaled")
        pooled = (nn.BatchNorm2d(8), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
        config = {"train_batch_size": BATCH, "zero_allow_untested_optimizer": True}
        engine = initialize(model=nn.Sequential(layer, *pooled), optimizer=sgd, config=config)[0]
        if compiled:
            backend = compile_training(engine)
        torch.manual_seed(SEED)
        losses.append(train(engine, range(STEPS)))
    return losses, backend


@pytest.mark.timeout(300)
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler calls a C++ compiler")
def test_what_inductor_drops_is_what_is_dropped_without() -> None:
    losses, backend = run_ranks_once(1, _by_inductor)[0]
    assert backend == "inductor"
    assert losses[1] == pytest.approx(losses[0], rel=TOLERANCE)


def test_without_a_compiler_operators_stay_as_they_are() -> None:
    with mock.patch.dict(os.environ, CXX="no-such-compiler"):
        assert backend_here() == "aot_eager"
