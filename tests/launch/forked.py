"""Ranks of ``tlgc-mp train`` without a launcher: nobody ends the others when one fails, so they must do so themselves.

They are forked from the server of :mod:`tests.ranks`, which has loaded torch and deepspeed, and so start in no time.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests import ranks
from tests.launch.jobs import MARK, marked

WORLD = 2
SHORT = [
    *("--model", "wrn-10-1", "--dataset", "synthetic", "--image-size", "8", "--batch-size", "128"),
    *("--limit-steps", "3", "--epochs", "3"),
]
"""Options of a run of nine steps."""


class ForkedJob:
    """Two ranks that train; see :func:`forked`."""

    def __init__(self, processes: list[BaseProcess], output_dir: Path, said: Path) -> None:
        self._processes = processes
        self.output_dir = output_dir
        self._said = said

    def ranks(self) -> list[int]:
        return [process.pid or 0 for process in self._processes]

    def wait(self, seconds: float) -> list[int | None]:
        """The exit status of each rank, when all have ended."""
        deadline = time.monotonic() + seconds
        return [self.wait_for(rank, deadline - time.monotonic()) for rank in range(WORLD)]

    def wait_for(self, rank: int, seconds: float) -> int | None:
        """The exit status of one."""
        process = self._processes[rank]
        process.join(max(0.0, seconds))
        assert process.exitcode is not None, f"rank {rank} has not ended in time; the ranks said\n{self.said()}"
        return process.exitcode

    def stderr(self) -> str:
        return (self._said / "stderr").read_text(encoding="utf-8")

    def said(self) -> str:
        return (self._said / "stdout").read_text(encoding="utf-8") + self.stderr()

    def lines(self) -> list[dict[str, Any]]:
        """The lines of its metrics file that are of epochs."""
        try:
            text = (self.output_dir / "metrics.jsonl").read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [line for line in lines if "loss" not in line]

    def wait_for_epoch(self, epoch: int = 1, seconds: float = 100.0) -> None:
        """Returns when that epoch's figures are there."""
        deadline = time.monotonic() + seconds
        while len(self.lines()) < epoch:
            ended = [process.exitcode for process in self._processes]
            assert ended == [None] * WORLD, f"ranks ended with {ended} before epoch {epoch}; they said\n{self.said()}"
            assert time.monotonic() < deadline, f"no epoch {epoch} within {seconds} s; the ranks said\n{self.said()}"
            time.sleep(0.02)

    def left(self, seconds: float = 12.0) -> dict[int, list[str]]:
        """What these ranks started and still runs after ``seconds``."""
        deadline = time.monotonic() + seconds
        while (found := marked(self.output_dir)) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found


@contextlib.contextmanager
def forked(options: list[str], output_dir: Path, *, port: str, **variables: str) -> Iterator[ForkedJob]:
    """Trains in two forked ranks, all of which are killed on leaving. They meet at ``port``. ``{rank}`` in
    ``output_dir`` becomes the rank."""
    said = output_dir.parent / f"{output_dir.name}-said"
    said.mkdir(exist_ok=True)
    for stream in ("stdout", "stderr"):
        (said / stream).write_text("")
    processes: list[BaseProcess] = []
    try:
        for rank in range(WORLD):
            environment = {
                **variables,
                MARK: str(output_dir),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(WORLD),
                "LOCAL_WORLD_SIZE": str(WORLD),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
                "DS_ACCELERATOR": "cpu",
            }
            arguments = ["train", *options, "--output-dir", str(output_dir).replace("{rank}", str(rank))]
            process = ranks._context.Process(target=_rank, args=(arguments, environment, str(said)))
            process.start()
            processes.append(process)
        yield ForkedJob(processes, output_dir, said)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def _rank(arguments: list[str], environment: dict[str, str], said: str) -> None:
    for number, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(os.path.join(said, stream), os.O_WRONLY | os.O_APPEND), number)
    faulthandler.enable()
    os.environ.update(environment)
    sys.argv[1:] = arguments
    import torch

    from tests.launch.faulty import main

    torch.set_num_threads(1)
    ranks._context.set_forkserver_preload(["tlgc_mp.data"])  # of the data workers' own server
    main()


def told_once(stderr: str) -> str:
    """The one line that ``tlgc-mp`` says."""
    lines = [line for line in stderr.splitlines() if line.startswith("tlgc-mp")]
    assert len(lines) == 1, stderr
    return lines[0]


def figures(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a metrics file without the times."""
    return [{key: value for key, value in line.items() if not key.endswith("seconds")} for line in lines]
