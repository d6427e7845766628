"""The trace of a step without memory, against the same step with real tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tlgc_mp import UsageError, create_model
from tlgc_mp.parallel.plan import plan
from tlgc_mp.planner.trace import BASES, Traces, _Recorder, trace

BATCH, SIDE = 6, 16
NETWORKS = {
    "wrn": {"name": "wrn-10-2", "conv": "gc-2l", "groups": 4},
    "mobilenet": {"name": "mobilenet_v2", "conv": "gc-2l", "groups": 4},
    "resnet18": {"name": "torchvision:resnet18", "conv": "sc"},
}


def _loss(logits: Any) -> Tensor:
    return F.cross_entropy(logits, torch.zeros(logits.shape[0], dtype=torch.long, device=logits.device))


def _images(batch: int, device: str) -> Tensor:
    return torch.zeros(batch, 3, SIDE, SIDE, device=device).to(memory_format=torch.channels_last)


def _traced(model: nn.Module, batch: int, ranks: int = 1) -> Any:
    return trace(model, (_images(batch, "meta"),), _loss, tensor_parallel=ranks, placements=plan(model, ranks))


@pytest.mark.parametrize("name", NETWORKS)
def test_tensors_that_live_are_those_of_a_real_step(name: str) -> None:
    """On a CPU, which computes with the operators that the meta device is asked for: equal to the byte."""
    arguments = {**NETWORKS[name], "num_classes": 10}
    planned = _traced(create_model(**arguments, device="meta"), BATCH)  # type: ignore[arg-type]
    model = create_model(**arguments).train()  # type: ignore[arg-type]
    recorder = _Recorder()
    for tensor in (*model.parameters(), *model.buffers()):
        recorder.know(tensor)
    images = _images(BATCH, "cpu")
    with recorder.recording(list(model.parameters())):
        recorder.hold(images)
        _loss(model(images)).backward()
    assert planned.live.max() == max(row[3] for row in recorder.rows)
    assert planned.parameters == planned.arrived[-1] == recorder.arrived
    assert planned.flops.sum() == pytest.approx(sum(row[1] for row in recorder.rows))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_two_traces_tell_that_of_any_batch(name: str, ranks: int) -> None:
    model = create_model(**{**NETWORKS[name], "num_classes": 10}, device="meta")  # type: ignore[arg-type]
    asked: list[int] = []

    def make(batch: int) -> Any:
        asked.append(batch)
        return _traced(model, batch, ranks)

    told, made = Traces(make).at(12), _traced(model, 12, ranks)
    assert asked == list(BASES)
    for field in ("flops", "moved", "live", "arrived", "sent"):
        np.testing.assert_allclose(getattr(told, field), getattr(made, field), rtol=1e-12, err_msg=field)
    assert told.collectives() == made.collectives()


class Grows(nn.Module):
    """A network that does more for large batches."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return (y * 2 if len(x) > 9 else y).flatten(1)


def test_a_model_that_goes_another_way_for_a_batch_is_traced_at_it() -> None:
    asked: list[int] = []
    model = Grows()

    def make(batch: int) -> Any:
        asked.append(batch)
        return _traced(model, batch)

    Traces(make).at(12)
    assert asked == [*BASES, 12]


def test_a_model_without_parameters_to_train_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^model must have parameters to train, got none"):
        _traced(Grows().requires_grad_(False), 2)
