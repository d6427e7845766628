"""Whatever becomes of a rank, its measurement ends, says why, and leaves no process behind."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tlgc_mp.bench.ranks import launch
from tlgc_mp.bench.settings import Case

REQUEST = Case("zero3", depth=10, width=1, groups=1, ranks=1, batch_size=2).steps(
    dtype="fp32", momentum=True, update_in_backward=False, micro_batches=1, steps=1
)
KIND, VALUES = "tlgc_mp.bench.settings:Steps", json.dumps(dataclasses.asdict(REQUEST))


class Ranks:
    """Puts a shell script in the place of every rank; ``$RANK`` says which, the last argument where results go."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = folder / "rank.sh"
        self.pids = folder / "pids"
        self.monkeypatch = monkeypatch

    def run(self, script: str) -> None:
        self.path.write_text(f"#!/bin/sh\necho $$ >>{self.pids}\n{script}\n")
        self.path.chmod(0o755)
        self.monkeypatch.setattr(launch.sys, "executable", str(self.path))

    def assert_all_gone(self, count: int) -> None:
        pids = [int(line) for line in self.pids.read_text().split()]
        assert len(pids) == count
        for pid in pids:
            _wait_for(lambda pid=pid: not os.path.exists(f"/proc/{pid}"), f"process {pid} to end")


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ranks:
    return Ranks(tmp_path, monkeypatch)


def test_a_rank_that_ends_takes_the_others_along_and_is_told(ranks: Ranks) -> None:
    ranks.run('[ "$RANK" = 1 ] || exec sleep 100\nsleep 0.3; echo "cannot do it"; exit 3')
    outcome = launch.measure(REQUEST, 2, time_limit=50.0)
    assert outcome.error == "rank 1: ended with status 3: cannot do it" and not outcome.out_of_memory
    ranks.assert_all_gone(2)


def test_a_rank_that_the_kernel_kills_has_run_out_of_memory(ranks: Ranks) -> None:
    ranks.run('[ "$RANK" = 1 ] || exec sleep 100\nsleep 0.3; kill -9 $$')
    outcome = launch.measure(REQUEST, 2, time_limit=50.0)
    assert outcome.error is not None and outcome.error.startswith("rank 1: killed by SIGKILL, for want of memory")
    assert outcome.out_of_memory
    ranks.assert_all_gone(2)


def test_a_rank_that_hangs_is_ended(ranks: Ranks) -> None:
    ranks.run('[ "$RANK" = 1 ] || echo "{}" >"$5"\nexec sleep 100')
    outcome = launch.measure(REQUEST, 2, time_limit=1.0)
    assert outcome.error == "rank 1: no result within 1 s"
    ranks.assert_all_gone(2)


def test_an_interrupt_ends_all_ranks(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        while not ranks.pids.exists() or ranks.pids.read_text().count("\n") < 2:
            pass
        raise KeyboardInterrupt

    ranks.run("exec sleep 100")
    monkeypatch.setattr(launch.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        launch.measure(REQUEST, 2, time_limit=50.0)
    ranks.assert_all_gone(2)


def test_an_error_on_a_real_rank_is_told() -> None:
    outcome = launch.measure(dataclasses.replace(REQUEST, depth=11), 2, time_limit=100.0)
    assert outcome.error is not None and not outcome.out_of_memory
    assert re.match(r"rank [01]: UsageError: model must be of a depth 6 u \+ 4, got 'wrn-11-1'", outcome.error)


def test_ranks_on_hosts_are_started_through_ssh(ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ssh = tmp_path / "ssh"  # as ssh does it: one shell that reads all words, and another folder and environment
    ssh.write_text('#!/bin/sh\n[ "$1 $2" = "-o BatchMode=yes" ] || exit 9\ncd /\nexec env -i HOST="$3" sh -c "$4"\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("NCCL_NOTE", "a b'c")
    values = '"$HOST $RANK $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR $NCCL_NOTE $PWD"'
    ranks.run(f"""[ "$3 $4" = '{KIND} {VALUES}' ] || exit 8\nprintf '["%s"]' {values} >"$5"\nexec cat""")
    outcome = launch.measure(REQUEST, 4, 50.0, launch.places(["one", "two"]), str(tmp_path))
    assert outcome.error is None
    here = f"one a b'c {os.getcwd()}"
    assert outcome.ranks == [[f"one 0 0 2 {here}"], [f"one 1 1 2 {here}"], [f"two 2 0 2 {here}"], [f"two 3 1 2 {here}"]]
    ranks.assert_all_gone(4)


def test_a_rank_ends_with_its_standard_input(tmp_path: Path) -> None:
    values = json.dumps({**json.loads(VALUES), "depth": 11})
    command = [sys.executable, "-m", "tlgc_mp.bench.ranks.worker", KIND, values, str(tmp_path / "result")]
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    rank = subprocess.Popen(command, env={**os.environ, **place}, stdin=subprocess.PIPE)
    try:
        _wait_for((tmp_path / "result").exists, "a result", 100.0)
        time.sleep(0.5)
        assert rank.poll() is None
        assert rank.stdin is not None
        rank.stdin.close()
        assert rank.wait(10.0) == 1
    finally:
        rank.kill()
        rank.wait()


def test_ranks_do_not_outlive_a_benchmark_that_is_killed(tmp_path: Path) -> None:
    request = dataclasses.replace(REQUEST, steps=10**9)
    code = "from tlgc_mp.bench.ranks.launch import measure; from tlgc_mp.bench.settings import Steps; "
    code += f"measure({request!r}, 1, 300.0)"
    driver = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)})
    try:
        child = _wait_for(lambda: _children(driver.pid), "the rank to start")[0]
        _wait_for(lambda: _maps(child, "libtorch"), "the rank to get going")
    finally:
        driver.kill()
        driver.wait()
    _wait_for(lambda: not os.path.exists(f"/proc/{child}"), "the rank to end")


def _wait_for(condition: Any, what: str, seconds: float = 30.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.05)
    return value


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _maps(pid: int, library: str) -> bool:
    return library in Path(f"/proc/{pid}/maps").read_text()
