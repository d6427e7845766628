"""Converted torchvision and timm networks split over two ranks, against the same networks on one device.

Each takes two steps inside the DeepSpeed engine in float64. In float32 rounding at the kinks of ReLUs would be trained
on, so that a forward pass is compared, and of the ResNets: the fifty BatchNorm layers of a MobileNet make a hundred
times as much of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from tests.parallel.common import SEED, assert_close, run_ranks_once
from tlgc_mp import convert
from tlgc_mp.engine import initialize
from tlgc_mp.nn import TwoLevelConv2d
from tlgc_mp.parallel import gather_state_dict
from tlgc_mp.parallel.sharded import ShardedLayer

RANKS, GROUPS = 2, 4


def _not_squeeze_and_excite(name: str, layer: nn.Module) -> bool:
    return ".se." not in name


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "torchvision resnet18": (torchvision.models.resnet18, {}),
    "torchvision mobilenet_v2": (torchvision.models.mobilenet_v2, {}),
    "timm resnet10t": (functools.partial(timm.create_model, "resnet10t"), {"init": "from_dense"}),
    "timm mobilenetv2_050": (functools.partial(timm.create_model, "mobilenetv2_050"), {}),
    "timm seresnet18": (functools.partial(timm.create_model, "seresnet18"), {"where": _not_squeeze_and_excite}),
    "timm regnetx_002": (functools.partial(timm.create_model, "regnetx_002"), {}),
    "timm ecaresnet26t": (functools.partial(timm.create_model, "ecaresnet26t"), {}),
}
"""Name -> how it is made, and what it is converted with. timm's mobilenetv2 has BatchNorm with an activation."""

OTHERS: dict[str, set[str]] = {
    "torchvision resnet18": {"column"},
    "torchvision mobilenet_v2": {"column", "grouped"},
    "timm resnet10t": {"column"},
    "timm mobilenetv2_050": {"column", "grouped"},
    "timm seresnet18": {"column", "row"},  # its squeeze-and-excite stays dense
    "timm regnetx_002": {"column", "grouped", "row"},  # of 3 groups, cut within each
    "timm ecaresnet26t": {"column", "whole"},  # convolves the channels' means along the channels
}
"""Name -> how its convolutions are placed that are not two-level."""

IN_FLOAT32 = [name for name in MODELS if "mobilenet" not in name]


def _model(name: str) -> nn.Module:
    torch.manual_seed(SEED)
    make, arguments = MODELS[name]
    model = convert(make(num_classes=10), groups=GROUPS, **arguments)  # type: ignore[call-arg]
    if "init" not in arguments:
        for layer in model.modules():
            if isinstance(layer, TwoLevelConv2d):  # so that the coarse level has its part in the very first output
                nn.init.normal_(layer.prolongation, 0.0, GROUPS**-0.5)
    return model


def _sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


@dataclass
class Steps:
    """Of each of two steps the loss and the logits before it; the whole model's state in the end; how many layers are
    two-level, and how the other convolutions are placed."""

    losses: list[float] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)
    two_level: int = 0
    others: set[str] = field(default_factory=set)


def _two_steps(model: Callable[[Tensor], Tensor], backward: Any, step: Any, dtype: torch.dtype) -> Steps:
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randn(4, 3, 64, 64, generator=generator).to(dtype)
    labels = torch.randint(0, 10, (4,), generator=generator)
    steps = Steps()
    torch.manual_seed(SEED)  # of the dropout
    for _ in range(2):
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        backward(loss)
        step()
        steps.losses.append(loss.item())
        steps.logits.append(logits.detach())
    return steps


def _on_ranks() -> dict[Any, Steps]:
    answers = {}
    config = {
        "train_batch_size": 4,
        "tensor_parallel": {"autotp_size": RANKS},
        "zero_allow_untested_optimizer": True,
    }
    runs = [(name, torch.float32) for name in IN_FLOAT32] + [(name, torch.float64) for name in MODELS]
    for name, dtype in runs:
        engine, *_ = initialize(model=_model(name).to(dtype), optimizer=_sgd, config=config)
        steps = _two_steps(engine, engine.backward, engine.step, dtype)
        steps.state = gather_state_dict(engine.module)
        steps.two_level = sum(isinstance(module, TwoLevelConv2d) for module in engine.module.modules())
        for module in engine.module.modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d) and isinstance(module, ShardedLayer):
                steps.others.add(module.tlgc_placement.kind)
        answers[name, dtype] = steps
    return answers


def _one_device(name: str, dtype: torch.dtype) -> Steps:
    model = _model(name).to(dtype)
    optimizer = _sgd(model.parameters())

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    steps = _two_steps(model, Tensor.backward, step, dtype)
    steps.state = model.state_dict()
    steps.two_level = len(model.conversion.replaced)  # type: ignore[union-attr, arg-type]
    return steps


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_a_forward_pass_in_float32(name: str) -> None:
    expected = _one_device(name, torch.float32)
    for answers in run_ranks_once(RANKS, _on_ranks):
        found = answers[name, torch.float32]
        assert found.losses[0] == pytest.approx(expected.losses[0], rel=1e-4)
        assert_close({"logits": found.logits[0]}, {"logits": expected.logits[0]}, 1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_two_steps_in_float64(name: str) -> None:
    expected = _one_device(name, torch.float64)
    assert abs(expected.losses[1] - expected.losses[0]) > 0.01, "nothing was trained"
    for answers in run_ranks_once(RANKS, _on_ranks):
        found = answers[name, torch.float64]
        assert found.two_level == expected.two_level > 10
        assert found.others == OTHERS[name]
        assert found.losses == pytest.approx(expected.losses, rel=1e-9)
        assert_close({"logits": found.logits[1]}, {"logits": expected.logits[1]}, 1e-9)
        # Some are zero but for rounding: what stands before a BatchNorm has no mean, and needs no bias.
        assert_close(found.state, expected.state, 1e-9, least=1e-4)
