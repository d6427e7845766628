"""A run's output folder is one run's at a time, and the same one on all ranks."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.launch.forked import SHORT, forked, told_once
from tests.launch.jobs import free_port
from tests.ranks import run_ranks
from tlgc_mp.errors import UsageError
from tlgc_mp.resilience.claim import claimed


@pytest.mark.timeout(250)
def test_second_run_in_a_folder_is_refused_by_name_until_the_first_is_gone(tmp_path: Path) -> None:
    there = tmp_path / "there"
    (tmp_path / "same").symlink_to(tmp_path / "run")
    options = [*SHORT, "--resume", "auto"]
    with forked(options, tmp_path / "run", port=free_port(), LINGERS="training", THERE=str(there)) as job:
        deadline = time.monotonic() + 100.0
        while not (there.exists() and (tmp_path / "run" / "checkpoints" / "latest").exists()):
            assert time.monotonic() < deadline, job.said()
            time.sleep(0.02)
        for rank in job.ranks():
            os.kill(rank, signal.SIGSTOP)  # it writes no more, and it lives
        owner = job.ranks()[0]
        with forked(options, tmp_path / "same", port=free_port()) as second:
            assert second.wait(60.0) == [2, 2], second.said()
            line = told_once(second.stderr())
        assert line.startswith("tlgc-mp: error: --output-dir must be a folder that no other run writes to, got "), line
        assert f"{str(tmp_path / 'same')!r}, which process {owner} on {socket.gethostname()} holds; wait" in line, line
        for rank in job.ranks():
            os.kill(rank, signal.SIGKILL)
        job.wait(30.0)
        assert len(job.lines()) == 1
    with forked(options, tmp_path / "run", port=free_port()) as third:
        assert third.wait(100.0) == [0, 0], third.said()
        assert "Resuming in epoch 1, after step 3" in third.said()
        assert [line["epoch"] for line in third.lines()] == [1, 2, 3]


@pytest.mark.timeout(100)
def test_folder_that_is_not_shared_is_found_at_the_start(tmp_path: Path) -> None:
    with forked(SHORT, tmp_path / "of-rank-{rank}", port=free_port()) as job:
        assert job.wait(80.0) == [2, 2], job.said()
        line = told_once(job.stderr())
    assert line.startswith("tlgc-mp: error: --output-dir must be a folder that all ranks see, got "), line
    assert (
        f"{str(tmp_path / 'of-rank-1')!r}, which on rank 1 ({socket.gethostname()}) is another than on rank 0" in line
    )


@pytest.mark.timeout(60)
def test_ranks_that_mean_different_checkpoints_are_refused(tmp_path: Path) -> None:
    """As where a folder that is not shared holds a checkpoint on one host only."""
    assert run_ranks(2, _claim, str(tmp_path), [None, ("run", "epoch-1")]) == [
        None,
        "--resume must mean the same checkpoint on every rank, got 'epoch-1' on rank 1 and None on rank 0; name the "
        "checkpoint, and give all ranks one folder",
    ]


def _claim(folder: str, resume_from: list[tuple[str, str] | None]) -> str | None:
    try:
        with claimed(folder, resume_from[dist.get_rank()]):
            return None
    except UsageError as error:
        return str(error)
