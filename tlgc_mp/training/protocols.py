"""What a trainer needs of its batches, and of a guard that may stop it early."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn, Protocol

import torch

from tlgc_mp.errors import UsageError, is_count, is_number, shown


class Batches(Protocol):
    """A replica's micro-batches, the same each time an epoch is read, as in :class:`tlgc_mp.data.TrainingBatches`."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0, /) -> Iterator[Any]: ...


class Guard(Protocol):
    """What may stop a training early. The trainer makes each call on every rank."""

    def before_step(self, step: int, /) -> bool:
        """Whether all ranks save and leave before ``step``, which counts on from epoch to epoch."""

    def asked(self, device: torch.device, /) -> bool:
        """Whether all ranks leave now, in the middle of an evaluation. May be collective."""

    def leave(self, saved: str, /) -> NoReturn:
        """Raises the exception that ends the training; ``saved`` is the path of the checkpoint to resume from."""


def steps_of(batches: Batches, accumulation: int, limit_steps: int | None, whose: str = "the training set") -> int:
    """The steps of an epoch.

    Raises:
        UsageError: there is none.
    """
    steps = len(batches) // accumulation
    if steps == 0:
        raise UsageError(
            f"{whose} must give the {accumulation} micro-batches of a step or more, got {len(batches)}; lower the "
            "batch "
            "size or gradient_accumulation_steps"
        )
    return steps if limit_steps is None else min(limit_steps, steps)


def check_arguments(batches: object, *, seed: object, save_seconds: object, ema: object, **counts: object) -> None:
    """Refuses what a trainer was given that cannot work; ``counts`` are 1 or more, and some of them may be ``None``."""
    if not hasattr(batches, "__len__") or not hasattr(batches, "epoch"):
        raise UsageError(
            f"batches must have a length and a method epoch, got {type(batches).__name__}; give "
            "tlgc_mp.data.TrainingBatches"
        )
    for name, value in counts.items():
        if not is_count(value) and not (value is None and name in ("limit_steps", "save_steps")):
            raise UsageError(f"{name} must be 1 or more, got {shown(value)}; give an int")
    if not isinstance(seed, int):
        raise UsageError(f"seed must be an int, got {shown(seed)}; use e.g. 0")
    if save_seconds is not None and not (is_number(save_seconds) and save_seconds > 0):
        raise UsageError(f"save_seconds must be a positive number, got {shown(save_seconds)}; use e.g. 600")
    if ema is not None and not (is_number(ema) and 0 < ema < 1):
        raise UsageError(f"ema must be more than 0 and less than 1, got {shown(ema)}; use e.g. 0.999")
