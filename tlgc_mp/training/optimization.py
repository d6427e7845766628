"""The optimizer of a run and its learning rate's schedule."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from tlgc_mp.training.settings import TrainSettings


def make_optimizer(settings: TrainSettings) -> Any:
    recipe = settings.recipe
    return lambda parameters: torch.optim.SGD(
        parameters, lr=settings.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )


def make_scheduler(settings: TrainSettings, steps: int) -> Any:
    milestones = settings.recipe.milestone_steps(settings.epochs, steps)
    return lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, settings.recipe.decay)


def change(engine: Any, settings: TrainSettings, steps: int, done: int) -> None:
    """Gives an engine that was loaded the rate and the schedule of ``settings``, as after ``done`` steps of them.

    Where the DeepSpeed configuration has the schedule, that goes by its own count of steps.
    """
    optimizer = engine.basic_optimizer
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = settings.learning_rate
    if "scheduler" in settings.config:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # no step of the optimizer goes with these
        schedule = make_scheduler(settings, steps)(optimizer)
        for _ in range(done):
            schedule.step()
    engine.lr_scheduler.load_state_dict(schedule.state_dict())
