"""What a trainer asks of its batches, and of who may end it before its time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn, Protocol

import torch

from tlgc_mp.errors import UsageError


class Batches(Protocol):
    """What a replica trains on, as :class:`tlgc_mp.data.TrainingBatches` has it: the same micro-batches each time."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0, /) -> Iterator[Any]: ...


class Guard(Protocol):
    """Who may end a training before its time; each call is made on every rank alike."""

    def before_step(self, step: int, /) -> bool:
        """Whether all ranks save and leave before ``step``, which counts on from epoch to epoch."""

    def asked(self, device: torch.device, /) -> bool:
        """Whether all ranks leave now, in the middle of an evaluation. May be collective."""

    def leave(self, saved: str, /) -> NoReturn:
        """Leaves, by an exception; ``saved`` is the path of the checkpoint to resume from."""


def steps_of(batches: Batches, accumulation: int, limit_steps: int | None, whose: str = "the training set") -> int:
    """The steps of an epoch.

    Raises:
        UsageError: there is none.
    """
    steps = len(batches) // accumulation
    if steps == 0:
        raise UsageError(
            f"{whose} gives {len(batches)} micro-batches, fewer than the {accumulation} of one step; lower the batch "
            "size or gradient_accumulation_steps"
        )
    return steps if limit_steps is None else min(limit_steps, steps)
