"""One job over two hosts: names on loopback addresses, a killed rank that was alone on its host, a cut cable."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.forked import SHORT, figures, forked
from tests.launch.hosts import Host, child_of, two_hosts
from tests.launch.jobs import free_port
from tests.training.runs import metrics

LOOPBACK = {"node1": "127.0.1.1", "node2": "127.0.1.1"}
"""What Debian's /etc/hosts says of a host's own name."""


@contextlib.contextmanager
def training(
    hosts: tuple[Host, Host], folder: Path, *options: str, **variables: str
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """A rank on each host, without a launcher."""
    jobs = []
    module = ("-m", "tests.launch.faulty", "train", *SHORT, "--output-dir", str(folder / "run"), *options)
    try:
        for rank, host in enumerate(hosts):
            place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            place.update(MASTER_ADDR="node1", MASTER_PORT="29511")
            jobs.append(host.start("python", *module, said=folder / host.name, **place, **variables))
        yield jobs
    finally:
        for job in jobs:
            job.kill()
            job.wait()


def told(folder: Path) -> list[str]:
    """What the ranks have said, those lines of both."""
    text = (folder / "node1").read_text() + (folder / "node2").read_text()
    return [line for line in text.splitlines() if line.startswith("tlgc-mp")]


@pytest.mark.timeout(400)
def test_hosts_whose_own_names_are_loopback_addresses_train_as_one_does(tmp_path: Path) -> None:
    with forked(SHORT, tmp_path / "one-host", port=free_port()) as job:
        assert job.wait(150.0) == [0, 0], job.said()
        expected = figures(job.lines())
    with two_hosts(LOOPBACK) as hosts, training(hosts, tmp_path, "--tp", "2") as ranks:
        assert [rank.wait(150.0) for rank in ranks] == [0, 0], told(tmp_path)
    assert figures(metrics(tmp_path / "run")) == expected
    said = (tmp_path / "node1").read_text()
    assert "2 tensor-parallel x 1 data-parallel, on 2 hosts; the tensor-parallel ranks of 1 replica(s) lie on " in said


_SILENT = r"tlgc-mp: rank 1: process \d+ on node2 has not answered for"
FAULTS = {
    # 6 s from where the other rank finds its connection broken, or the rank timeout from the last beat it has seen.
    "kill": rf"{_SILENT} (6|1\d) s and its connections are closed: killed, or crashed",
    "cut": rf"{_SILENT} 1\d s",
    "stop": rf"{_SILENT} 1\d s",
}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("fault", ["kill", pytest.param("cut", marks=pytest.mark.slow)])
def test_rank_that_was_alone_on_its_host_is_named(tmp_path: Path, fault: str) -> None:
    there = tmp_path / "there"
    variables = {"LINGERS": "training", "THERE": str(there)}
    with two_hosts() as hosts, training(hosts, tmp_path, "--rank-timeout", "10", **variables) as ranks:
        while not there.exists():
            assert ranks[0].poll() is None, told(tmp_path)
        if fault == "kill":
            os.kill(child_of(ranks[1]), signal.SIGKILL)
        else:
            hosts[1].plug("down")
        assert ranks[0].wait(60.0) == 1, told(tmp_path)
        check_named(tmp_path, fault)


def check_named(folder: Path, fault: str) -> None:
    """That the rank on the other host is the one that is named, and how it went."""
    lines = told(folder)
    first = next(line for line in lines if line.startswith("tlgc-mp: rank 1: process"))
    assert re.match(FAULTS[fault], first), lines
