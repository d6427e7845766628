"""The optimizer of a run, its learning rate's schedule and its loss: torch's and torchvision's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import lr_scheduler
from torch.optim.optimizer import ParamsT
from torchvision.transforms import v2

from tlgc_mp.data.streams import global_stream
from tlgc_mp.engine.protocols import Engine
from tlgc_mp.training.settings import TrainSettings

WARMUP_START = 0.01
"""The share of the rate that a warm-up begins with."""

MakeOptimizer: TypeAlias = Callable[[ParamsT], torch.optim.Optimizer]
MakeScheduler: TypeAlias = Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]


def make_optimizer(settings: TrainSettings) -> MakeOptimizer:
    recipe, rate = settings.method, settings.learning_rate
    if recipe.optimizer == "adamw":
        return lambda parameters: torch.optim.AdamW(parameters, lr=rate, weight_decay=recipe.weight_decay)
    return lambda parameters: torch.optim.SGD(
        parameters, lr=rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )


def make_scheduler(settings: TrainSettings, steps: int) -> MakeScheduler:
    """What makes the schedule of epochs of ``steps`` steps, which is stepped with the optimizer."""
    recipe, total = settings.method, settings.epochs * steps
    warmup = recipe.warmup_epochs * steps

    def make(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        if recipe.schedule == "onecycle":
            return lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=total)
        if warmup:
            rising = lr_scheduler.LinearLR(optimizer, start_factor=WARMUP_START, total_iters=warmup)
        main: lr_scheduler.LRScheduler
        if recipe.schedule == "cosine":
            main = lr_scheduler.CosineAnnealingLR(optimizer, T_max=total - warmup)
        else:
            milestones = [step - warmup for step in recipe.milestone_steps(settings.epochs, steps)]
            main = lr_scheduler.MultiStepLR(optimizer, milestones, recipe.decay)
        return lr_scheduler.SequentialLR(optimizer, [rising, main], [warmup]) if warmup else main

    return make


class Loss:
    """The loss of a micro-batch, of images that are mixed in pairs where the recipe has it so."""

    def __init__(self, settings: TrainSettings, num_classes: int) -> None:
        self._smoothing, self._seed = settings.method.label_smoothing, settings.seed
        alpha = settings.method.mixup
        self._mixup = None if alpha is None else v2.MixUp(alpha=alpha, num_classes=num_classes)

    def mixed(self, images: Tensor, labels: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """A micro-batch as the network is to have it; ``number`` over all replicas says what is drawn."""
        if self._mixup is None:
            return images, labels
        with global_stream(self._seed, "mixup", number):
            images, labels = self._mixup(images, labels)
        return images.contiguous(memory_format=torch.channels_last), labels

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self._smoothing)


def change(engine: Engine, settings: TrainSettings, steps: int, done: int) -> None:
    """Gives an engine that was loaded the rate, the schedule and the factors of ``settings``, as after ``done`` steps
    of them.

    Where the DeepSpeed configuration has the optimizer or the schedule, that goes by what is there.
    """
    optimizer = engine.basic_optimizer
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = settings.learning_rate
        if "optimizer" not in settings.deepspeed_config:
            group["weight_decay"] = settings.method.weight_decay
            if "momentum" in group:
                group["momentum"] = settings.method.momentum
    if "scheduler" in settings.deepspeed_config:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # no step of the optimizer goes with these
        schedule = make_scheduler(settings, steps)(optimizer)
        for _ in range(done):
            schedule.step()
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(schedule.state_dict())
