"""Dropout of split channels drops, at every P, what one device drops of all channels."""

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

WORLD, CHANNELS = 4, 24
SPLITS = [1, 2, 4]
SHARES = [0.0, 0.2, 0.5, 1.0]
INPUTS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "features": ((50, CHANNELS), {}),
    "contiguous maps": ((5, CHANNELS, 3, 4), {}),
    "channels_last maps": ((5, CHANNELS, 3, 4), {"memory_format": torch.channels_last}),
    "one position": ((50, CHANNELS, 1, 1), {"memory_format": torch.channels_last}),
    "bfloat16": ((50, CHANNELS), {"dtype": torch.bfloat16}),
}


def _input(name: str) -> Tensor:
    shape, options = INPUTS[name]
    return torch.arange(1.0, 1.0 + torch.Size(shape).numel()).view(shape).to(**options)


def _dropped(dropout: nn.Module, x: Tensor) -> Tensor:
    """Of two passes, so that the second goes on where the first has left the random state."""
    torch.manual_seed(SEED)
    return torch.stack([dropout(x.clone(memory_format=torch.preserve_format)) for _ in range(2)])


def _dropout(ranks: int, share: float, inplace: bool) -> nn.Module:
    """The dropout of a network that is split over ``ranks`` ranks."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Dropout(share, inplace), nn.Flatten(), nn.Linear(8, 10))
    group, _ = dist.new_subgroups(group_size=ranks)
    dropout = shard(model, group).get_submodule("1")
    assert type(dropout) is ParallelDropout
    return dropout


def _mine(x: Tensor, ranks: int) -> Tensor:
    """This rank's channels of ``x``, in the memory format of ``x``."""
    return x.tensor_split(ranks, dim=1)[dist.get_rank() % ranks].clone(memory_format=torch.preserve_format)


def _on_ranks() -> dict[Any, Any]:
    answers: dict[Any, Any] = {}
    for ranks in SPLITS:
        for inplace in (False, True):
            for share in SHARES:
                dropout = _dropout(ranks, share, inplace)
                for name in INPUTS:
                    answers[ranks, share, inplace, name] = _dropped(dropout, _mine(_input(name), ranks))
                    answers["evaluation", ranks, share, inplace, name] = dropout.eval()(_mine(_input(name), ranks))
                    dropout.train()
        x = _mine(_input("channels_last maps"), ranks).requires_grad_()
        out = checkpoint(_dropout(ranks, 0.2, False), x, use_reentrant=False)
        (grad,) = torch.autograd.grad(out.sum(), x)
        answers["recomputed", ranks] = torch.equal(grad * x, out) and bool((grad == 0).any())
    return answers


def _answers() -> list[dict[Any, Any]]:
    return run_ranks_once(WORLD, _on_ranks)


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("ranks", SPLITS)
def test_what_one_device_drops(ranks: int, share: float, inplace: bool, name: str) -> None:
    whole = _dropped(nn.Dropout(share), _input(name))
    assert (whole == 0).float().mean().item() == pytest.approx(share, abs=0.1)
    for first in range(0, WORLD, ranks):
        of_the_ranks = [answers[ranks, share, inplace, name] for answers in _answers()[first : first + ranks]]
        found = torch.cat(of_the_ranks, dim=2)
        assert found.dtype == whole.dtype
        assert torch.equal(found, whole), f"seed {SEED}"


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("ranks", SPLITS)
def test_nothing_is_dropped_in_evaluation(ranks: int, share: float, name: str) -> None:
    for inplace in (False, True):
        for rank, answers in enumerate(_answers()):
            expected = _input(name).tensor_split(ranks, dim=1)[rank % ranks]
            assert torch.equal(answers["evaluation", ranks, share, inplace, name], expected)


@pytest.mark.parametrize("ranks", SPLITS)
def test_activation_checkpointing_drops_the_same_twice(ranks: int) -> None:
    assert [answers["recomputed", ranks] for answers in _answers()] == [True] * WORLD
