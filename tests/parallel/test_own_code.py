"""What a user hands to ``initialize`` works as it does alone, and what goes wrong in it is not put on DeepSpeed."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.parallel.common import SEED, batches
from tests.ranks import run_ranks
from tlgc_mp.errors import UsageError

STEPS = 6


def _network() -> nn.Sequential:
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def _config(ranks: int = 1, stage: int = 0) -> dict[str, Any]:
    zero = {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    return {"train_batch_size": 4, **zero, **({"tensor_parallel": {"autotp_size": ranks}} if ranks > 1 else {})}


# Adagrad, whose state is there before it has stepped


def _adagrad(network: nn.Sequential) -> tuple[torch.optim.Optimizer, Any]:
    groups = [{"params": network[0].parameters()}, {"params": network[4].parameters(), "lr": 0.3}]
    optimizer = torch.optim.Adagrad(groups, lr=0.05, initial_accumulator_value=0.1)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.3)


def _losses_of_torch() -> list[float]:
    network = _network()
    optimizer, scheduler = _adagrad(network)
    losses = []
    for images, labels in batches(STEPS, 4, torch.float32):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def _losses(ranks: int, stage: int) -> list[float]:
    from tlgc_mp.engine import initialize

    network = _network()
    optimizer, scheduler = _adagrad(network)
    engine, *_ = initialize(model=network, optimizer=optimizer, lr_scheduler=scheduler, config=_config(ranks, stage))
    losses = []
    for images, labels in batches(STEPS, 4, torch.float32):
        loss = F.cross_entropy(engine(images), labels)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert engine.get_lr() == pytest.approx([group["lr"] for group in optimizer.param_groups])
    return losses


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (1, 1), (1, 3), (2, 0), (2, 2)])
def test_an_instance_of_adagrad(ranks: int, stage: int) -> None:
    assert run_ranks(ranks, _losses, ranks, stage)[0] == pytest.approx(_losses_of_torch(), rel=1e-5), SEED


class _BuffersFromTheStart(torch.optim.SGD):
    def __init__(self, params: Any, own: str) -> None:
        super().__init__(params, lr=0.1, momentum=0.9)
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["momentum_buffer"] = torch.zeros_like(param)


def _refusals() -> list[str]:
    from tlgc_mp.engine import initialize

    said = []
    for make in (torch.optim.Adagrad, functools.partial(_BuffersFromTheStart, own="x")):
        network = _network()
        optimizer = make(network.parameters())
        if isinstance(optimizer, torch.optim.Adagrad):
            network(torch.zeros(1, 3, 8, 8)).sum().backward()
            optimizer.step()
        with pytest.raises(UsageError) as refused:
            initialize(model=network, optimizer=optimizer, config=_config())
        said.append(str(refused.value))
    return said


def test_state_of_the_whole_is_refused_with_its_reason() -> None:
    stepped, buffers = run_ranks(1, _refusals)[0]
    assert (
        stepped == "optimizer must be one that has not stepped, got one that has, on the whole model; give a "
        "new one, or a callable"
    )
    assert "must hold no state of the whole parameters, got a _BuffersFromTheStart that does" in buffers


def _refusal_of_a_foreign_parameter(stage: int) -> str:
    from tlgc_mp.engine import initialize

    network = _network()
    centers = nn.Parameter(torch.zeros(7, 5))  # as a loss may have, of its own
    optimizer = torch.optim.SGD([*network.parameters(), centers], lr=0.1)
    with pytest.raises(UsageError) as refused:
        initialize(model=network, optimizer=optimizer, config=_config(stage=stage))
    return str(refused.value)


@pytest.mark.parametrize("stage", [0, 1])
def test_an_optimizer_over_parameters_that_are_not_the_models_is_refused(stage: int) -> None:
    said = run_ranks(1, _refusal_of_a_foreign_parameter, stage)[0]
    assert said.startswith("optimizer must be over parameters of the model alone, got one of shape (7, 5)")


# Errors, prints and warnings


class _Data:
    def __len__(self) -> int:
        print("of the data")
        raise TypeError("of the data's own")

    def __getitem__(self, index: int) -> None: ...


class _Model(nn.Sequential):
    def to(self, *args: Any, **kwargs: Any) -> Any:
        print("of the model")
        raise AttributeError("of the model's own")


def _made_loudly(parameters: Any) -> Any:
    print("of the optimizer")
    warnings.warn("a warning of the optimizer's", stacklevel=1)
    logging.getLogger("own").warning("a line of the optimizer's log")
    raise ValueError("of the optimizer's own")


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def _mistakes() -> list[tuple[str, str, str]]:
    from tlgc_mp.engine import initialize

    given: list[dict[str, Any]] = [
        {"optimizer": _sgd, "training_data": _Data()},
        {"optimizer": _sgd, "model": _Model(nn.Linear(2, 2))},
        {"optimizer": _made_loudly},
        {"optimizer": functools.partial(torch.optim.SGD, lrr=0.1)},
        {"config": {**_config(), "optimizer": {"type": "SGD", "params": {"lrr": 0.1}}}},
    ]
    outcomes = []
    for arguments in given:
        log = logging.StreamHandler(io.StringIO())
        logging.getLogger("own").addHandler(log)
        with (
            contextlib.redirect_stdout(io.StringIO()) as out,
            warnings.catch_warnings(record=True) as warned,
            pytest.raises(Exception) as raised,
        ):
            warnings.simplefilter("always")
            initialize(**{"model": _network(), "config": _config(), **arguments})
        own = [str(warning.message) for warning in warned if "of the optimizer" in str(warning.message)]
        shown = [out.getvalue(), *own, log.stream.getvalue()]  # type: ignore[attr-defined]
        outcomes.append((type(raised.value).__name__, str(raised.value), "".join(shown)))
    return outcomes


def test_errors_and_lines_are_told_from_those_of_deepspeed() -> None:
    data, model, optimizer, partial, config = run_ranks(1, _mistakes)[0]
    assert data == ("TypeError", "of the data's own", "of the data\n")
    assert model == ("AttributeError", "of the model's own", "of the model\n")
    assert optimizer[:2] == ("ValueError", "of the optimizer's own")
    assert optimizer[2] == "of the optimizer\na warning of the optimizer'sa line of the optimizer's log\n"
    assert partial[0] == "TypeError" and "unexpected keyword argument 'lrr'" in partial[1] and partial[2] == ""
    assert config[0] == "UsageError" and config[1].startswith(
        "deepspeed_config must be one that DeepSpeed accepts, got an error: "
    )
    assert config[2] == ""


def _future_warnings(stage: int) -> list[str]:
    from tlgc_mp.engine import initialize

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        engine, *_ = initialize(model=_network(), optimizer=_sgd, config=_config(2, stage))
        for images, labels in batches(2, 4, torch.float32):
            engine.backward(F.cross_entropy(engine(images), labels))
            engine.step()
    return [str(warning.message) for warning in warned if issubclass(warning.category, FutureWarning)]


@pytest.mark.parametrize("stage", [0, 3])
def test_collectives_are_called_by_names_that_are_not_deprecated(stage: int) -> None:
    assert run_ranks(2, _future_warnings, stage) == [[], []]
