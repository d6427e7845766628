"""ShuffleConv2d split over P ranks, evenly and not; and what it sends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parallel.common import SEED, assert_close, batches, gather_gradients, run_ranks_once
from tests.parallel.test_collectives_counted import Recorder
from tlgc_mp.nn import FullyLearnableGroupConv2d, ShuffleConv2d
from tlgc_mp.parallel import gather_state_dict, shard
from tlgc_mp.parallel.split_tensor import split, whole

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
    answers = {}
    for groups, channels in cases:
        for layout, memory_format in FORMATS.items():
            layer, x, weights = _case(groups, channels, layout)
            layer = shard(layer)
            ranks = layer.get_submodule("0").tlgc_region.ranks
            given, given_weights = (split(tensor, 1, ranks) for tensor in (x.requires_grad_(), weights))
            recorder = Recorder()
            out = layer.get_submodule("0")(given)
            (given_grad,) = torch.autograd.grad(out, given, given_weights, retain_graph=True)
            sent = list(recorder.collectives)
            out.backward(given_weights)
            assert out.cut.dim == given_grad.cut.dim == 1 and type(x.grad) is Tensor
            assert torch.equal(whole(given_grad), x.grad)
            kept = out.share.is_contiguous(memory_format=memory_format)
            found = {"output": whole(out).detach(), "input gradient": x.grad}
            answers[groups, channels, layout] = ({**found, **gather_gradients(layer)}, kept, sent)
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


def _learned_groups() -> nn.Module:
    torch.manual_seed(SEED)
    layer = FullyLearnableGroupConv2d(8, 8, 3, padding=1, groups=2)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), layer, nn.Flatten(), nn.Linear(288, 10)).double()


def _step(model: nn.Module) -> Tensor:
    images, labels = batches(1, 4, torch.float64)[0]
    logits = model(images)
    F.cross_entropy(logits, labels).backward()
    with torch.no_grad():
        for param in model.parameters():
            assert param.grad is not None
            param -= param.grad
    return logits.detach()


def _with_learned_groups() -> tuple[str, dict[str, Tensor]]:
    model = shard(_learned_groups())
    logits = _step(model)
    return model.get_submodule("2").tlgc_placement.kind, {"logits": logits, **gather_state_dict(model)}


def test_learned_groups_are_held_whole_by_every_rank() -> None:
    model = _learned_groups()
    logits = _step(model)
    for kind, found in run_ranks_once(2, _with_learned_groups):
        assert kind == "whole"
        assert_close(found, {"logits": logits, **model.state_dict()}, 1e-12)


def _alone() -> int:
    return len(list(shard(FullyLearnableGroupConv2d(8, 8, 3, groups=2)).parameters()))


def test_learned_groups_on_one_rank_are_left_as_they_are() -> None:
    assert run_ranks_once(1, _alone) == [3]
