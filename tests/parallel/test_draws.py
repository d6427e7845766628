"""Inside the engine, dropout drops what one device drops: in both memory formats, at every ZeRO stage, P = 1 and 2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parallel.common import SEED, run_ranks_once
from tlgc_mp.engine import initialize

STAGES = (0, 1, 2, 3)


def _network(channels_last: bool) -> nn.Module:
    torch.manual_seed(SEED)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Dropout2d(0.3)),
        *(nn.Conv2d(8, 8, 3), nn.Dropout(0.5), nn.RReLU(), nn.FeatureAlphaDropout(0.2)),
        *(nn.AdaptiveAvgPool2d(2), nn.AlphaDropout(0.1), nn.Flatten(), nn.Linear(32, 4)),
    )
    return model.to(memory_format=torch.channels_last) if channels_last else model


def _batch() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(SEED)), torch.arange(4)


def _losses(model: Any, backward: Any, step: Any) -> list[float]:
    images, labels = _batch()
    torch.manual_seed(SEED + 1)
    losses = []
    for _ in range(3):
        loss = F.cross_entropy(model(images), labels)
        backward(loss)
        step()
        losses.append(loss.item())
    return losses


def _one_device(channels_last: bool) -> list[float]:
    model = _network(channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return _losses(model, Tensor.backward, step)


def _engines() -> dict[Any, list[float]]:
    answers = {}
    for ranks in (2, 1):
        for stage in STAGES:
            for channels_last in (False, True):
                engine, *_ = initialize(
                    model=_network(channels_last),
                    optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
                    config={
                        "train_batch_size": 8 // ranks,
                        "zero_optimization": {"stage": stage},
                        "zero_allow_untested_optimizer": True,
                        "tensor_parallel": {"autotp_size": ranks},
                    },
                )
                answers[ranks, stage, channels_last] = _losses(engine, engine.backward, engine.step)
    return answers


def test_the_memory_format_decides_what_is_drawn() -> None:
    assert abs(_one_device(False)[0] - _one_device(True)[0]) > 1e-4, "the formats cannot be told apart"


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_one_device_draws(ranks: int, stage: int, channels_last: bool) -> None:
    expected = _one_device(channels_last)
    for answers in run_ranks_once(2, _engines):
        assert answers[ranks, stage, channels_last] == pytest.approx(expected, abs=1e-5)
