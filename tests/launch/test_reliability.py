"""Each fault many times, in a random rank at a random moment; the run is then gone on with, and must end as one that
nothing happened to: the same figures to the last digit, and the same weights bit for bit.

REPETITIONS (20) and LAUNCHED_REPETITIONS (3) in the environment say how often; SEED (0) what is random. The rows go to
the file that RELIABILITY_TABLE names, as they are made.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.launch.disks import FILLER, fill, small_disk
from tests.launch.forked import SHORT, WORLD, ForkedJob, figures, forked, told_once
from tests.launch.jobs import free_port, started
from tlgc_mp.checkpoint.folder import CHECKPOINTS, newest_whole

pytestmark = pytest.mark.slow

REPETITIONS = int(os.environ.get("REPETITIONS", "20"))
LAUNCHED_REPETITIONS = int(os.environ.get("LAUNCHED_REPETITIONS", "3"))
SEED = int(os.environ.get("SEED", "0"))
RANK_TIMEOUT = 15.0
STEPS = 9
STEPS_AN_EPOCH = 3
BOUND = 30.0
"""Seconds from the fault until no rank is left, beyond the rank timeout where a rank is stopped."""
FAULTS = {
    "kill": "has died",
    "stop": "is stopped (SIGSTOP) and has not answered",
    "exception": "KeyError: 'no such layer'",
    "memory": "out of memory: ",
    "nan": "the loss is nan",
    "disk": "No space left on device",
    "full disk": "No space left on device",
    "worker": "was killed by SIGKILL",
}


@dataclass
class Undisturbed:
    figures: list[dict[str, Any]]
    weights: list[str]
    seconds: float  # from the beginning of training


@dataclass
class Repetition:
    seconds: float  # from the fault until no rank was left
    lost_steps: int | None  # that had been trained, and were trained again


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    with _train(folder) as job:
        _wait_for_start(job)
        began = time.monotonic()
        assert job.wait(200.0) == [0] * WORLD, job.said()
        return Undisturbed(figures(job.lines()), _weights(folder), time.monotonic() - began)


@pytest.mark.timeout(REPETITIONS * 240 + 300)
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_at_a_random_moment(tmp_path: Path, undisturbed: Undisturbed, fault: str) -> None:
    done = []
    for repetition in range(REPETITIONS):
        chance = random.Random(f"{SEED} {fault} {repetition}")
        print(f"{fault}, repetition {repetition} of seed {SEED}", file=sys.stderr)
        row = None
        for attempt in range(10):
            folder = tmp_path / f"{repetition}-{attempt}"
            folder.mkdir()
            if fault == "full disk":
                row = _on_a_full_disk(folder, undisturbed, chance)
            elif fault in ("kill", "stop"):
                row = _from_outside(folder, undisturbed, fault, chance)
            else:
                row = _from_inside(folder, fault, chance)
            if row is not None:
                break
        assert row is not None, "ten runs were over before anything could happen to them"
        done.append(row)
        _finish(folder, undisturbed)
        shutil.rmtree(folder)
    _report(f"{fault}, in ranks without a launcher", done)


@pytest.mark.timeout(REPETITIONS * 120 + 300)
def test_port_taken(tmp_path: Path, undisturbed: Undisturbed) -> None:
    done = []
    for repetition in range(REPETITIONS):
        folder = tmp_path / str(repetition)
        folder.mkdir()
        with socket.socket() as other:
            other.bind(("", 0))
            other.listen()
            began = time.monotonic()
            with _train(folder, port=str(other.getsockname()[1])) as job:
                assert job.wait_for(0, 60.0) == 1
                done.append(Repetition(time.monotonic() - began, 0))
                assert "is taken by another process" in told_once(job.stderr())
        if repetition == 0:
            _finish(folder, undisturbed)
    _report("port taken, from the start of the process", done)


@pytest.mark.timeout(LAUNCHED_REPETITIONS * 700 + 300)
@pytest.mark.parametrize("fault", ["kill", "stop"])
@pytest.mark.parametrize("launcher", ["mpirun", "deepspeed", "torchrun"])
def test_launched_run_is_started_again(tmp_path: Path, undisturbed: Undisturbed, launcher: str, fault: str) -> None:
    done = []
    for repetition in range(LAUNCHED_REPETITIONS):
        chance = random.Random(f"{SEED} {launcher} {fault} {repetition}")
        folder = tmp_path / str(repetition)
        folder.mkdir()
        once, at, rank = folder / "once", chance.randrange(STEPS), chance.randrange(WORLD)
        print(f"{launcher}, {fault}, repetition {repetition} of seed {SEED}: step {at}", file=sys.stderr)
        launch = [sys.executable, "-m", "tlgc_mp", "launch", "--max-restarts", "1", "--"]
        variables = {"FAULT": fault, "FAULT_RANK": str(rank), "FAULT_STEP": str(at), "FAULT_ONCE": str(once)}
        options = [*SHORT, "--rank-timeout", str(RANK_TIMEOUT)]
        with started(
            launcher,
            options,
            folder / "run",
            before=launch,
            module="tests.launch.faulty",
            WEIGHTS=str(folder),
            **variables,
        ) as job:
            deadline = time.monotonic() + 600.0
            while "starting again" not in job.stderr:
                assert job.process.poll() is None and time.monotonic() < deadline, job.said()
                time.sleep(0.05)
            seconds = time.time() - once.stat().st_mtime
            assert seconds < BOUND + RANK_TIMEOUT
            done.append(Repetition(seconds, at % STEPS_AN_EPOCH))
            assert job.wait(600.0) == 0, job.said()
            assert not job.left()
            told = [line for line in job.stderr.splitlines() if line.startswith("tlgc-mp: rank")]
            assert len(told) == 1 and told[0].startswith(f"tlgc-mp: rank {rank}: "), job.stderr
            assert figures(job.lines()) == undisturbed.figures
            assert _weights(folder) == undisturbed.weights
    _report(f"{fault}, under {launcher}, started again by `tlgc-mp launch`", done)


def _from_outside(folder: Path, undisturbed: Undisturbed, fault: str, chance: random.Random) -> Repetition | None:
    """Kills or stops a rank at a random moment of a run; ``None`` where the run was over before."""
    number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[fault]
    rank = chance.randrange(WORLD)
    with _train(folder) as job:
        _wait_for_start(job)
        time.sleep(chance.uniform(0, 0.8 * undisturbed.seconds))
        if len(job.lines()) == len(undisturbed.figures):
            return None
        began = time.monotonic()
        os.kill(job.ranks()[rank], number)
        return Repetition(_ended(job, fault, rank, began), None)


def _on_a_full_disk(folder: Path, undisturbed: Undisturbed, chance: random.Random) -> Repetition | None:
    """Fills the file system of a run at a random moment; ``None`` where the run was over before."""
    with small_disk(folder / "disk", 16) as disk:
        (folder / "run-said").mkdir()
        (disk / "run-said").symlink_to(folder / "run-said")
        with _train(folder, output_dir=disk / "run") as job:
            _wait_for_start(job)
            time.sleep(chance.uniform(0, 0.8 * undisturbed.seconds))
            if len(job.lines()) == len(undisturbed.figures):
                return None
            began = time.monotonic()
            fill(disk)
            done = Repetition(_ended(job, "full disk", None, began), None)
        (disk / FILLER).unlink()
        shutil.copytree(disk / "run", folder / "run")
    return done


def _from_inside(folder: Path, fault: str, chance: random.Random) -> Repetition:
    """Has a fault happen before a random step."""
    at = chance.randrange(STEPS)
    rank = 0 if fault == "disk" else chance.randrange(WORLD)
    once = folder / "once"
    variables = {"FAULT": fault, "FAULT_RANK": str(rank), "FAULT_STEP": str(at), "FAULT_ONCE": str(once)}
    workers = ["--workers", "1"] if fault == "worker" else []
    with _train(folder, *workers, **variables) as job:
        deadline = time.monotonic() + 200.0
        while not once.exists():
            assert time.monotonic() < deadline, job.said()
            time.sleep(0.02)
        seconds = _ended(job, fault, rank, time.monotonic())
    # What is full is noticed when the epoch's figures are written, after its checkpoint.
    return Repetition(seconds, 0 if fault == "disk" else at % STEPS_AN_EPOCH)


def _ended(job: ForkedJob, fault: str, rank: int | None, began: float) -> float:
    """Checks how a job ends after a fault, of that rank where it is one rank's; how many seconds it took."""
    bound = BOUND + (RANK_TIMEOUT if fault == "stop" else 0.0)
    statuses = job.wait(bound)
    seconds = time.monotonic() - began
    # Rank 1 may have done all it had to when rank 0 cannot write the run's last figures.
    assert any(statuses) if fault == "full disk" else 0 not in statuses
    line = told_once(job.stderr())
    told_by = "tlgc-mp: rank " if rank is None else f"tlgc-mp: rank {rank}: "
    assert line.startswith(told_by) and FAULTS[fault] in line, line
    assert "Traceback" not in job.said()
    assert not job.left(bound)
    return seconds


