"""A scheduler is stepped as torch's own loop would step it, or refused: DeepSpeed's engine has no metric to give, and
gives the batch size to one that raises a TypeError."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from tests.parallel.common import SEED, batches
from tests.ranks import run_ranks
from tlgc_mp.errors import UsageError

STEPS = 12
PLATEAU = {"patience": 1, "factor": 0.5, "threshold": 0.2}
METRICS = [3.0, 1.0, 1.0, 1.1, 1.0, 0.5, 0.5, 0.5, 0.6, 0.5, 0.5, 0.4]
"""What a loop would have measured: it stalls four times."""


def _network() -> nn.Sequential:
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def _config(stage: int, **more: Any) -> dict[str, Any]:
    return {
        "train_batch_size": 4,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        **more,
    }


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


class _WantsEpoch:
    """As timm's schedulers are stepped."""

    def step(self, epoch: int, metric: float | None = None) -> None:
        raise AssertionError(f"was given {epoch}")


def _refusals() -> list[str]:
    from tlgc_mp.engine import initialize

    def instance() -> dict[str, Any]:
        network = _network()
        optimizer = _sgd(network.parameters())
        return {"model": network, "optimizer": optimizer, "lr_scheduler": ReduceLROnPlateau(optimizer)}

    given: list[dict[str, Any]] = [
        instance(),
        {"optimizer": _sgd, "lr_scheduler": functools.partial(ReduceLROnPlateau, patience=3)},
        {"optimizer": _sgd, "lr_scheduler": _WantsEpoch()},
        {"optimizer": _sgd, "lr_scheduler": lambda optimizer: _WantsEpoch()},
        *(
            {"optimizer": _sgd, "config": _config(stage, scheduler={"type": "ReduceLROnPlateau", "params": {}})}
            for stage in (0, 1)
        ),
        {"optimizer": torch.optim.LBFGS},
    ]
    said = []
    for arguments in given:
        with pytest.raises(UsageError) as refused:
            initialize(**{"model": _network(), "config": _config(0), **arguments})
        said.append(str(refused.value))
    return said


def test_a_step_that_wants_an_argument_is_refused() -> None:
    instance, callable_, epoch, made, *configured, lbfgs = run_ranks(1, _refusals)[0]
    for message in (instance, callable_):
        assert "got ReduceLROnPlateau, whose step() wants metrics; leave it out, make it over" in message
    for message in (epoch, made):
        assert "got _WantsEpoch, whose step() wants epoch" in message
    for message in configured:
        assert message.startswith("scheduler.type in the DeepSpeed configuration must be one that needs no metric")
    assert "optimizer must have a step() that takes no argument" in lbfgs and "wants closure" in lbfgs


def _plateau_by_hand(stage: int) -> tuple[list[float], list[torch.Tensor]]:
    from tlgc_mp.engine import initialize

    engine, *_ = initialize(model=_network(), optimizer=_sgd, config=_config(stage))
    return _trained(engine, ReduceLROnPlateau(engine.basic_optimizer, **PLATEAU))  # type: ignore[arg-type]


def _plateau_of_torch() -> tuple[list[float], list[torch.Tensor]]:
    network = _network()
    optimizer = _sgd(network.parameters())
    return _trained(network, ReduceLROnPlateau(optimizer, **PLATEAU), optimizer)  # type: ignore[arg-type]


def _trained(
    network: Any, scheduler: ReduceLROnPlateau, optimizer: torch.optim.Optimizer | None = None
) -> tuple[list[float], list[torch.Tensor]]:
    rates = []
    for (images, labels), metric in zip(batches(STEPS, 4, torch.float32), METRICS, strict=True):
        loss = F.cross_entropy(network(images), labels)
        if optimizer is None:
            network.backward(loss)
            network.step()
        else:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step(metric)
        rates.append(scheduler.optimizer.param_groups[0]["lr"])
    return rates, [param.detach().clone() for param in network.parameters()]


@pytest.mark.parametrize("stage", [0, 1])
def test_a_plateau_that_the_loop_steps(stage: int) -> None:
    rates, parameters = run_ranks(1, _plateau_by_hand, stage)[0]
    expected_rates, expected = _plateau_of_torch()
    assert rates == expected_rates and rates[-1] == 0.1 / 2**4
    for got, right in zip(parameters, expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-6)


class _FailsAtThree(LRScheduler):
    def get_lr(self) -> list[float]:  # type: ignore[override]
        if self.last_epoch == 3:
            raise TypeError("of the scheduler's own")
        return [0.1]


def _failing() -> tuple[list[int], str, list[float]]:
    from tlgc_mp.engine import initialize

    engine, *_ = initialize(model=_network(), optimizer=_sgd, lr_scheduler=_FailsAtThree, config=_config(0))
    epochs, said = [], ""
    for images, labels in batches(3, 4, torch.float32):
        engine.backward(F.cross_entropy(engine(images), labels))
        try:
            engine.step()
        except TypeError as error:
            said = str(error)
        epochs.append(engine.lr_scheduler.last_epoch)

    # One that accumulates over two micro-batches is stepped once for them.
    halving = functools.partial(LambdaLR, lr_lambda=lambda epoch: 0.5**epoch)
    settings = _config(0, gradient_accumulation_steps=2)
    engine, *_ = initialize(model=_network(), optimizer=_sgd, lr_scheduler=halving, config=settings)
    rates = []
    for images, labels in batches(4, 2, torch.float32):
        engine.backward(F.cross_entropy(engine(images), labels))
        engine.step()
        rates.append(engine.get_lr()[0])
    return epochs, said, rates


def test_a_type_error_of_a_scheduler_is_its_own() -> None:
    epochs, said, rates = run_ranks(1, _failing)[0]
    assert epochs == [1, 2, 3]
    assert said == "of the scheduler's own"
    assert rates == [0.1, 0.05, 0.05, 0.025]
