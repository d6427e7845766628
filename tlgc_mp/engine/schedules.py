"""Learning rate schedulers inside a DeepSpeed engine, which steps them itself, after each step of the optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TypeAlias

from tlgc_mp.engine.protocols import Engine
from tlgc_mp.errors import UsageError

TakeStep: TypeAlias = Callable[[Engine, dict[str, object] | None], None]


def check_steps_alone(kind: str, stepped: object) -> None:
    """Refuses a scheduler or an optimizer (``kind`` says which) whose ``step`` cannot be called without an argument:
    the engine has none to give.

    Raises:
        UsageError: it wants a metric, an epoch or a closure.
    """
    try:  # the class's: a scheduler of torch puts a function of its own in the place of an optimizer's step
        step: Callable[..., object] = type(stepped).step  # type: ignore[attr-defined]
        parameters = list(inspect.signature(step).parameters.values())
    except (AttributeError, TypeError, ValueError):  # it is no Python function, and does not say
        return
    wanted = [
        parameter.name
        for parameter in parameters[1:]
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if wanted:
        raise UsageError(
            f"{kind} must have a step() that takes no argument, since the engine calls it, got "
            f"{type(stepped).__name__}, whose step() wants {', '.join(wanted)}; {_HINTS[kind]}"
        )


_HINTS = {
    "lr_scheduler": "leave it out, make it over engine.basic_optimizer, and call its step() in your own loop, once an "
    "epoch say",
    "optimizer": "use one that steps on the gradients that are there, SGD or Adam say",
}


def take_model_step(deepspeed_step: TakeStep) -> TakeStep:
    """An engine's ``_take_model_step`` that steps the scheduler after DeepSpeed's has stepped the optimizer.

    DeepSpeed's own takes any TypeError inside a scheduler for one that wants an argument, and gives it the batch size,
    which torch's take for an epoch or a metric.
    """

    def step(engine: Engine, lr_kwargs: dict[str, object] | None) -> None:
        scheduler, engine.lr_scheduler = engine.lr_scheduler, None
        try:
            deepspeed_step(engine, lr_kwargs)
        finally:
            engine.lr_scheduler = scheduler
        if scheduler is not None and engine.was_step_applied():
            scheduler.step(**(lr_kwargs or {}))

    return step
