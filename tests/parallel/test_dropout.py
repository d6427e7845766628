"""Dropout of split channels: every rank drops differently, the same seed drops the same, and the mean stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.parallel.common import SEED, run_ranks_once
from tlgc_mp.parallel import shard
from tlgc_mp.parallel.layers import ParallelDropout

RANKS, BATCH, CHANNELS = 2, 500, 512
SHARES = [0.0, 0.2, 0.5, 1.0]


def _dropout(share: float, ranks: int, inplace: bool = False) -> nn.Module:
    """The dropout of a network that is split over ``ranks`` ranks, or over one."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Dropout(share, inplace), nn.Flatten(), nn.Linear(8, 10))
    group, _ = dist.new_subgroups(group_size=ranks)
    dropout = shard(model, group).get_submodule("1")
    assert type(dropout) is ParallelDropout
    return dropout


def _dropped(dropout: nn.Module, seed: int, passes: int = 1) -> list[Tensor]:
    torch.manual_seed(seed)
    return [dropout(torch.ones(BATCH, CHANNELS)) for _ in range(passes)]


def _recomputed(dropout: nn.Module) -> bool:
    """Whether activation checkpointing drops in backward what it dropped in forward."""
    x = torch.ones(BATCH, CHANNELS, requires_grad=True)
    out = checkpoint(dropout, x, use_reentrant=False)
    (grad,) = torch.autograd.grad(out.sum(), x)
    return torch.equal(grad, out)


def _on_ranks() -> dict[str, Any]:
    answers: dict[str, Any] = {}
    for share in SHARES:
        dropout = _dropout(share, RANKS)
        answers[f"share {share}"] = _dropped(dropout, SEED)[0]
        answers[f"evaluation {share}"] = _dropped(dropout.eval(), SEED)[0]
        answers[f"share {share}, in place"] = _dropped(_dropout(share, RANKS, inplace=True), SEED)[0]
        answers[f"share {share}, one rank"] = _dropped(_dropout(share, 1), SEED)[0]
    dropout = _dropout(0.2, RANKS)
    answers["first"] = _dropped(dropout, SEED, 2)
    answers["again"] = _dropped(_dropout(0.2, RANKS), SEED, 2)
    answers["other"] = _dropped(dropout, SEED + 1, 2)
    answers["recomputed"] = _recomputed(dropout)
    answers["bfloat16"] = dropout(torch.ones(BATCH, CHANNELS, dtype=torch.bfloat16)).dtype
    return answers


def _answers() -> list[dict[str, Any]]:
    return run_ranks_once(RANKS, _on_ranks)


def _agreement(first: Tensor, second: Tensor) -> float:
    """Of how many values both keep, or both drop."""
    return ((first == 0) == (second == 0)).float().mean().item()


@pytest.mark.parametrize("share", SHARES)
def test_share_that_is_dropped_and_mean(share: float) -> None:
    for answers in _answers():
        found = answers[f"share {share}"]
        kept = found[found != 0]
        assert (kept == 1 / (1 - share)).all() if share < 1 else not len(kept)
        # 256000 values: four standard errors of the share are 0.004 at most.
        assert 1 - len(kept) / found.numel() == pytest.approx(share, abs=0.004), f"seed {SEED}"
        assert torch.equal(answers[f"share {share}, in place"], found)
        assert torch.equal(answers[f"evaluation {share}"], torch.ones(BATCH, CHANNELS))


def test_ranks_seeded_alike_drop_independently() -> None:
    """Of two independent masks with 0.2 dropped, 0.8^2 + 0.2^2 of the values agree."""
    first, second = _answers()
    for one, other in zip(first["first"], second["first"], strict=True):
        assert _agreement(one, other) == pytest.approx(0.68, abs=0.005), f"seed {SEED}"


def test_the_seed_makes_the_mask() -> None:
    for answers in _answers():
        for step in range(2):
            assert torch.equal(answers["first"][step], answers["again"][step])
            assert _agreement(answers["first"][step], answers["other"][step]) == pytest.approx(0.68, abs=0.005)
        assert _agreement(*answers["first"]) == pytest.approx(0.68, abs=0.005), "two passes drop alike"


@pytest.mark.parametrize("share", SHARES)
def test_one_rank_drops_what_torch_does(share: float) -> None:
    torch.manual_seed(SEED)
    expected = nn.Dropout(share)(torch.ones(BATCH, CHANNELS))
    for answers in _answers():
        assert torch.equal(answers[f"share {share}, one rank"], expected)


def test_activation_checkpointing_drops_the_same_twice() -> None:
    assert [answers["recomputed"] for answers in _answers()] == [True] * RANKS


def test_type_is_kept() -> None:
    assert [answers["bfloat16"] for answers in _answers()] == [torch.bfloat16] * RANKS
