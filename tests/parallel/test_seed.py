"""The same seed gives the same initial weights, bit by bit, at every P, from a model with values or on meta."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.parallel.common import SEED, coarse_from_the_first, run_ranks_once
from tlgc_mp import create_model
from tlgc_mp.nn import FullyLearnableGroupConv2d, ShuffleConv2d, TwoLevelConv2d, init_parameters
from tlgc_mp.parallel import gather_state_dict, shard
from tlgc_mp.parallel.plan import plan

MIXED = "mixed"
MODELS = (("gc-2l", 4), ("gc", 4), ("sc", 1), (MIXED, 1))
RANKS = (1, 2, 4)


def _model(conv: str, groups: int, device: str) -> nn.Module:
    """WRN-10-2, or layers of every kind that are cut by inputs, by outputs, or not at all."""
    if conv != MIXED:
        return create_model("wrn-10-2", conv=conv, groups=groups, device=device, **coarse_from_the_first(conv))
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3),
            nn.Conv2d(16, 6, 1),
            nn.Conv2d(6, 16, 3),
            TwoLevelConv2d(16, 16, 3, groups=2, coarse_init="he"),
            ShuffleConv2d(16, 16, 3, groups=4),
            FullyLearnableGroupConv2d(16, 16, 3, groups=2),
            nn.BatchNorm2d(16),
            nn.Linear(16, 64),
            nn.Linear(64, 6),
            nn.Linear(6, 10),
        )
    if device == "cpu":
        init_parameters(model.to_empty(device=device), torch.initial_seed())
    return model


def test_the_mixed_model_has_layers_of_every_kind() -> None:
    def kinds(ranks: int) -> str:
        return " ".join(placement.kind for placement in plan(_model(MIXED, 1, "meta"), ranks).values())

    assert kinds(2) == "column row column two-level shuffle whole channels column row column"
    assert kinds(4) == "column row column whole shuffle whole channels column row whole"


def _seeded(conv: str, groups: int, device: str) -> nn.Module:
    torch.manual_seed(SEED)
    return _model(conv, groups, device)


def _initial_states() -> dict[tuple[str, int, str], dict[str, Tensor]]:
    """(convolution, P, device the model was built on) -> the whole state, of models split over 1, 2 and 4 ranks."""
    states = {}
    for ranks in RANKS:
        group, _ = dist.new_subgroups(group_size=ranks)
        for conv, groups in MODELS:
            for device in ("cpu", "meta"):
                model = _seeded(conv, groups, device)
                torch.randn(dist.get_rank() + 1)
                states[conv, ranks, device] = gather_state_dict(shard(model, group))
            given = _model(conv, groups, "meta")
            torch.manual_seed(SEED + 1)
            states[conv, ranks, "meta, seed given"] = gather_state_dict(shard(given, group, seed=SEED))
    return states


@pytest.mark.parametrize("device", ["cpu", "meta", "meta, seed given"])
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(("conv", "groups"), MODELS)
def test_weights_do_not_depend_on_the_split(conv: str, groups: int, ranks: int, device: str) -> None:
    expected = _seeded(conv, groups, "cpu").state_dict()
    for states in run_ranks_once(4, _initial_states):
        found = states[conv, ranks, device]
        assert set(found) == set(expected)
        differing = [name for name in expected if not torch.equal(found[name], expected[name])]
        assert not differing, f"seed {SEED}"


@pytest.mark.parametrize(("conv", "groups"), MODELS)
def test_another_seed_gives_other_weights(conv: str, groups: int) -> None:
    state = _seeded(conv, groups, "cpu").state_dict()
    torch.manual_seed(SEED + 1)
    other = _model(conv, groups, "cpu").state_dict()
    drawn = [name for name in state if state[name].ndim > 1]
    assert drawn
    assert all((state[name] != other[name]).float().mean() > 0.99 for name in drawn)
