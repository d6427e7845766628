"""A short run through the command line, for the ranks of :func:`tests.ranks.run_ranks`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEPS = 8
"""Of an epoch: 1024 images in batches of 128."""

EPOCHS = 2
OPTIONS = [
    *("train", "--model", "wrn-10-1", "--dataset", "synthetic", "--image-size", "8", "--batch-size", "128"),
    *("--epochs", str(EPOCHS)),
]


@dataclass
class Outcome:
    status: int
    stdout: str
    stderr: str


def train(output_dir: str, *options: str, signal_at: tuple[int, int] | None = None) -> Outcome:
    """Trains as this rank of a launch; ``{rank}`` in ``output_dir`` becomes this rank.

    ``signal_at`` = (rank, step): that rank alone gets a SIGTERM at the top of that step, counted over the epochs; with
    step = -1, in the middle of the first evaluation.
    """
    from tlgc_mp.cli.main import main
    from tlgc_mp.resilience.interrupt import StopRequest

    rank = int(os.environ["RANK"])
    if signal_at is not None and signal_at[0] == rank:
        before_step, asked, at = StopRequest.before_step, StopRequest.asked, signal_at[1]

        def interrupted(self: StopRequest, step: int) -> bool:
            if step == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return before_step(self, step)

        def interrupted_evaluation(self: StopRequest, device: Any) -> bool:
            agreed = asked(self, device)
            if at < 0:
                os.kill(os.getpid(), signal.SIGTERM)  # after the ranks have agreed to go on
            return agreed

        StopRequest.before_step = interrupted  # type: ignore[method-assign]
        StopRequest.asked = interrupted_evaluation  # type: ignore[method-assign]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = main([*OPTIONS, "--output-dir", output_dir.format(rank=rank), *options])
    return Outcome(status, out.getvalue(), err.getvalue())


def tlgc_mp(*words: str) -> Outcome:
    """The command with these words alone, as this rank of a launch."""
    from tlgc_mp.cli.main import main

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = main(words)
    return Outcome(status, out.getvalue(), err.getvalue())


def train_until(signal_at: tuple[int, int], output_dir: str, *options: str) -> Outcome:
    return train(output_dir, *options, signal_at=signal_at)


def metrics(output_dir: Path) -> list[dict[str, Any]]:
    """The lines of the epochs."""
    return [line for line in _lines(output_dir) if "loss" not in line]


def step_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """The lines between."""
    return [line for line in _lines(output_dir) if "loss" in line]


def _lines(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