def _finish(folder: Path, undisturbed: Undisturbed) -> None:
    """Goes on with the run in ``folder`` from its newest checkpoint, to the same end as one without a fault."""
    checkpoints = folder / "run" / CHECKPOINTS
    tag = newest_whole(str(checkpoints))
    resume = [] if tag is None else ["--resume", str(checkpoints / tag)]
    with _train(folder, *resume) as job:
        assert job.wait(200.0) == [0] * WORLD, job.said()
        assert figures(job.lines()) == undisturbed.figures
    assert _weights(folder) == undisturbed.weights


@contextlib.contextmanager
def _train(
    folder: Path, *options: str, output_dir: Path | None = None, port: str | None = None, **variables: str
) -> Iterator[ForkedJob]:
    words, output_dir = [*SHORT, "--rank-timeout", str(RANK_TIMEOUT), *options], output_dir or folder / "run"
    with forked(words, output_dir, port=port or free_port(), WEIGHTS=str(folder), **variables) as job:
        yield job


def _wait_for_start(job: ForkedJob) -> None:
    deadline = time.monotonic() + 200.0
    while "tensor-parallel x" not in job.said():
        assert time.monotonic() < deadline, job.said()
        time.sleep(0.02)


def _weights(folder: Path) -> list[str]:
    return [(folder / f"weights-{rank}").read_text() for rank in range(WORLD)]


def _report(what: str, done: list[Repetition]) -> None:
    seconds = sorted(repetition.seconds for repetition in done)
    lost = [repetition.lost_steps for repetition in done if repetition.lost_steps is not None]
    row = (
        f"| {what} | {len(done)} | {seconds[len(seconds) // 2]:.1f} | {seconds[-1]:.1f} | "
        f"{f'{max(lost)} at most' if lost else 'not counted'} |"
    )
    path = os.environ.get("RELIABILITY_TABLE")
    if path is not None:
        heading = (
            "| fault | times | ended within, s: median | longest | steps trained again, of 3 an epoch |\n"
            "|---|---|---|---|---|\n"
        )
        with open(path, "a", encoding="utf-8") as file:
            file.write(("" if file.tell() else heading) + row + "\n")
    print(row, file=sys.stderr)
