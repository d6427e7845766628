"""``python -m tests.launch.faulty`` is the ``tlgc-mp`` command, with a fault in it.

``FAULT`` names a function below, ``FAULT_RANK`` the rank it happens in, ``FAULT_STEP`` the step before which it does,
counted from 0 over the epochs of this process. With ``FAULT_ONCE``, it happens only where that file is not there yet,
and makes it; with ``NEVER_SAVES`` too, no checkpoint is finished until then. In the folder ``WEIGHTS`` each rank leaves
a digest of its state after each epoch. ``LINGERS`` is one of ``training``, ``evaluation`` and ``save``: rank 0 makes
the file ``THERE`` in the second epoch's training, or in the first evaluation or save, which takes its time then. With
``leaving``, data workers are killed some time before a rank that was stopped leaves. The rank ``UNMET`` fails while
ranks meet. With ``OWN_MACHINES``, each rank takes the others to be on another machine.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from typing import Any, NoReturn

from tlgc_mp.cli.main import entry
from tlgc_mp.parallel.topology import Launch


def exception() -> None:
    raise KeyError("no such layer")


def memory() -> None:
    """The address space ends 64 MiB from here, and 4 TiB are allocated."""
    import torch

    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
    torch.zeros(1 << 40)


def nan() -> None:
    """Every loss from here on is NaN."""
    import torch.nn.functional as F

    loss = F.cross_entropy
    F.cross_entropy = lambda *arguments, **options: loss(*arguments, **options) * float("nan")


def disk() -> None:
    """The metrics go to a device that is full."""
    from tlgc_mp.training.metrics import Metrics

    write = Metrics.write

    def write_to_a_full_disk(self: Metrics, *arguments: Any) -> None:
        self.path = "/dev/full"
        write(self, *arguments)

    Metrics.write = write_to_a_full_disk  # type: ignore[method-assign]


def worker() -> None:
    """A data worker process is killed."""
    process = multiprocessing.active_children()[0]
    os.kill(process.pid or 0, signal.SIGKILL)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


FAULTS = {function.__name__: function for function in (exception, memory, nan, disk, worker, kill, stop)}


def _never_save() -> None:
    """No checkpoint of this process gets its name: its saves take for ever."""
    from tlgc_mp.checkpoint import folder

    folder.commit = lambda *_: time.sleep(3600)  # type: ignore[assignment]


def _linger(moment: str, there: str) -> None:
    from tlgc_mp.checkpoint import folder
    from tlgc_mp.data.loaders import started_workers
    from tlgc_mp.resilience.interrupt import StopRequest
    from tlgc_mp.resilience.watchdog import BEAT_SECONDS

    leave = StopRequest.leave

    def kill_workers_and_leave(self: StopRequest, saved: str) -> NoReturn:
        for process in started_workers:
            process.kill()
        time.sleep(2 * BEAT_SECONDS)
        leave(self, saved)

    def slowed(function: Callable[..., Any], when: Callable[..., bool] = lambda *_: True) -> Any:
        def wait_first(*arguments: Any) -> Any:
            if when(*arguments):
                if Launch.detect().rank == 0:
                    open(there, "w").close()
                time.sleep(1.5)
            return function(*arguments)

        return wait_first

    if moment == "training":
        StopRequest.before_step = slowed(StopRequest.before_step, lambda _, step: step > 3)  # type: ignore[method-assign]
    elif moment == "leaving":
        StopRequest.leave = kill_workers_and_leave  # type: ignore[method-assign]
    elif moment == "evaluation":
        StopRequest.asked = slowed(StopRequest.asked)  # type: ignore[method-assign]
    else:
        folder.commit = slowed(folder.commit)


def _fail_while_ranks_meet(rank: int) -> None:
    from tlgc_mp.cli import train

    def fail(*_: Any) -> NoReturn:
        raise KeyError("no such interface")

    if Launch.detect().rank == rank:
        train.start_distributed = fail


def _be_on_a_machine_of_its_own() -> None:
    """Other ranks know nothing of this one's process from the kernel."""
    from tlgc_mp.resilience import members

    members._machine = lambda: f"machine-{Launch.detect().rank}"  # type: ignore[assignment]


def main() -> NoReturn:
    if "OWN_MACHINES" in os.environ:
        _be_on_a_machine_of_its_own()
    if "UNMET" in os.environ:
        _fail_while_ranks_meet(int(os.environ["UNMET"]))
    if "LINGERS" in os.environ:
        _linger(os.environ["LINGERS"], os.environ["THERE"])
    if "NEVER_SAVES" in os.environ and not os.path.exists(os.environ["FAULT_ONCE"]):
        _never_save()
    if "FAULT" in os.environ and Launch.detect().rank == int(os.environ["FAULT_RANK"]):
        _arm(FAULTS[os.environ["FAULT"]], int(os.environ["FAULT_STEP"]), os.environ.get("FAULT_ONCE"))
    if "WEIGHTS" in os.environ:
        _note_weights(os.environ["WEIGHTS"])
    entry()


def _note_weights(folder: str) -> None:
    from tlgc_mp.training.metrics import Metrics

    write = Metrics.write

    def write_and_note(self: Metrics, *arguments: Any) -> None:
        digest = hashlib.sha256()
        for name, value in sorted(self._engine.module.state_dict().items()):
            digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        with open(os.path.join(folder, f"weights-{Launch.detect().rank}"), "w", encoding="ascii") as file:
            file.write(digest.hexdigest())
        write(self, *arguments)

    Metrics.write = write_and_note  # type: ignore[method-assign]


def _arm(fault: Callable[[], None], at: int, once: str | None) -> None:
    from tlgc_mp.resilience.interrupt import StopRequest

    before_step = StopRequest.before_step
    steps = 0

    def before_step_and_fault(self: StopRequest, step: int) -> bool:
        nonlocal steps
        steps += 1
        if steps == at + 1 and not (once and os.path.exists(once)):
            if once:
                os.close(os.open(once, os.O_CREAT))
            fault()
        return before_step(self, step)

    StopRequest.before_step = before_step_and_fault  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
