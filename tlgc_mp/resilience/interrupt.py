"""Stopping all ranks at the same step when one of them is asked to stop.

Ctrl-C and SIGTERM may reach some ranks and not others, and never all of them between the same two steps; a
checkpoint needs them all. The rank that is asked posts, in the job's key-value store, the step before which everyone
stops. Every step joins every rank with every other through its collectives, so nobody can be past the top of the next
step before the post is there: one look at the store at the top of each step is enough, and no collective is added.
Between the batches of an evaluation, which replicas go through each at its own pace, the ranks ask each other instead.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn, TypeAlias

import torch
import torch.distributed as dist

from tlgc_mp.engine.start import barrier

Handler: TypeAlias = Callable[[int, FrameType | None], object] | int | None  # as signal.signal returns it
_KEY = "tlgc_mp/stop_before_step"
_PATIENCE_SECONDS = 2.0


class Interrupted(Exception):
    """The run was asked to stop, and did. ``signal`` is the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


class StopRequest:
    """Listens for SIGINT, SIGTERM and SIGUSR1 (which mpirun passes on to its ranks) while it is entered.

    A second Ctrl-C after two seconds ends the process at once, without a checkpoint.

    Args:
        agreed: called when all ranks have agreed to stop, before they save.
    """

    def __init__(self, agreed: Callable[[], None]) -> None:
        self._agreed = agreed
        self.received: int | None = None
        self._at = 0.0
        self._previous: dict[int, Handler] = {}
        self._store: dist.Store | None = None
        self._posted = False

    def __enter__(self) -> StopRequest:
        if dist.get_world_size() > 1:
            self._store = dist.distributed_c10d._get_default_store()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._at = number, now
        elif number == signal.SIGINT and now - self._at > _PATIENCE_SECONDS:
            print("tlgc-mp: stopped at once; the last checkpoint stands", file=sys.stderr, flush=True)
            sys.exit(128 + number)

    def before_step(self, step: int) -> bool:
        """Whether everyone stops before ``step``, which counts up by one from call to call on every rank alike."""
        stops = self.received is not None if self._store is None else self._stops_before(self._store, step)
        if stops:
            self._agreed()
        return stops

    def _stops_before(self, store: dist.Store, step: int) -> bool:
        if self.received is not None and not self._posted:
            # Compare-and-set keeps the earliest post where several ranks are asked.
            store.compare_set(_KEY, "", f"{step + 1} {self.received}")
            self._posted = True
        if not store.check([_KEY]):
            return False
        stop_before, number = store.get(_KEY).decode().split()
        self.received = int(number)
        return step >= int(stop_before)

    def leave(self, saved: str) -> NoReturn:
        """Says on rank 0 where the state ``saved`` lies, and raises :class:`Interrupted` on every rank. Collective."""
        self._say(saved)
        barrier()  # a launcher ends the other ranks as soon as one has left
        raise Interrupted(self.received or signal.SIGTERM)

    def asked(self, device: torch.device | str) -> bool:
        """Whether any rank was asked to stop; the same answer on all. Collective, so not for the training step."""
        if self._store is not None:
            number = torch.tensor(self.received or 0, device=device)
            dist.all_reduce(number, dist.ReduceOp.MAX)
            self.received = int(number) or None
        if self.received is not None:
            self._agreed()
        return self.received is not None

    def _say(self, saved: str) -> None:
        if dist.get_rank() == 0:
            name = signal.Signals(self.received or signal.SIGTERM).name
            print(f"tlgc-mp: stopped by {name}; --resume goes on from {saved}", file=sys.stderr, flush=True)
