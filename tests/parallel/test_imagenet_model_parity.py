"""MobileNetV2 and the WideResNet for ImageNet, split over P ranks, against the same network on one device.

float64, under plain torch.distributed and in the engine. With the dropout of MobileNetV2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parallel.common import (
    SEED,
    TrainingRun,
    assert_close,
    assert_gradients_close,
    batches,
    coarse_from_the_first,
    gather_gradients,
    run_ranks_once,
    train_one_device,
)
from tlgc_mp import create_model
from tlgc_mp.engine import initialize
from tlgc_mp.models.wide_resnet import WideResNet, imagenet_stem
from tlgc_mp.nn import TwoLevelConv2d, init_parameters
from tlgc_mp.parallel import gather_state_dict, shard

Network = tuple[str, str, int]
"""(name, convolution, N)"""

NARROW = "narrow"
"""The WideResNet for ImageNet with fewer units, in two stages of fewer channels."""

CONVOLUTIONS: dict[str, Callable[..., nn.Module]] = {
    "sc": functools.partial(nn.Conv2d, bias=False),
    "gc": functools.partial(nn.Conv2d, bias=False),
    "gc-2l": functools.partial(TwoLevelConv2d, coarse_init="he"),
}
SPLIT: list[tuple[int, Network]] = [
    *((2, (name, conv, groups)) for name in ("mobilenet_v2", NARROW) for conv, groups in (("sc", 1), ("gc", 4))),
    *((ranks, (name, "gc-2l", 4)) for name in ("mobilenet_v2", NARROW) for ranks in (2, 4)),
    (2, ("imagenet-wrn-34-2", "gc-2l", 16)),
]
"""(P, network)"""

STEPS, BATCH, SIDE = 3, 4, 64
ENGINES: list[Network] = [("mobilenet_v2", "gc-2l", 4), (NARROW, "gc-2l", 4), ("mobilenet_v2", "sc", 1)]

TOLERANCE = 1e-9
LEAST = 1e-4
"""Smaller values are rounding errors of zero: where nothing but a 1x1 convolution is between two BatchNorm layers, the
first one's bias shifts what the second one centres."""


def _sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-4)


def _model(network: Network, device: str, dtype: torch.dtype) -> nn.Module:
    """``network`` with the initial weights of :data:`SEED`, or on the meta device about to get them."""
    name, conv, groups = network
    torch.manual_seed(SEED)
    if name == NARROW:
        make = functools.partial(CONVOLUTIONS[conv], groups=groups)
        with torch.device("meta"):
            model: nn.Module = WideResNet(imagenet_stem(), 64, [(64, 1), (96, 2)], 10, make).to(dtype)
        if device != "meta":
            init_parameters(model.to_empty(device=device), SEED)
    else:
        model = create_model(
            name, conv=conv, groups=groups, num_classes=10, device=device, **coarse_from_the_first(conv)
        ).to(dtype)
    return model


def _one_pass(model: nn.Module) -> Tensor:
    images, labels = batches(1, BATCH, torch.float64, side=SIDE)[0]
    torch.manual_seed(SEED)  # of the dropout
    logits = model(images)
    F.cross_entropy(logits, labels).backward()
    return logits.detach()


def _trained(model: nn.Module) -> TrainingRun:
    optimizer = _sgd(model.parameters())
    losses = []
    torch.manual_seed(SEED)
    for images, labels in batches(STEPS, BATCH, torch.float64, side=SIDE):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return TrainingRun(losses=[losses], states=[gather_state_dict(model)])


def _on_ranks(networks: tuple[Network, ...]) -> dict[Network, Any]:
    """By network: the initial state, the logits, the gradients, and what a few steps of SGD left behind."""
    answers = {}
    for network in networks:
        model = shard(_model(network, "meta", torch.float64))
        initial = gather_state_dict(model)
        logits = _one_pass(model)
        gradients = gather_gradients(model)
        answers[network] = (initial, logits, gradients, _trained(shard(_model(network, "cpu", torch.float64))))
    return answers


def _answers(ranks: int, network: Network) -> list[Any]:
    networks = tuple(other for p, other in SPLIT if p == ranks)
    return [answers[network] for answers in run_ranks_once(ranks, _on_ranks, networks)]


@pytest.mark.parametrize(("ranks", "network"), SPLIT, ids=str)
def test_initial_weights_logits_and_gradients(ranks: int, network: Network) -> None:
    model = _model(network, "cpu", torch.float64)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = _one_pass(model)
    gradients = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    for initial, logits, found, _ in _answers(ranks, network):
        assert set(initial) == set(state)
        assert not [key for key in state if not torch.equal(initial[key], state[key])], f"seed {SEED}"
        assert_close({"logits": logits}, {"logits": expected}, TOLERANCE)
        assert_gradients_close(found, gradients, TOLERANCE)


@pytest.mark.parametrize(("ranks", "network"), SPLIT, ids=str)
def test_a_few_steps_of_sgd(ranks: int, network: Network) -> None:
    data = batches(STEPS, BATCH, torch.float64, side=SIDE)
    expected = train_one_device(_model(network, "cpu", torch.float64), data, _sgd)
    assert expected.losses[0][0] != pytest.approx(expected.losses[0][-1], rel=0.01), "nothing was trained"
    for *_, run in _answers(ranks, network):
        assert run.losses[0] == pytest.approx(expected.losses[0], rel=TOLERANCE)
        assert_close(run.states[0], expected.states[0], TOLERANCE, LEAST)


def _engines_on_ranks() -> dict[Network, TrainingRun]:
    """float64 and so ZeRO 0, since the other stages step a copy in float32."""
    config = {
        "train_batch_size": BATCH,
        "tensor_parallel": {"autotp_size": 2},
        "zero_optimization": {"stage": 0},
        "zero_allow_untested_optimizer": True,
    }
    answers = {}
    for network in ENGINES:
        model = _model(network, "meta", torch.float64)
        engine, *_ = initialize(model=model, optimizer=_sgd, config=config, seed=SEED)
        losses = []
        torch.manual_seed(SEED)
        for images, labels in batches(STEPS, BATCH, torch.float64, side=SIDE):
            loss = F.cross_entropy(engine(images), labels)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        answers[network] = TrainingRun(losses=[losses], states=[gather_state_dict(engine.module)])
    return answers


@pytest.mark.parametrize("network", ENGINES, ids=str)
def test_engine(network: Network) -> None:
    data = batches(STEPS, BATCH, torch.float64, side=SIDE)
    expected = train_one_device(_model(network, "cpu", torch.float64), data, _sgd)
    for answers in run_ranks_once(2, _engines_on_ranks):
        assert answers[network].losses[0] == pytest.approx(expected.losses[0], rel=TOLERANCE)
        assert_close(answers[network].states[0], expected.states[0], TOLERANCE, LEAST)
