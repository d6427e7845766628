"""The same seed gives the same initial weights, bit by bit, at every P, from a model with values or on meta."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.parallel.common import SEED, coarse_from_the_first, run_ranks_once, seeded_model
from tlgc_mp import create_model
from tlgc_mp.parallel import gather_state_dict, shard

MODELS = (("gc-2l", 4), ("gc", 4), ("sc", 1))


def _initial_states() -> dict[tuple[str, int, str], dict[str, Tensor]]:
    """(convolution, P, device the model was built on) -> the whole state, of models split over 1, 2 and 4 ranks."""
    states = {}
    for ranks in (1, 2, 4):
        group, _ = dist.new_subgroups(group_size=ranks)
        for conv, groups in MODELS:
            for device in ("cpu", "meta"):
                model = seeded_model(conv, groups, torch.float32, device)
                torch.randn(dist.get_rank() + 1)
                states[conv, ranks, device] = gather_state_dict(shard(model, group))
            given = create_model("wrn-10-2", conv=conv, groups=groups, device="meta", **coarse_from_the_first(conv))
            torch.manual_seed(SEED + 1)
            states[conv, ranks, "meta, seed given"] = gather_state_dict(shard(given, group, seed=SEED))
    return states


@pytest.mark.parametrize("device", ["cpu", "meta", "meta, seed given"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("conv", "groups"), MODELS)
def test_weights_do_not_depend_on_the_split(conv: str, groups: int, ranks: int, device: str) -> None:
    expected = seeded_model(conv, groups, torch.float32, "cpu").state_dict()
    for states in run_ranks_once(4, _initial_states):
        found = states[conv, ranks, device]
        assert set(found) == set(expected)
        differing = [name for name in expected if not torch.equal(found[name], expected[name])]
        assert not differing, f"seed {SEED}"


@pytest.mark.parametrize(("conv", "groups"), MODELS)
def test_another_seed_gives_other_weights(conv: str, groups: int) -> None:
    state = seeded_model(conv, groups, torch.float32, "cpu").state_dict()
    torch.manual_seed(SEED + 1)
    other = create_model("wrn-10-2", conv=conv, groups=groups, **coarse_from_the_first(conv)).state_dict()
    drawn = [name for name in state if state[name].ndim > 1]
    assert drawn
    assert all((state[name] != other[name]).float().mean() > 0.99 for name in drawn)
