"""Layers of waveforms and of volumes split over P ranks, with a BatchNorm after each, against one device."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.parallel.common import SEED, assert_close, gather_gradients, run_ranks_once
from tlgc_mp import nn as layers
from tlgc_mp.nn.two_level import TwoLevelConvNd
from tlgc_mp.parallel import gather_state_dict, shard
from tlgc_mp.parallel.sharded import ShardedLayer
from tlgc_mp.parallel.split_tensor import whole

GROUPS = 4
RANKS = (1, 2, 4)
SIZES = {1: (13,), 3: (5, 7, 6)}
NORMS: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 3: nn.BatchNorm3d}
WINDOWS: dict[str, dict[str, Any]] = {
    "padded": dict(kernel_size=3, padding=1),
    "bias, stride 2": dict(kernel_size=3, padding=1, stride=2, bias=True),
    "dilated, same": dict(kernel_size=3, padding="same", dilation=2, bias=True),
}
COARSE: dict[str, dict[str, Any]] = {
    **{
        f"{mode}, r = {count}, {'summed' if summed else 'apart'}": dict(
            kind="TwoLevelConv", coarse_mode=mode, coarse_channels=count, coarse_sum=summed
        )
        for mode, count, summed in itertools.product(("fused", "overlapped"), (1, 2), (False, True))
    },
    "d0 < d": dict(kind="TwoLevelConv", coarse_kernel_size=1),
    "prototype": dict(kind="TwoLevelPrototypeConv", coarse_channels=2),
    "balanced": dict(kind="BalancedConv"),
    "shuffle": dict(kind="ShuffleConv"),
}
CASES = [(window, coarse) for window in WINDOWS for coarse in COARSE]


def _case(dims: int, window: str, coarse: str, last: bool) -> tuple[nn.Module, Tensor]:
    """The whole layer with a BatchNorm after it, and its whole input; the same wherever it is called."""
    torch.manual_seed(SEED)
    arguments = WINDOWS[window] | COARSE[coarse]
    mode, kind = arguments.pop("coarse_mode", None), getattr(layers, f"{arguments.pop('kind')}{dims}d")
    layer = kind(2 * GROUPS, 3 * GROUPS, groups=GROUPS, **arguments)
    if mode is not None:
        layer.coarse_mode = mode
    model = nn.Sequential(layer, NORMS[dims](3 * GROUPS)).double()
    for param in model.parameters():
        nn.init.normal_(param)
    x = torch.randn(3, 2 * GROUPS, *SIZES[dims], dtype=torch.float64)
    return model, x.contiguous(memory_format=torch.channels_last_3d) if last else x


def _forward_and_backward(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The outputs of both layers and the gradients of all, of a loss that weighs every output at random."""
    x = x.requires_grad_()
    y = model[0](x)  # type: ignore[index]
    z = model[1](y)  # type: ignore[index]
    weights = torch.randn((2, *y.shape), generator=torch.Generator().manual_seed(SEED)).double()
    (weights[0] * y + weights[1] * z).sum().backward()
    assert x.grad is not None
    return {"output": y.detach(), "normalized": z.detach(), "input gradient": x.grad}


def _on_ranks(dims: int) -> dict[Any, dict[str, Tensor]]:
    answers = {}
    for (window, coarse), last in itertools.product(CASES, (False, True) if dims == 3 else (False,)):
        model, x = _case(dims, window, coarse, last)
        shard(model)
        assert isinstance(model[0], ShardedLayer) and model[0].tlgc_placement.kind != "whole"  # type: ignore[index]
        found = _forward_and_backward(model, x)
        if isinstance(model[0], TwoLevelConvNd):  # torch's own convolution of volumes loses the format in float64
            form = torch.channels_last_3d if last else torch.contiguous_format
            lost = {key: value.stride() for key, value in found.items() if not value.is_contiguous(memory_format=form)}
            assert not lost, f"{dims}, {window}, {coarse}, {form}"
        state = gather_state_dict(model)
        statistics = {key: value for key, value in state.items() if "running" in key}
        answers[window, coarse, last] = {**whole(found), **gather_gradients(model), **statistics}
    return answers


@pytest.mark.parametrize("coarse", COARSE)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dims", SIZES)
@pytest.mark.parametrize("ranks", RANKS)
def test_split_layer_computes_what_the_whole_one_does(ranks: int, dims: int, window: str, coarse: str) -> None:
    for last in (False, True) if dims == 3 else (False,):
        model, x = _case(dims, window, coarse, last)
        expected = _forward_and_backward(model, x)
        expected |= {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
        expected |= {key: value for key, value in model.state_dict().items() if "running" in key}
        for answers in run_ranks_once(ranks, _on_ranks, dims):
            assert_close(answers[window, coarse, last], expected, 1e-9)
