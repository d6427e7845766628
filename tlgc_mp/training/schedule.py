"""When a run saves between the ends of its epochs."""

from __future__ import annotations

import itertools
import time

import torch.distributed as dist

_runs = itertools.count()


class SaveSchedule:
    """Every so many steps of an epoch, or once so many seconds have passed since the last checkpoint.

    Clocks differ, and a checkpoint needs every rank before the same step. Rank 0 posts, in the job's key-value store,
    the step before which all save, as :class:`~tlgc_mp.resilience.interrupt.StopRequest` does; no collective is added.

    Args:
        seconds, steps: either, both or neither.
    """

    def __init__(self, seconds: float | None, steps: int | None) -> None:
        self._seconds, self._steps = seconds, steps
        self._since = time.monotonic()
        self._prefix, self._number = f"tlgc_mp/save_before_step/{next(_runs)}", 0
        self._posted = False
        self._store: dist.Store = dist.distributed_c10d._get_default_store()

    def due(self, epoch_step: int, step: int, busy: bool) -> bool:
        """Whether all ranks save before ``step``, which counts up by one from call to call on every rank alike.

        Args:
            epoch_step: the same, counted from the beginning of the epoch; 1 or more.
            busy: whether a checkpoint is still being written; then no time is up yet.
        """
        if self._steps is not None and epoch_step % self._steps == 0:
            return True
        if self._seconds is None:
            return False
        key = f"{self._prefix}/{self._number}"
        if dist.get_rank() == 0 and not (self._posted or busy) and time.monotonic() - self._since > self._seconds:
            self._store.set(key, str(step + 1))
            self._posted = True
        return self._store.check([key]) and step >= int(self._store.get(key))

    def saved(self) -> None:
        """To be called on every rank when it has begun to save, also where nothing here asked for it."""
        self._since, self._posted = time.monotonic(), False
        self._number += 1
