"""A rank that dies, stops, fails, runs out of memory or disk, a mistake in the arguments: the job ends, says it once,
and leaves nothing running."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from tests.launch.forked import SHORT, figures, forked, told_once
from tests.launch.jobs import command, free_port, started
from tests.ranks import run_ranks
from tlgc_mp.errors import UsageError
from tlgc_mp.parallel.topology import Topology
from tlgc_mp.resilience import watchdog
from tlgc_mp.resilience.verdicts import Failed

LAUNCHERS = ("deepspeed", "mpirun")
OPTIONS = [
    *("--model", "wrn-10-1", "--dataset", "synthetic", "--image-size", "8", "--batch-size", "32"),
    *("--epochs", "500"),
]
MISTAKE = "tlgc-mp: error: groups must be a divisor of the stem's 16 channels, got 3; use one of 1, 2, 4, 8, 16"
SECONDS = 30.0
"""The longest that a job may take to end."""


@pytest.mark.timeout(180)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_killed_rank_ends_the_job(tmp_path: Path, launcher: str) -> None:
    with started(launcher, OPTIONS, tmp_path / "run") as job:
        job.wait_for_epoch()
        ranks = job.ranks()
        assert len(ranks) == 2, job.processes()
        os.kill(ranks[1], signal.SIGKILL)

        assert job.wait(SECONDS) != 0
        assert f"process {ranks[1]} on" in told_once(job.stderr), job.said()
        assert not job.left()


RANK_TIMEOUT = 10.0
# The fault, the rank it happens in, and what is told of it. It happens in the second epoch.
INJECTED = {
    "kill": (1, "has died"),
    "kill rank 0": (0, "has died"),
    "stop": (1, "is stopped (SIGSTOP) and has not answered for 1"),
    "stop rank 0": (0, "is stopped (SIGSTOP) and has not answered for 1"),
    "exception": (1, "KeyError: 'no such layer' (traceback: "),
    "memory": (1, "out of memory: "),
    "nan": (1, "the loss is nan in epoch 2 after step 2; nothing of it is saved"),
    "disk": (0, "a file cannot be written: No space left on device: /dev/full"),
    "worker": (1, "was killed by SIGKILL"),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The figures of a run that nothing happens to."""
    with forked(SHORT, tmp_path_factory.mktemp("undisturbed") / "run", port=free_port()) as job:
        assert job.wait(100.0) == [0, 0], job.said()
        assert not job.stderr(), job.stderr()
        return figures(job.lines())


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", INJECTED)
def test_fault_ends_every_rank_and_the_run_can_be_resumed(
    tmp_path: Path, undisturbed: list[dict[str, Any]], name: str
) -> None:
    """No launcher ends the other rank here."""
    (rank, told), fault = INJECTED[name], name.split()[0]
    workers = ["--workers", "1"] if fault == "worker" else []
    options = [*SHORT, *workers, "--rank-timeout", str(RANK_TIMEOUT)]
    variables = {"FAULT": fault, "FAULT_RANK": str(rank), "FAULT_STEP": "4"}
    with forked(options, tmp_path / "run", port=free_port(), **variables) as job:
        job.wait_for_epoch()
        statuses = job.wait(SECONDS + RANK_TIMEOUT)

        assert 0 not in statuses
        line = told_once(job.stderr())
        assert line.startswith(f"tlgc-mp: rank {rank}: ") and told in line, line
        assert "Traceback" not in job.said() and "terminate called" not in job.said()
        assert not job.left()
        lost = fault in ("kill", "stop")
        assert statuses[rank] == (-signal.SIGKILL if lost else 1) and statuses[1 - rank] == 1
        if fault == "exception":
            assert "in exception\n" in (tmp_path / "run" / "rank-1.traceback").read_text()

    if name in ("kill", "stop rank 0", "disk"):
        with forked([*SHORT, "--resume"], tmp_path / "run", port=free_port()) as job:
            assert job.wait(100.0) == [0, 0], job.said()
            assert figures(job.lines()) == undisturbed


@pytest.mark.timeout(120)
def test_killed_rank_that_was_alone_on_its_machine_is_named(tmp_path: Path) -> None:
    variables = {"FAULT": "kill", "FAULT_RANK": "1", "FAULT_STEP": "4", "OWN_MACHINES": "1"}
    with forked(SHORT, tmp_path / "run", port=free_port(), **variables) as job:
        killed = job.ranks()[1]
        assert job.wait(SECONDS + 60.0) == [1, -signal.SIGKILL], job.said()
        line = told_once(job.stderr())
    assert line.startswith(f"tlgc-mp: rank 1: process {killed} on {socket.gethostname()} has not answered for "), line


@pytest.mark.timeout(120)
def test_rank_that_fails_while_ranks_meet_ends_those_that_wait(tmp_path: Path) -> None:
    with forked(SHORT, tmp_path / "run", port=free_port(), UNMET="1") as job:
        assert job.wait(60.0) == [1, 1], job.said()
        assert told_once(job.stderr()).startswith("tlgc-mp: rank 1: KeyError: 'no such interface' (traceback: ")


@pytest.mark.timeout(120)
def test_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        with forked(SHORT, tmp_path / "run", port=port) as job:
            assert job.wait_for(0, 60.0) == 1
            line = told_once(job.stderr())
    assert line.startswith(f"tlgc-mp: rank 0: port {port}, where the ranks are to meet, is taken"), line
    assert not (tmp_path / "run").exists()


@pytest.mark.timeout(120)
def test_stopped_rank_that_goes_on_in_time_is_not_lost(tmp_path: Path, undisturbed: list[dict[str, Any]]) -> None:
    with forked([*SHORT, "--rank-timeout", str(RANK_TIMEOUT)], tmp_path / "run", port=free_port()) as job:
        job.wait_for_epoch()
        for number in (signal.SIGSTOP, signal.SIGCONT):
            os.kill(job.ranks()[0], number)
            time.sleep(RANK_TIMEOUT / 3)
        assert job.wait(100.0) == [0, 0], job.said()
        assert figures(job.lines()) == undisturbed


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


@pytest.mark.timeout(60)
def test_mistake_is_told_by_a_rank_that_comes_late() -> None:
    """mpirun ends rank 0 with its first word, or none, once another rank has failed."""
    late = f'[ "$OMPI_COMM_WORLD_RANK" != 0 ] || sleep 3; exec "{sys.executable}" -m tlgc_mp train --groups 3'
    words = [*command("mpirun", Path())[:-4], "sh", "-c", late]
    done = subprocess.run(words, capture_output=True, text=True, timeout=50)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("tlgc-mp")] == [MISTAKE]


@pytest.mark.timeout(120)
def test_a_rank_waits_for_none_that_has_read_why_it_ends(tmp_path: Path) -> None:
    """These live on, as for all that a rank can tell do those of other hosts."""
    assert run_ranks(2, _refused_alike, str(tmp_path), timeout=60.0) == [2, 2]


def _refused_alike(folder: str) -> int:
    with (
        mock.patch.multiple(watchdog, BEAT_SECONDS=90.0, ECHO_SECONDS=90.0),  # no beat brings it in time
        pytest.raises(Failed) as failed,
        watchdog.Watchdog(Topology(2, dist.get_rank(), 1), folder, rank_timeout=600.0) as watch,
    ):
        watch.start()
        dist.barrier()
        time.sleep(0.5)  # all have introduced themselves
        raise UsageError("groups must be 1 or more, got 0")
    return failed.value.status
