"""One job over two hosts under every launcher: the figures of one host, and the same after a rank was killed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launch.forked import SHORT, figures, forked
from tests.launch.hosts import two_hosts
from tests.launch.jobs import BIN, free_port, script
from tests.training.runs import metrics

pytestmark = pytest.mark.slow

PORT = "29533"
ON_TWO_HOSTS = "2 tensor-parallel x 1 data-parallel, on 2 hosts"


def deepspeed(folder: Path, module: str) -> list[str]:
    (folder / "hosts.txt").write_text("node1 slots=1\nnode2 slots=1\n")
    (folder / "forwarded").write_text("OMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\n")
    return [
        "env",
        f"DS_ENV_FILE={folder / 'forwarded'}",
        "deepspeed",
        "--hostfile",
        str(folder / "hosts.txt"),
        "--master_port",
        PORT,
        "--module",
        module,
        "train",
    ]


def torchrun(folder: Path, module: str) -> list[str]:
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"node1:{PORT}"]
    return ["torchrun", "--nnodes", "2", "--nproc-per-node", "1", *meeting, "-m", module, "train"]


def train_mpi(folder: Path, module: str) -> list[str]:
    return ["env", "HOSTS=node1:1,node2:1", script(folder, "train_mpi.sh", module), "2"]


def mpirun(folder: Path, module: str) -> list[str]:
    names = ("PYTHONPATH", "PATH", "OMP_NUM_THREADS", "FAULT", "FAULT_RANK", "FAULT_STEP", "FAULT_ONCE")
    forwarded = [word for name in names for word in ("-x", name)]
    hosts = ["--host", "node1:1,node2:1", "--oversubscribe", "--bind-to", "none", "--allow-run-as-root"]
    return [str(BIN / "mpirun"), "-n", "2", *hosts, *forwarded, sys.executable, "-m", module, "train"]


Launcher = Callable[[Path, str], list[str]]
ON_EACH = (torchrun,)
"""Those that are started on each host."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The figures of a run of two ranks on one host."""
    with forked(SHORT, tmp_path_factory.mktemp("undisturbed") / "run", port=free_port()) as job:
        assert job.wait(150.0) == [0, 0], job.said()
        return figures(job.lines())


def run(launcher: Launcher, folder: Path, module: str, before: list[str], **variables: str) -> str:
    """Trains over two hosts, which must end well; what was said."""
    options = [*SHORT, "--tp", "2", "--output-dir", str(folder / "run")]
    with two_hosts(ssh=True) as hosts:
        started = [
            host.start(*before, *launcher(folder, module), *options, said=folder / host.name, **variables)
            for host in (hosts if launcher in ON_EACH else hosts[:1])
        ]
        try:
            statuses = [process.wait(280.0) for process in started]
        finally:
            for process in started:
                process.kill()
                process.wait()
    said = "".join((folder / f"node{number}").read_text() for number in range(1, len(started) + 1))
    assert statuses == [0] * len(started), said
    return said


@pytest.mark.timeout(400)
@pytest.mark.parametrize("launcher", [deepspeed, torchrun, train_mpi])
def test_figures_are_those_of_one_host(tmp_path: Path, undisturbed: list[dict[str, Any]], launcher: Launcher) -> None:
    said = run(launcher, tmp_path, "tlgc_mp", [])
    assert said.count(ON_TWO_HOSTS) == 1, said
    assert figures(metrics(tmp_path / "run")) == undisturbed


@pytest.mark.timeout(400)
@pytest.mark.parametrize("launcher", [torchrun, mpirun])
def test_launch_goes_on_after_a_rank_was_killed(
    tmp_path: Path, undisturbed: list[dict[str, Any]], launcher: Launcher
) -> None:
    fault = {"FAULT": "kill", "FAULT_RANK": "1", "FAULT_STEP": "4", "FAULT_ONCE": str(tmp_path / "once")}
    launch = [sys.executable, "-m", "tlgc_mp", "launch", "--max-restarts", "1", "--"]
    said = run(launcher, tmp_path, "tests.launch.faulty", launch, **fault)
    assert said.count("starting again") == (2 if launcher in ON_EACH else 1), said
    assert (tmp_path / "once").exists()
    assert "tlgc-mp: rank 1: process" in said or launcher is mpirun  # which may kill the other rank before it tells
    assert figures(metrics(tmp_path / "run")) == undisturbed


@pytest.mark.timeout(300)
def test_benchmark_runs_over_hosts(tmp_path: Path) -> None:
    flags = ["--quick", "--widths", "1", "--depth", "10", "--strategies", "gc-2l", "--batch-sizes", "4"]
    command = [sys.executable, "-m", "tlgc_mp", "bench", "scaling", *flags, "--hosts", "node1", "node2"]
    with two_hosts(ssh=True) as hosts:
        process = hosts[0].start(*command, "--output", str(tmp_path / "out"), said=tmp_path / "said")
        try:
            assert process.wait(250.0) == 0, (tmp_path / "said").read_text()
        finally:
            process.kill()
            process.wait()
    (row,) = json.loads((tmp_path / "out" / "scaling.json").read_text())
    assert row["error"] is None and row["network_bytes"] > row["collective_bytes"] / 2 > 0
