"""What a run reports: JSON lines of steps and epochs, the same through DeepSpeed's monitors, and the final summary."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Mapping
from typing import TypeAlias

import torch.distributed as dist

from tlgc_mp.engine.monitors import EPOCH, STEPS, Event, Monitors, naming
from tlgc_mp.engine.protocols import Engine
from tlgc_mp.host import describe_run, replace_file
from tlgc_mp.training.runs import METRICS, RESULT

Line: TypeAlias = dict[str, float]
"""Figures by name, among them ``epoch``, ``step`` and ``samples``."""
_COUNTS = ("epoch", "step", "samples")


class Metrics:
    """Writes figures to every place they go to. Only rank 0 writes; on other ranks it does nothing.

    Args:
        engine: the DeepSpeed engine.
        folder: of the run; rank 0 has made it.
        first_epoch: lines of this epoch and later ones, left by a run that is being resumed, are dropped.
        resumed: whether the run goes on from a checkpoint.
    """

    def __init__(self, engine: Engine, folder: str, first_epoch: int, *, resumed: bool) -> None:
        self.path = os.path.join(folder, METRICS)
        self._lines: list[Line] = []
        self._folder = folder
        self._speaks = dist.get_rank() == 0
        self._engine = engine
        self._monitors = Monitors(engine, folder)
        if self._speaks:
            told = _read_lines(self.path)
            self._lines = [line for line in told if self._stays(line, first_epoch)]
            replace_file(self.path, "".join(json.dumps(line) + "\n" for line in self._lines))
            if resumed or told:
                self._monitors.take_back(engine.global_steps)
                self._monitors.write(
                    [e for line in self._lines if line["step"] >= engine.global_steps for e in _events(line)]
                )

    def _stays(self, line: Line, first_epoch: int) -> bool:
        """Whether a line of a run that goes on in ``first_epoch``, or before its evaluation, is not told again."""
        return line["epoch"] < first_epoch if _of_epoch(line) else line["step"] <= self._engine.global_steps

    @property
    def lines(self) -> list[Line]:
        """Of the epochs."""
        return [line for line in self._lines if _of_epoch(line)]

    def write(self, epoch: int, figures: dict[str, float]) -> None:
        """Reports ``figures`` as they are now, in 1-based ``epoch``: of some steps, or of the epoch."""
        if not self._speaks:
            return
        samples = self._engine.global_samples
        line = {"epoch": epoch, "step": self._engine.global_steps, "samples": samples, **figures}
        self._lines.append(line)
        with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._monitors.write(_events(line))

    def write_result(self, run: Mapping[str, object]) -> None:
        """Writes ``result.json``, the row of a finished ``run``: what it was, what came out, epoch by epoch, and
        where."""
        last = self.lines[-1]
        result = {
            **run,
            "test_error_percent": last["test_error_percent"],
            "best_test_error_percent": self.best("test_error_percent")["test_error_percent"],
            "seconds": last["seconds"],
            "train_seconds": last["train_seconds"],
            "data_seconds": last["data_seconds"],
            "epoch_lines": self.lines,
            **describe_run(),
        }
        replace_file(os.path.join(self._folder, RESULT), json.dumps(result) + "\n")

    def best(self, figure: str) -> Line:
        """The line of the epoch with the smallest ``figure``, the earliest of equals; empty where none has it."""
        lines = [line for line in self.lines if figure in line]
        return min(lines, key=lambda line: line[figure], default={})


def in_words(figure: str, value: float) -> str:
    """A figure of an epoch for people: ``test error 12.50 %``."""
    name = figure.replace("_", " ")
    return f"{name.removesuffix(' percent')} {value:.2f} %" if name.endswith(" percent") else f"{name} {value:.4f}"


def _of_epoch(line: Line) -> bool:
    """Whether a line of the metrics file is of an epoch, and not of some steps."""
    return "loss" not in line


def _events(line: Line) -> list[Event]:
    """What the monitors are told of a line."""
    kind = EPOCH if _of_epoch(line) else STEPS
    return [(f"{kind}/{key}", value, int(line["step"])) for key, value in line.items() if key not in _COUNTS]


def _read_lines(path: str) -> list[Line]:
    """The whole lines of a metrics file; a line cut off by a crash is none."""
    lines = []
    try:
        with open(path, encoding="utf-8") as file:
            for text in file:
                try:
                    lines.append(json.loads(text))
                except ValueError:
                    break
    except FileNotFoundError:
        pass
    return lines


def peak_memory_bytes() -> int:
    """The most memory this rank has held: of its accelerator where it has one, else of the whole process."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        return int(accelerator.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def print_summary(rows: list[tuple[str, str]]) -> None:
    """A two-column table on standard output."""
    width = max(len(label) for label, _ in rows) + 2
    print("\n".join(f"{label:<{width}}{value}" for label, value in rows), flush=True)
