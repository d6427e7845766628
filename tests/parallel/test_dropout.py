"""Dropout of split channels drops, at every P, what one device drops of all channels.

Both between layers that hand on plain shares, as those of networks do whose code leaves channels apart, and of tensors
that look whole.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.parallel.common import SEED, run_ranks_once
from tlgc_mp.parallel import shard
from tlgc_mp.parallel.sharded import ShardedLayer
from tlgc_mp.parallel.split_tensor import SplitTensor, split, whole

WORLD, CHANNELS = 4, 24
SPLITS = [1, 2, 4]
SHARES = [0.0, 0.2, 0.5, 1.0]
WAYS = ["plain shares", "split tensors"]
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


def _dropout(ranks: int, share: float, inplace: bool) -> ShardedLayer:
    """The dropout of a network that is split over ``ranks`` ranks."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Dropout(share, inplace), nn.Flatten(), nn.Linear(8, 10))
    group, _ = dist.new_subgroups(group_size=ranks)
    dropout = shard(model, group).get_submodule("1")
    assert isinstance(dropout, nn.Dropout) and isinstance(dropout, ShardedLayer)
    assert dropout.tlgc_placement.kind == "dropout"
    return dropout


def _mine(x: Tensor, dropout: ShardedLayer) -> Tensor:
    """This rank's channels of ``x``, in the memory format of ``x``."""
    ranks = dropout.tlgc_region.ranks
    return x.tensor_split(ranks.size, dim=1)[ranks.rank].clone(memory_format=torch.preserve_format)


def _both_ways(dropout: Any, x: Tensor) -> dict[str, Tensor]:
    """Of two passes in training, and then one in evaluation, this rank's channels."""
    answers = {}
    for way in WAYS:
        plain = way == "plain shares"
        given = _mine(x, dropout) if plain else split(x, 1, dropout.tlgc_region.ranks)
        with dropout.tlgc_region.set_plain(plain):
            found = torch.cat([_dropped(dropout.train(), given), dropout.eval()(given)[None]])
        if isinstance(found, SplitTensor):
            assert found.cut.dim == 2
            found = found.share
        answers[way] = found
    return answers


def _is_dropped_in_backward(x: Tensor, out: Tensor) -> bool:
    """Whether the gradient of ``x`` is zero where ``out`` is, and somewhere so."""
    out.sum().backward()
    assert x.grad is not None
    return torch.equal(x.grad * x, out) and bool((x.grad == 0).any())


def _on_ranks() -> dict[Any, Any]:
    answers: dict[Any, Any] = {}
    for ranks in SPLITS:
        for inplace in (False, True):
            for share in SHARES:
                dropout = _dropout(ranks, share, inplace)
                for name in INPUTS:
                    for way, found in _both_ways(dropout, _input(name)).items():
                        answers[ranks, share, inplace, name, way] = found
        dropout = _dropout(ranks, 0.2, False)
        x = _input("channels_last maps").requires_grad_()
        out = checkpoint(dropout, split(x, 1, dropout.tlgc_region.ranks), use_reentrant=False)
        answers["recomputed", ranks, "split tensors"] = _is_dropped_in_backward(x, whole(out))
        x = _mine(_input("channels_last maps"), dropout).requires_grad_()
        with dropout.tlgc_region.set_plain(True):
            answers["recomputed", ranks, "plain shares"] = _is_dropped_in_backward(
                x, checkpoint(dropout, x, use_reentrant=False)
            )
    return answers


def _answers() -> list[dict[Any, Any]]:
    return run_ranks_once(WORLD, _on_ranks)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("ranks", SPLITS)
def test_what_one_device_drops(ranks: int, share: float, inplace: bool, name: str, way: str) -> None:
    expected = _dropped(nn.Dropout(share), _input(name))
    assert (expected == 0).float().mean().item() == pytest.approx(share, abs=0.1)
    for first in range(0, WORLD, ranks):
        of_the_ranks = [answers[ranks, share, inplace, name, way] for answers in _answers()[first : first + ranks]]
        found = torch.cat(of_the_ranks, dim=2)
        assert found.dtype == expected.dtype
        assert torch.equal(found[:2], expected), f"seed {SEED}"
        assert torch.equal(found[2], _input(name)), "something is dropped in evaluation"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ranks", SPLITS)
def test_activation_checkpointing_drops_the_same_twice(ranks: int, way: str) -> None:
    assert [answers["recomputed", ranks, way] for answers in _answers()] == [True] * WORLD
