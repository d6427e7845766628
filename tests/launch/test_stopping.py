"""Ctrl-C, and the signal that a scheduler sends: the state is saved, and the run goes on from it to the same end."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.launch.forked import SHORT, figures, forked, told_once
from tests.launch.jobs import Job, free_port, started

LAUNCHERS = ("deepspeed", "torchrun", "train_mpi.sh")
MOMENTS = ("training", "evaluation", "save")
TAGS = {"training": "epoch-2-step-", "evaluation": "epoch-1", "save": "epoch-"}
"""Moment -> how the name of the checkpoint begins that is saved then."""
EVERY_RUN = {("deepspeed", "evaluation"), ("torchrun", "save"), ("train_mpi.sh", "training")}
OPTIONS = [*SHORT, "--workers", "1"]
SECONDS = 30.0
"""The longest that a job may take to end."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The figures of a run that nothing stops."""
    with forked(SHORT, tmp_path_factory.mktemp("undisturbed") / "run", port=free_port()) as job:
        assert job.wait(150.0) == [0, 0], job.said()
        return figures(job.lines())


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("launcher", "moment"),
    [
        pytest.param(launcher, moment, marks=[] if (launcher, moment) in EVERY_RUN else pytest.mark.slow)
        for launcher in LAUNCHERS
        for moment in MOMENTS
    ],
)
def test_ctrl_c_with_data_workers_saves(
    tmp_path: Path, undisturbed: list[dict[str, Any]], launcher: str, moment: str
) -> None:
    with lingering(launcher, tmp_path, moment) as job:
        wait_for(tmp_path / "there", job)
        job.ctrl_c()
        check_stopped(job, TAGS[moment])
    check_resumed(tmp_path / "run", undisturbed)


@pytest.mark.timeout(400)
def test_sigterm_to_the_script_saves(tmp_path: Path, undisturbed: list[dict[str, Any]]) -> None:
    """A scheduler's, or `kill`'s, to the script alone."""
    with lingering("train_mpi.sh", tmp_path, "training") as job:
        wait_for(tmp_path / "there", job)
        job.process.send_signal(signal.SIGTERM)
        check_stopped(job, "epoch-2-step-")
        assert job.process.returncode == 128 + signal.SIGTERM
    check_resumed(tmp_path / "run", undisturbed)


@pytest.mark.timeout(400)
def test_workers_are_not_needed_once_all_agree_to_stop(tmp_path: Path) -> None:
    variables = {"LINGERS": "leaving", "THERE": ""}
    with forked(OPTIONS, tmp_path / "run", port=free_port(), **variables) as job:
        job.wait_for_epoch()
        os.kill(job.ranks()[1], signal.SIGTERM)
        assert job.wait(SECONDS) == [128 + signal.SIGTERM] * 2, job.said()
        assert "stopped by SIGTERM" in told_once(job.stderr())


def lingering(launcher: str, folder: Path, moment: str) -> Any:
    variables = {"LINGERS": moment, "THERE": str(folder / "there")}
    return started(launcher, OPTIONS, folder / "run", module="tests.launch.faulty", **variables)


def wait_for(file: Path, job: Job) -> None:
    deadline = time.monotonic() + 200.0
    while not file.exists():
        assert job.process.poll() is None and time.monotonic() < deadline, job.said()
        time.sleep(0.02)


def check_stopped(job: Job, tag: str) -> None:
    """That the job ends in time with a whole checkpoint whose name begins with ``tag``, and says where it lies."""
    assert job.wait(SECONDS) != 0
    assert not job.left(SECONDS)  # deepspeed leaves before its own launcher on the host, which waits for the ranks
    checkpoints = job.output_dir / "checkpoints"
    latest = (checkpoints / "latest").read_text().strip()
    assert latest.startswith(tag), job.said()
    assert not [name for name in os.listdir(checkpoints) if name.endswith(".partial")]
    told = [line for line in job.stderr.splitlines() if line.startswith("tlgc-mp")]
    assert len(told) == 1 and told[0].endswith(f"--resume goes on from {checkpoints / latest}"), job.said()


def check_resumed(output_dir: Path, undisturbed: list[dict[str, Any]]) -> None:
    with forked([*OPTIONS, "--resume"], output_dir, port=free_port()) as job:
        assert job.wait(150.0) == [0, 0], job.said()
        assert figures(job.lines()) == undisturbed
