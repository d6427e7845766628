"""Parameters cut as the joined channels that they meet: the same numbers, by fewer collectives."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.networks import Joined
from tests.parallel.against_one_device import Step, make_values_differ, train_step, worst
from tests.parallel.common import SEED, run_ranks_once
from tests.ranks import run_ranks
from tlgc_mp.parallel import collectives, layout_report, shard
from tlgc_mp.parallel.joins import fit_joins
from tlgc_mp.parallel.plan import plan


class Tied(Joined):
    """Two layers hold one vector, and meet channels that were joined otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.norms[1].bias = self.fitted.bias


NETWORKS: dict[str, type[nn.Module]] = {"joined": Joined, "tied": Tied}
JOINED = {"fitted": (16, 8), "depthwise": (16, 8), "norms.1": (8, 16), "slopes": (8, 16)}
"""Layer -> the pieces of the channels that it meets, where they are always the same."""


def _model(name: str) -> nn.Module:
    torch.manual_seed(SEED)
    model = NETWORKS[name]().double()
    make_values_differ(model, SEED)
    return model


def _images() -> Tensor:
    return torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))


def _step(model: nn.Module) -> Step:
    return train_step(model, (_images().requires_grad_(),), evaluate=True)


def _on_ranks(name: str, sample: bool) -> tuple[Step, int, dict[str, Any]]:
    model = shard(_model(name), sample_inputs=_images().to("meta") if sample else None)
    sent: Counter[str] = Counter()
    collectives.recorders.append(lambda kind, size: sent.update([kind]))
    step = train_step(model, (_images().requires_grad_(),), keep=False)
    collectives.recorders.clear()
    assert all(torch.isfinite(output).all() for output in step.outputs)
    segments = {n: m.tlgc_placement.segments for n, m in model.named_modules() if hasattr(m, "tlgc_placement")}
    return _step(shard(_model(name), sample_inputs=_images() if sample else None)), sent.total(), segments


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_sample_changes_no_number_and_saves_collectives(name: str, ranks: int) -> None:
    expected = _step(_model(name))
    fitted, plain = (run_ranks_once(ranks, _on_ranks, name, sample)[0] for sample in (True, False))
    for step in (fitted[0], plain[0]):
        off, what = worst(step, expected)
        assert off < 1e-9, what
    tied = ("fitted", "norms.1") if name == "tied" else ()
    alone = {layer: pieces for layer, pieces in JOINED.items() if layer not in tied}
    assert {layer: pieces for layer, pieces in fitted[2].items() if layer in JOINED and pieces} == alone
    assert not any(plain[2].values())
    assert fitted[1] <= plain[1] - 20


class Draws(nn.Module):
    """Draws from every generator there is."""

    def forward(self, x: Tensor) -> Tensor:
        return x * random.random() * float(np.random.random()) * float(torch.rand(()))


def _random_states() -> tuple[Any, ...]:
    arrays: Any = np.random.get_state()
    return random.getstate(), arrays[1].tolist(), torch.get_rng_state().tolist()


def test_random_states_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Draws())
    states = _random_states()
    fit_joins(model, plan(model, 2), 2, torch.empty(2, 3, 4, 4))
    layout_report(model, torch.empty(2, 3, 4, 4), tensor_parallel=2)
    assert states == _random_states()


def test_the_model_is_left_alone() -> None:
    model = _model("joined").train()
    state, drawn = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    placements = plan(model, 2)
    fitted = fit_joins(model, placements, 2, _images())
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(placement.segments for placement in placements.values())
    assert {name: fitted[name].segments for name in JOINED} == JOINED


class Reads(nn.Module):
    """Joins channels, after it has read a value."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x) * (2 if x.max().item() > 0 else 1)
        return self.norm(torch.cat([x, x], 1))


class Switches(Reads):
    """Joins channels by the size of its images."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.norm(torch.cat([x, x] if x.shape[2] > 8 else [x[:, :4], x, x[:, 4:]], 1))


def _with_a_warning() -> str:
    with pytest.warns(UserWarning, match=r"^sample_inputs are of no use: model cannot be measured without") as caught:
        split = shard(Reads(), sample_inputs=torch.empty(2, 3, 4, 4))
    assert split(torch.randn(2, 3, 4, 4)).shape == (2, 16, 4, 4)
    return str(caught[0].message)


def _of_other_shapes() -> None:
    shard(Switches(), sample_inputs=torch.empty(2, 3, 8 + dist.get_rank(), 8))


def test_a_model_that_reads_values_runs_with_a_warning() -> None:
    assert all("item" in message for message in run_ranks(2, _with_a_warning))


def test_samples_that_lead_elsewhere_are_refused() -> None:
    with pytest.raises(AssertionError, match="sample_inputs must be of the same shapes on every rank"):
        run_ranks(2, _of_other_shapes)
