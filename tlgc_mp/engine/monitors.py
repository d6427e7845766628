"""DeepSpeed's monitors, as a run tells them its figures: each once, after a resume or a restart too."""

from __future__ import annotations

import contextlib
import csv
import glob
import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, TypeAlias

from tlgc_mp.engine.protocols import Engine
from tlgc_mp.host import replace_file

if TYPE_CHECKING:
    from deepspeed.monitor.csv_monitor import csvMonitor


Event: TypeAlias = tuple[str, float, int]
"""KIND/FIGURE, its value, and the step."""

EPOCH, STEPS = "Epoch", "Train"
"""The kinds: figures of an epoch, and of the steps since the last time."""


class Monitors:
    """Those that the DeepSpeed configuration enables; where it enables none, TensorBoard and CSV in the run's folder.

    Args:
        engine: the DeepSpeed engine; it reports nothing itself from here on.
        output_dir: of the run.
    """

    def __init__(self, engine: Engine, output_dir: str) -> None:
        from deepspeed.monitor.config import DeepSpeedMonitorConfig
        from deepspeed.monitor.monitor import MonitorMaster

        self._naming: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
        if engine.monitor.enabled:
            self._monitor = engine.monitor
            # The engine would write figures of its own, counted in samples: W&B drops what comes with a smaller count.
            engine.monitor = MonitorMaster(DeepSpeedMonitorConfig())
        else:
            places = {
                key: {"enabled": True, "output_path": output_dir, "job_name": job}
                for key, job in (("tensorboard", "tensorboard"), ("csv_monitor", "csv"))
            }
            self._naming = lambda: naming(output_dir)
            with self._naming():
                self._monitor = MonitorMaster(DeepSpeedMonitorConfig(**places))
        if self._monitor.csv_monitor is not None:
            paths = _csv_files(self._monitor.csv_monitor)
            self._monitor.csv_monitor.filenames += [os.path.basename(path).removesuffix(".csv") for path in paths]

    def write(self, events: list[Event]) -> None:
        """Tells them; on rank 0."""
        with self._naming():
            self._monitor.write_events(events)

    def take_back(self, step: int) -> None:
        """Takes back what they were told of ``step`` and later ones; on rank 0. What W&B was told stays with its run:
        a process is a run of its own there."""
        if self._monitor.csv_monitor is not None:
            for path in _csv_files(self._monitor.csv_monitor):
                _cut(path, step)
        if self._monitor.tb_monitor is not None:
            from tensorboard.compat.proto.event_pb2 import Event as Record
            from tensorboard.compat.proto.event_pb2 import SessionLog

            # As SummaryWriter has its purge_step written, by which TensorBoard passes over what is there.
            writer = self._monitor.tb_monitor.summary_writer.file_writer
            writer.add_event(Record(step=step, file_version="brain.Event:2"))
            writer.add_event(Record(step=step, session_log=SessionLog(status=SessionLog.START)))


def _csv_files(monitor: csvMonitor) -> list[str]:
    """The figures' files of DeepSpeed's CSV monitor that have their header."""
    folder = glob.escape(monitor.log_dir)
    paths = [path for kind in (EPOCH, STEPS) for path in glob.glob(os.path.join(folder, f"{kind}_*.csv"))]
    return [path for path in paths if os.path.getsize(path)]


def _cut(path: str, step: int) -> None:
    """Leaves the header of a CSV file, and the rows of steps before ``step``; a row cut off by a crash is none."""
    with open(path, encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *(row for row in rows if len(row) == 2 and int(row[0]) < step)])
    replace_file(path, text.getvalue())


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """What fails to be written does not say where: inside, it says ``path``."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or path) from error


def leave_to_the_main_thread() -> None:
    """Has TensorBoard's thread not tell of a file that it cannot write: the error comes up in the main thread too.

    It changes the hook of the whole process, and so is for a command to call.
    """
    before = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        ours = type(failed.thread).__module__.startswith("tensorboard.")
        if not (ours and isinstance(failed.exc_value, OSError)):
            before(failed)

    threading.excepthook = hook
