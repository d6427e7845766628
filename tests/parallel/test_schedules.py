"""A scheduler is stepped as torch's own loop would step it, or refused: DeepSpeed's engine has no metric to give, and
gives the batch size to one that raises a TypeError."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler
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


class _Own:
    """A user's, of no base class; it has the momentum and the decay fall, too."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.steps = optimizer, 0

    def step(self) -> None:
        self.steps += 1
        for group in self.optimizer.param_groups:
            group.update(lr=0.1 / self.steps, momentum=0.9 - 0.02 * self.steps, weight_decay=0.01 / self.steps)

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


def _chained(optimizer: torch.optim.Optimizer) -> LRScheduler:
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(optimizer, 0.9), lr_scheduler.ConstantLR(optimizer, 0.5, 4)]
    )


def _sequential(optimizer: torch.optim.Optimizer) -> LRScheduler:
    rising = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)
    return lr_scheduler.SequentialLR(optimizer, [rising, lr_scheduler.CosineAnnealingLR(optimizer, 8)], [4])


SCHEDULES: dict[str, Any] = {
    "cyclic": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=3),
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 0.9**step),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, epochs=3, steps_per_epoch=4),
    "restarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3, 2),
    "chained": _chained,
    "sequential": _sequential,
    "own": _Own,
}

Scheduled = tuple[list[list[float]], list[torch.Tensor]]
"""What each step is taken with, and the parameters at the end."""


def _with_momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def _settings_of(optimizer: torch.optim.Optimizer) -> list[float]:
    return [optimizer.param_groups[0][key] for key in ("lr", "momentum", "weight_decay")]


def _scheduled_by_torch(name: str) -> Scheduled:
    network = _network()
    optimizer = _with_momentum(network.parameters())
    scheduler, taken = SCHEDULES[name](optimizer), []
    for images, labels in batches(STEPS, 4, torch.float32):
        taken.append(_settings_of(optimizer))
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
        scheduler.step()
    return taken, [param.detach().clone() for param in network.parameters()]


def _scheduled(folder: str, stage: int) -> dict[str, Scheduled]:
    """Each schedule, by a callable below ZeRO 1 and as an instance else; half the steps come after a resume."""
    from tlgc_mp.checkpoint import load_checkpoint, save_checkpoint
    from tlgc_mp.engine import initialize
    from tlgc_mp.parallel.sharding import gather_state_dict

    def engine_of(name: str) -> Any:
        if stage == 0:
            return initialize(
                model=_network(), optimizer=_with_momentum, lr_scheduler=SCHEDULES[name], config=_config(stage)
            )[0]
        network = _network()
        optimizer = _with_momentum(network.parameters())
        scheduler = SCHEDULES[name](optimizer)
        return initialize(model=network, optimizer=optimizer, lr_scheduler=scheduler, config=_config(stage))[0]

    found = {}
    for name in SCHEDULES:
        engine, taken = engine_of(name), []
        for number, (images, labels) in enumerate(batches(STEPS, 4, torch.float32)):
            if number == STEPS // 2:
                save_checkpoint(engine, f"{folder}/{name}")
                engine = engine_of(name)
                load_checkpoint(engine, f"{folder}/{name}")
            taken.append(_settings_of(engine.optimizer))
            engine.backward(F.cross_entropy(engine(images), labels))
            engine.step()
        state = gather_state_dict(engine.module)
        found[name] = taken, [state[key].clone() for key, _ in _network().named_parameters()]
    return found


@pytest.mark.timeout(120)
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_as_torch_steps_it_and_after_a_resume(stage: int, tmp_path: Path) -> None:
    (found,) = run_ranks(1, _scheduled, str(tmp_path), stage)
    for name in SCHEDULES:
        (taken, parameters), (expected, right) = found[name], _scheduled_by_torch(name)
        for step, settings in enumerate(expected):
            assert taken[step] == pytest.approx(settings, rel=1e-12), (name, step)
        for got, value in zip(parameters, right, strict=True):
            torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-6, msg=name)


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
