"""A row-parallel layer gathers its output's gradient once, for the gradients of its input and of its weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parallel.common import SEED, assert_close, gather_gradients, run_ranks_once
from tlgc_mp.parallel import collectives, shard

RANKS, BATCH, WIDTH = 2, 3, 16


class _Functional(nn.Module):
    """A layer whose parameters other code reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH // 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(input=x, weight=self.layer.weight, bias=self.layer.bias)


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x)[0]


NETWORKS: dict[str, Any] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH // 2),
    "functional": _Functional,
    "attention": _Attention,
}
OTHERS = {"linear": 0, "functional": 0, "attention": 3}
"""Gathers of as many bytes: of the heads' gradient, of the input for the gradient of the weight, and of the gradient of
the layer before."""


def _model(name: str) -> nn.Module:
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), NETWORKS[name](), nn.Tanh()).double()


def _input() -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(BATCH, 5, WIDTH, generator=generator, dtype=torch.float64)


def _penalized(model: nn.Module) -> Tensor:
    """A loss with the gradient of its input in it."""
    x = _input().requires_grad_()
    output = model(x)
    (slope,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    return output.sum() + slope.square().sum()


def _step(name: str) -> tuple[list[int], dict[str, Tensor], dict[str, Tensor]]:
    """Bytes of each gather of a backward pass, its gradients, and those of :func:`_penalized`."""
    model = shard(_model(name))
    loss = model(_input()).square().sum()
    sent: list[int] = []
    collectives.recorders.append(lambda kind, size: sent.append(size) if kind == "all_gather" else None)
    loss.backward()
    collectives.recorders.clear()
    gradients = gather_gradients(model)
    model.zero_grad()
    _penalized(model).backward()
    return sent, gradients, gather_gradients(model)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_gradient_of_the_output_is_gathered_once(name: str) -> None:
    model = _model(name)
    outputs = model(_input())
    share = outputs.numel() // RANKS * outputs.element_size()
    for sent, _, _ in run_ranks_once(RANKS, _step, name):
        assert sent.count(share) == 1 + OTHERS[name], sent


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_of_one_device(name: str) -> None:
    model = _model(name)
    expected: list[dict[str, Any]] = []
    for loss in (model(_input()).square().sum(), _penalized(model)):
        model.zero_grad()
        loss.backward()
        expected.append({key: param.grad for key, param in model.named_parameters()})
    for _, *found in run_ranks_once(RANKS, _step, name):
        for gradients, single in zip(found, expected, strict=True):
            assert_close(gradients, single, 1e-9, 1e-6)
