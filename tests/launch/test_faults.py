"""A rank that dies, a mistake in the arguments, Ctrl-C: the job ends, says it once, and leaves nothing running."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.launch.jobs import started
from tests.ranks import run_ranks

LAUNCHERS = ("deepspeed", "mpirun")
EPOCHS = 5
OPTIONS = [
    *("--model", "wrn-10-1", "--dataset", "synthetic", "--image-size", "8", "--batch-size", "32"),
    *("--epochs", str(EPOCHS)),
]
MISTAKE = "tlgc-mp: error: groups=3 does not divide the stem's 16 channels; use one of 1, 2, 4, 8, 16"
SECONDS = 30.0
"""The longest that a job may take to end."""


@pytest.mark.timeout(180)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_killed_rank_ends_the_job(tmp_path: Path, launcher: str) -> None:
    options = [*OPTIONS[:-1], "500"]
    with started(launcher, options, tmp_path / "run") as job:
        job.wait_for_epoch()
        ranks = job.ranks()
        assert len(ranks) == 2, job.processes()
        os.kill(ranks[1], signal.SIGKILL)

        assert job.wait(SECONDS) != 0
        assert not job.left()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_mistake_is_told_once(tmp_path: Path, launcher: str) -> None:
    with started(launcher, [*OPTIONS, "--groups", "3"], tmp_path / "run") as job:
        status = job.wait(SECONDS)

        assert status == 2, job.said()
        assert [told for told in job.said().splitlines() if "tlgc-mp: error" in told] == [MISTAKE]
        assert "Traceback" not in job.said()
        assert not (tmp_path / "run").exists()
        assert not job.left()


@pytest.mark.timeout(200)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ctrl_c_leaves_a_checkpoint_to_resume_from(tmp_path: Path, launcher: str) -> None:
    output_dir = tmp_path / "run"
    with started(launcher, OPTIONS, output_dir) as job:
        job.wait_for_epoch()
        began = time.monotonic()
        job.ctrl_c()

        job.wait(SECONDS - (time.monotonic() - began))
        assert not job.left()
        before = job.lines()
        said = job.said()

    assert len(before) < EPOCHS, "the run was over before it was interrupted"
    latest = (output_dir / "checkpoints" / "latest").read_text().strip()
    # Not the checkpoint of the last whole epoch, which was there before Ctrl-C.
    assert latest != f"epoch-{len(before)}", said

    assert run_ranks(2, _resume, str(output_dir)) == [0, 0]
    after = job.lines()
    assert after[: len(before)] == before
    assert [line["epoch"] for line in after] == list(range(1, EPOCHS + 1))


def _resume(output_dir: str) -> int:
    from tlgc_mp.cli import main

    return main(["train", *OPTIONS, "--output-dir", output_dir, "--resume"])
