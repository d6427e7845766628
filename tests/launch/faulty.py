"""``python -m tests.launch.faulty`` is the ``tlgc-mp`` command, with a fault in it.

``FAULT`` names a function below, ``FAULT_RANK`` the rank it happens in, ``FAULT_STEP`` the step before which it does,
counted from 0 over the epochs of this process.
"""

from __future__ import annotations

import os
import resource
import signal
from typing import Any

from tlgc_mp.cli import entry
from tlgc_mp.parallel.topology import Launch

_ballast: list[Any] = []


def exception() -> None:
    raise KeyError("no such layer")


def memory() -> None:
    """The address space ends, and something large is allocated."""
    import torch

    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
    while True:
        _ballast.append(torch.zeros(4 << 20))


def nan() -> None:
    """Every loss from here on is NaN."""
    import torch.nn.functional as F

    loss = F.cross_entropy
    F.cross_entropy = lambda *arguments, **options: loss(*arguments, **options) * float("nan")


def disk() -> None:
    """No file may grow beyond what it has, nor beyond 100 bytes."""
    from tlgc_mp.training.metrics import Metrics

    write = Metrics.write

    def write_to_a_full_disk(self: Metrics, *arguments: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        write(self, *arguments)

    Metrics.write = write_to_a_full_disk  # type: ignore[method-assign]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _arm() -> None:
    fault = {function.__name__: function for function in (exception, memory, nan, disk, kill, stop)}[
        os.environ["FAULT"]
    ]
    if Launch.detect().rank != int(os.environ["FAULT_RANK"]):
        return
    from tlgc_mp.training import interrupt

    before_step, at = interrupt.StopRequest.before_step, int(os.environ["FAULT_STEP"])
    steps = 0

    def before_step_and_fault(self: interrupt.StopRequest, step: int) -> bool:
        nonlocal steps
        if steps == at:
            fault()
        steps += 1
        return before_step(self, step)

    interrupt.StopRequest.before_step = before_step_and_fault  # type: ignore[method-assign]


if __name__ == "__main__":
    if "FAULT" in os.environ:
        _arm()
    entry()
