"""What a split leaves alone of a model, its own names, and memory that is shared, which it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.parallel.against_one_device import Step, train_step, worst
from tests.parallel.common import SEED, run_ranks_once, sgd
from tests.ranks import run_ranks
from tlgc_mp import UsageError
from tlgc_mp.engine import initialize
from tlgc_mp.parallel import layout_report, shard


class Region(nn.Conv2d):
    """A layer with a region, a placement and a layout, and ways to cut and adjust."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.region, self.placement, self.layout, self.ranks = 2.0, "left", (1, 3), 5

    def _cut(self, x: Tensor) -> Tensor:
        return x[..., : self.layout[1]]

    def _adjust(self, x: Tensor) -> Tensor:
        return x * self.region

    def gather_whole(self, x: Tensor) -> Tensor:
        return x + self.ranks

    _as_held = _widths = _on_shares = gather_whole

    def forward(self, x: Tensor) -> Tensor:
        return self._adjust(self.gather_whole(super().forward(self._cut(x))))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.last = Region(3, 8, 1), Region(8, 8, 1), Region(8, 4, 1)
        self.region, self.layout, self.placement = 0.5, "rows", nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.placement(self.inner(self.stem(x)))) * self.region
        return y if self.layout == "rows" else y.mT


def _step(model: nn.Module) -> Step:
    images = torch.randn(2, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))
    return train_step(model, (images.requires_grad_(),), evaluate=True)


def _model() -> nn.Module:
    torch.manual_seed(SEED)
    return Network().double()


def _on_ranks() -> tuple[Step, float]:
    model = shard(_model())
    report = layout_report(model, torch.empty(2, 3, 5, 5, dtype=torch.float64))
    return _step(model), report.parameters_split


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_models_own_names_are_its_own(ranks: int) -> None:
    found, parameters_split = run_ranks_once(ranks, _on_ranks)[0]
    off, what = worst(found, _step(_model()))
    assert off < 1e-9, what
    assert parameters_split > 0.9


class Moves(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)
        self.tp_index = 3

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).roll(self.tp_index, -1)


def _moving() -> nn.Module:
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Linear(8, 8), Moves()).double()


def _moved(model: nn.Module) -> Step:
    values = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))
    return train_step(model, (values.requires_grad_(),))


def _with_a_name_of_deepspeeds() -> tuple[Step, str]:
    try:
        initialize(
            model=_moving(), optimizer=sgd, config={"train_batch_size": 2, "tensor_parallel": {"autotp_size": 2}}
        )
        said = ""
    except UsageError as error:
        said = str(error)
    return _moved(shard(_moving())), said


def test_a_name_that_deepspeed_needs_is_refused_in_an_engine_alone() -> None:
    found, said = run_ranks_once(2, _with_a_name_of_deepspeeds)[0]
    off, what = worst(found, _moved(_moving()))
    assert off < 1e-9, what
    assert said.startswith("1.tp_index of a Moves must have another name, got one of DeepSpeed's")


def _sharing(kind: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(8, 8, 1))
    if kind == "view":
        model[1].weight = nn.Parameter(model[0].weight.data.view(8, 8, 1, 1))
    elif kind == "buffer":
        model.register_buffer("average", model[0].weight.data)
    elif kind == "frozen":
        model[0].weight.requires_grad_(False)
        model[1].weight = nn.Parameter(model[0].weight.data.view(8, 8, 1, 1), requires_grad=False)
    elif kind == "one storage":
        whole = torch.randn(2, 64)
        model[0].weight, model[1].weight = nn.Parameter(whole[0].view(8, 8)), nn.Parameter(whole[1].view(8, 8, 1, 1))
    elif kind == "tied":
        model[1] = nn.Linear(8, 8)
        model[1].weight = model[0].weight
    return model


def _shard_sharing() -> dict[str, str]:
    said = {}
    for kind in ("view", "buffer", "frozen", "one storage", "tied"):
        try:
            shard(_sharing(kind))
            said[kind] = ""
        except UsageError as error:
            said[kind] = str(error)
    return said


def test_parameters_that_share_memory_without_being_one_are_refused() -> None:
    said = run_ranks(2, _shard_sharing)[0]
    assert said["view"].startswith("0.weight and 1.weight must be one parameter or have memory of their own")
    assert "average must be one parameter" in said["buffer"] and "0.weight" in said["buffer"]
    assert said["frozen"] == said["one storage"] == said["tied"] == ""
