"""Optimizers that take norms of whole parameters are refused where ranks hold shares, and those that do not are not."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from tests.ranks import run_ranks
from tlgc_mp.errors import UsageError
from tlgc_mp.parallel import shard
from tlgc_mp.parallel.elementwise import check_elementwise


class LARS(torch.optim.SGD):
    """A rate for each parameter: its norm by that of its gradient."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param -= group["lr"] * param.norm() / param.grad.norm() * param.grad


class Clipped(torch.optim.SGD):
    """Its own clipping shows only where gradients are large."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1000.0)
        return super().step(closure)


class Noisy(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                param += torch.randn_like(param)


class Lookahead(torch.optim.Optimizer):
    """Steps another optimizer, whose groups are its own."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


def _parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(4, 4, 3, 3)), nn.Parameter(torch.ones(4))]


@pytest.mark.parametrize(
    "make",
    [
        LARS,
        Clipped,
        Noisy,
        torch.optim.Adafactor,
        torch.optim.LBFGS,
        lambda params: torch.optim.Muon(nn.Linear(4, 4, bias=False).parameters()),
        lambda params: Lookahead(LARS(params)),
    ],
)
def test_refused(make: Any) -> None:
    with pytest.raises(UsageError, match="optimizer must update each element by itself where 2 tensor-parallel ranks"):
        check_elementwise(make(_parameters()), 2)


@pytest.mark.parametrize(
    "name",
    [
        *("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"),
        "SparseAdam",
    ],
)
def test_passes(name: str) -> None:
    parameters = _parameters()
    optimizer = getattr(torch.optim, name)(parameters)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    steps: list[str] = []
    optimizer.register_step_pre_hook(lambda *args: steps.append(name))
    before = (torch.get_rng_state(), {k: dict(v) for k, v in optimizer.state.items()})
    check_elementwise(optimizer, 2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert {k: dict(v) for k, v in optimizer.state.items()} == before[1] and not steps
    assert all(param.grad is None and (param == 1).all() for param in parameters)
    assert optimizer.param_groups[0]["params"] == parameters and scheduler.last_epoch == 0


def _without_an_engine() -> list[str]:
    def trained(make: Any, of: list[str]) -> str:
        torch.manual_seed(0)
        model = shard(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.Flatten(), nn.Linear(6, 5)))
        layers = [layer for layer in model if hasattr(layer, "weight")]
        optimizer = make([getattr(layer, key) for layer in layers for key in of] or model.parameters())
        try:
            for _ in range(2):
                loss = model(torch.ones(2, 3, 5, 5)).square().sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step(lambda: 0.0) if isinstance(optimizer, torch.optim.LBFGS) else optimizer.step()
        except UsageError as error:
            return str(error)
        return ""

    made = [functools.partial(LARS, lr=0.1), torch.optim.Adafactor, torch.optim.LBFGS, torch.optim.AdamW]
    return [trained(make, names) for names in ([], ["weight", "bias"]) for make in made]


def test_without_an_engine() -> None:
    for said in run_ranks(2, _without_an_engine):
        for kind, message in zip(("LARS", "Adafactor", "LBFGS"), said[:3], strict=True):
            assert f"got {kind}, which takes norms" in message and message.endswith("or give it the layers' weights")
        assert said[3:] == [""] * 5, "element by element, or of whole weights"


def _refusals() -> list[str]:
    from tlgc_mp.engine import initialize

    def config(kind: str | None = None) -> dict[str, Any]:
        named = {} if kind is None else {"optimizer": {"type": kind, "params": {"lr": 0.1}}}
        return {"train_batch_size": 4, "tensor_parallel": {"autotp_size": 2}, **named}

    def network() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))

    def instance() -> dict[str, Any]:
        model = network()
        return {"model": model, "optimizer": torch.optim.Adafactor(model.parameters()), "config": config()}

    said = []
    for arguments in (
        instance(),
        {"optimizer": functools.partial(LARS, lr=0.1), "config": config()},
        {"config": config("Lamb")},
        {"config": config("Adafactor")},
    ):
        with pytest.raises(UsageError) as refused:
            initialize(**{"model": network(), **arguments})
        said.append(str(refused.value))
    engine, *_ = initialize(model=network(), optimizer=functools.partial(torch.optim.AdamW), config=config())
    assert engine.basic_optimizer.state == {}
    return said


def test_by_an_engine_of_two_ranks() -> None:
    instance, made, *configured = run_ranks(2, _refusals)[0]
    assert "got Adafactor, which takes norms" in instance and "got LARS, which takes norms" in made
    for kind, message in zip(("Lamb", "Adafactor"), configured, strict=True):
        assert (
            message.startswith("optimizer.type in the DeepSpeed configuration") and f'got "{kind}"; use SGD' in message
        )
