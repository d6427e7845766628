"""ShuffleConv2d split over P ranks, evenly and not; and what it sends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.parallel.common import SEED, assert_close, gather_gradients, gather_shares, run_ranks_once
from tests.parallel.test_collectives_counted import Recorder
from tlgc_mp.errors import UsageError
from tlgc_mp.nn import FullyLearnableGroupConv2d, ShuffleConv2d
from tlgc_mp.parallel import shard

CASES = [(2, 2, 8), (2, 2, 6), (2, 4, 12), (3, 3, 12), (3, 6, 6), (4, 4, 4), (4, 8, 24), (4, 4, 8)]
"""(P, N, m); in the last a rank does not get as much from another as it gives to it."""

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
BATCH, HEIGHT, WIDTH = 3, 5, 4
DOUBLE = 8


def _case(groups: int, channels: int, layout: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The whole layer, its whole input, and weights of its outputs in a loss."""
    torch.manual_seed(SEED)
    layer = ShuffleConv2d(2 * groups, channels, 3, padding=1, groups=groups, bias=True, dtype=torch.float64)
    nn.init.normal_(layer.bias)  # type: ignore[arg-type]
    x = torch.randn(BATCH, 2 * groups, HEIGHT, WIDTH, dtype=torch.float64)
    weights = torch.randn(BATCH, channels, HEIGHT, WIDTH, dtype=torch.float64)
    return nn.Sequential(layer), x.contiguous(memory_format=FORMATS[layout]), weights


def _pass(layer: nn.Module, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    x = x.requires_grad_()
    y = layer(x)
    (weights * y).sum().backward()
    assert x.grad is not None
    return {"output": y.detach(), "input gradient": x.grad}


def _on_ranks(cases: tuple[tuple[int, int], ...]) -> dict[Any, Any]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    assert group is not None
    answers = {}
    for groups, channels in cases:
        for layout, memory_format in FORMATS.items():
            layer, x, weights = _case(groups, channels, layout)
            layer = shard(layer)
            share = x.chunk(ranks, dim=1)[rank].contiguous(memory_format=memory_format)
            recorder = Recorder()
            found = _pass(layer, share, weights.chunk(ranks, dim=1)[rank])
            sent = list(recorder.collectives)
            kept = found["output"].is_contiguous(memory_format=memory_format)
            whole = {key: gather_shares(value, 1, group) for key, value in found.items()}
            answers[groups, channels, layout] = ({**whole, **gather_gradients(layer)}, kept, sent)
    return answers


def _answers(ranks: int) -> list[Any]:
    return run_ranks_once(ranks, _on_ranks, tuple((groups, m) for p, groups, m in CASES if p == ranks))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("ranks", "groups", "channels"), CASES)
def test_split_layer_computes_what_the_whole_one_does(ranks: int, groups: int, channels: int, layout: str) -> None:
    layer, x, weights = _case(groups, channels, layout)
    expected = _pass(layer, x, weights)
    expected |= {name: param.grad for name, param in layer.named_parameters() if param.grad is not None}
    for answers in _answers(ranks):
        found, kept, _ = answers[groups, channels, layout]
        assert_close(found, expected, 1e-12)
        assert kept


@pytest.mark.parametrize(("ranks", "groups", "channels"), CASES)
def test_it_exchanges_all_of_its_output_and_of_its_gradient(ranks: int, groups: int, channels: int) -> None:
    share = channels // ranks * BATCH * HEIGHT * WIDTH * DOUBLE
    for answers in _answers(ranks):
        for layout in FORMATS:
            kinds, *bytes_ = zip(*answers[groups, channels, layout][2], strict=True)
            assert all(kind.startswith("ALLTOALL") for kind in kinds)  # each release of torch names it in its own way
            assert bytes_ == [(share, share), (share, share)]


def _refused() -> str:
    with pytest.raises(UsageError) as caught:
        shard(nn.Sequential(nn.Conv2d(3, 8, 3), FullyLearnableGroupConv2d(8, 8, 3, groups=2)))
    return str(caught.value)


def test_learned_groups_are_refused_with_the_reason() -> None:
    for message in run_ranks_once(2, _refused):
        assert message.startswith("1: a FullyLearnableGroupConv2d cannot be split over ranks: its groups are learned")


def _alone() -> int:
    return len(list(shard(FullyLearnableGroupConv2d(8, 8, 3, groups=2)).parameters()))


def test_learned_groups_on_one_rank_are_left_as_they_are() -> None:
    assert run_ranks_once(1, _alone) == [3]
