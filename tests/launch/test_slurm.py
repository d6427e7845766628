"""Under a real Slurm: ``srun`` as a launcher, and ``scripts/train_slurm.sh`` stopped, requeued and submitted again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launch.forked import SHORT, figures, forked
from tests.launch.jobs import free_port, script
from tests.launch.slurm import Slurm, running_slurm
from tests.training.runs import metrics

OPTIONS = [*SHORT, "--workers", "1"]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with running_slurm() as slurm:
        yield slurm


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The figures of a run of two ranks that nothing happens to."""
    with forked(SHORT, tmp_path_factory.mktemp("undisturbed") / "run", port=free_port()) as job:
        assert job.wait(100.0) == [0, 0], job.said()
        return figures(job.lines())


@pytest.mark.timeout(200)
def test_srun_is_a_launcher(slurm: Slurm, tmp_path: Path, undisturbed: list[dict[str, Any]]) -> None:
    output_dir = str(tmp_path / "run")
    done = slurm.run(
        "srun", "-n2", "python", "-m", "tlgc_mp", "train", *SHORT, "--output-dir", output_dir, seconds=150.0
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("on 2 rank(s): 2 tensor-parallel x 1 data-parallel") == 1
    assert figures(metrics(tmp_path / "run")) == undisturbed


@pytest.mark.timeout(500)
def test_job_that_is_stopped_ends_well_and_one_that_depends_on_it_goes_on(
    slurm: Slurm, tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    first = _submit(slurm, tmp_path)
    second = _submit(slurm, tmp_path, f"--dependency=afterok:{first}")
    _wait_until_it_trains(slurm, tmp_path, first)
    slurm.run("scancel", "--signal=TERM", first)  # as --signal=TERM@60 does at the time limit
    assert slurm.wait_for_state(first, "COMPLETED", "FAILED")["ExitCode"] == "0:0", _log(tmp_path)
    assert "stopped by SIGTERM; --resume goes on from" in _log(tmp_path)
    assert slurm.wait_for_state(second, "COMPLETED", "FAILED")["ExitCode"] == "0:0", _log(tmp_path)
    assert _log(tmp_path).count("Resuming in epoch 2, after step ") == 1
    assert figures(metrics(tmp_path / "run")) == undisturbed


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_requeued_job_goes_on(slurm: Slurm, tmp_path: Path, undisturbed: list[dict[str, Any]]) -> None:
    job = _submit(slurm, tmp_path)
    _wait_until_it_trains(slurm, tmp_path, job)
    assert slurm.run("scontrol", "requeue", job).returncode == 0
    slurm.wait_for_state(job, "PENDING")
    slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    assert slurm.wait_for_state(job, "COMPLETED", "FAILED")["ExitCode"] == "0:0", _log(tmp_path)
    said = _log(tmp_path)
    assert said.count("Loading torch and deepspeed") == 2 and said.count("Resuming in epoch ") == 1, said
    assert figures(metrics(tmp_path / "run")) == undisturbed


def _submit(slurm: Slurm, folder: Path, *flags: str) -> str:
    path = script(folder, "train_slurm.sh", "tests.launch.faulty")
    done = slurm.run(
        *("sbatch", "--parsable", "--ntasks-per-node=2", f"--output={folder / 'log'}", *flags),
        *(path, *OPTIONS, "--output-dir", str(folder / "run")),
        cwd=folder,
        LINGERS="training",
        THERE=str(folder / "there"),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _wait_until_it_trains(slurm: Slurm, folder: Path, job: str) -> None:
    deadline = time.monotonic() + 150.0
    while not ((folder / "there").exists() and (folder / "run" / "checkpoints" / "latest").exists()):
        assert time.monotonic() < deadline, (slurm.told(job), _log(folder))
        time.sleep(0.05)


def _log(folder: Path) -> str:
    return (folder / "log").read_text() if (folder / "log").exists() else ""
