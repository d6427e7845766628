"""``tlgc-mp launch``: what is started again, how often, from where, and that nothing is left of an attempt."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.launch.forked import SHORT, figures, forked
from tests.launch.jobs import BIN, free_port, marked, started
from tlgc_mp.cli.main import main

# A launch of training that trains nothing: it notes its arguments, and ends with the next of the statuses it is given.
SCRIPT = """
import json, os, signal, subprocess, sys, time
from tlgc_mp.checkpoint.folder import description_text
folder = os.path.dirname(os.path.abspath(__file__))
with open(os.path.join(folder, "attempts"), "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
attempt = sum(1 for _ in open(os.path.join(folder, "attempts"))) - 1
with open(os.path.join(folder, "plan.json")) as file:
    action = json.load(file)[attempt]
if action == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    open(os.path.join(folder, "waiting"), "w").close()
    time.sleep(60)
verdict_file = os.environ["TLGC_MP_VERDICT_FILE"]
if action == "hang":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with open(verdict_file, "w") as file:
        json.dump({"status": 1, "text": "rank 1: process 7 on node2 has not answered for 60 s"}, file)
    time.sleep(60)
if action == "met":
    open(verdict_file + ".met", "w").close()
    action = 1
if action == "leave a process":
    subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
                      "time.sleep(60)"], start_new_session=True)
    action = 1
if isinstance(action, list):
    with open(verdict_file, "w") as file:
        json.dump({"status": action[1], "text": "rank 1: out of memory"}, file)
    action = action[0]
if isinstance(action, str):
    checkpoint = os.path.join(folder, "run", "checkpoints", action)
    os.makedirs(checkpoint)
    with open(os.path.join(checkpoint, "checkpoint.json"), "w") as file:
        empty = {"bytes": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
        files = {"shard-00-00.safetensors": empty}
        file.write(description_text({"format": 1, "files": files, "client_state": {}, "saved": 1.0}))
    open(os.path.join(checkpoint, "shard-00-00.safetensors"), "w").close()
    open(os.path.join(checkpoint, "..", "latest"), "w").write(action)
    action = 1
if action < 0:
    os.kill(os.getpid(), -action)
sys.exit(action)
"""


class Launch:
    def __init__(self, folder: Path, plan: list[object], *options: str) -> None:
        self.folder = folder
        (folder / "script.py").write_text(SCRIPT)
        (folder / "plan.json").write_text(json.dumps(plan))
        command = [sys.executable, str(folder / "script.py"), "tlgc_mp", "train", "--output-dir", str(folder / "run")]
        main = (
            "import sys; from tlgc_mp.cli.main import main; from tlgc_mp.resilience import restarts; "
            "restarts.LAUNCHER_SECONDS, restarts._TERMINATE_SECONDS, restarts._MEETING_PAUSE_SECONDS = 2.0, 1.0, 0.1; "
            "sys.exit(main())"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", main, "launch", *options, "--", *command],
            env={**os.environ, "TLGC_MP_TEST_JOB": str(folder)},
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self) -> tuple[int, list[str], list[list[str]]]:
        """(exit status, what it said, the options of each attempt after --output-dir DIR)."""
        _, stderr = self.process.communicate(timeout=60)
        attempts = [json.loads(line)[4:] for line in (self.folder / "attempts").read_text().splitlines()]
        assert not marked(self.folder)
        return self.process.returncode, stderr.splitlines(), attempts


@pytest.mark.timeout(90)
@pytest.mark.parametrize(
    ("plan", "status", "attempts"),
    [
        ([0], 0, 1),
        ([1, -signal.SIGKILL, 0], 0, 3),
        ([1, 1, 3], 3, 3),
        ([2], 2, 1),
        ([130], 130, 1),
        ([143], 143, 1),
        ([-signal.SIGTERM], 143, 1),
        ([[1, 2]], 1, 1),  # torchrun hides that its ranks ended with 2
        ([[1, 143]], 1, 1),
    ],
)
def test_what_is_started_again(tmp_path: Path, plan: list[object], status: int, attempts: int) -> None:
    ended, said, tried = Launch(tmp_path, plan, "--max-restarts", "2").end()
    assert (ended, len(tried)) == (status, attempts)
    assert sum("starting again" in line for line in said) == attempts - 1
    assert all(line.startswith("tlgc-mp: launch: ") for line in said)


@pytest.mark.timeout(60)
def test_goes_on_from_the_newest_checkpoint_and_says_so(tmp_path: Path) -> None:
    _, said, tried = Launch(tmp_path, [1, "epoch-1", [9, 1], 0], "--max-restarts", "3").end()
    place = tmp_path / "run" / "checkpoints" / "epoch-1"
    assert tried == [[], [], ["--resume", str(place)], ["--resume", str(place)]]
    assert said == [
        "tlgc-mp: launch: ended with status 1; starting again from the beginning, as there is no whole checkpoint yet "
        "(restart 1 of 3)",
        f"tlgc-mp: launch: ended with status 1; starting again from {place} (restart 2 of 3)",
        f"tlgc-mp: launch: ended with status 9, rank 1: out of memory; starting again from {place} (restart 3 of 3)",
    ]


@pytest.mark.timeout(60)
def test_nothing_is_left_of_an_attempt(tmp_path: Path) -> None:
    """Not even a process in a session of its own that does not hear SIGTERM."""
    began = time.monotonic()
    assert Launch(tmp_path, ["leave a process", 0], "--max-restarts", "1").end()[0] == 0
    assert time.monotonic() - began < 30.0


@pytest.mark.timeout(60)
def test_a_process_that_launches_keeps_its_children_and_adopts_no_more(tmp_path: Path) -> None:
    gone = "import os; os.kill(os.getpid(), 9)"
    orphan = "from subprocess import DEVNULL, Popen; print(Popen(['sleep', '99'], stdout=DEVNULL).pid)"
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    try:
        assert (
            main(["launch", "--max-restarts", "0", "--", sys.executable, "-c", gone, "train"]) == 128 + signal.SIGKILL
        )
        assert child.poll() is None
        # What loses its parent from here on is init's to bury.
        done = subprocess.run([sys.executable, "-c", orphan], stdout=subprocess.PIPE, text=True)
        assert psutil.Process(int(done.stdout)).ppid() != os.getpid()
        os.kill(int(done.stdout), signal.SIGKILL)
    finally:
        child.kill()
        child.wait()


@pytest.mark.timeout(60)
def test_launcher_that_stays_when_its_run_has_ended_is_ended(tmp_path: Path) -> None:
    """As mpirun and torchrun do while the network is gone; this one does not hear SIGTERM."""
    began = time.monotonic()
    ended, said, tried = Launch(tmp_path, ["hang", 0], "--max-restarts", "1").end()
    assert (ended, len(tried)) == (0, 2) and time.monotonic() - began < 30.0
    assert said == [
        "tlgc-mp: launch: the run has ended, and its launcher has not for 2 s; it is ended",
        "tlgc-mp: launch: ended with status 137, rank 1: process 7 on node2 has not answered for 60 s; starting again "
        "from the beginning, as there is no whole checkpoint yet (restart 1 of 1)",
    ]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("plan", "status", "attempts"),
    [
        (["met", 1, 1, 0], 0, 4),  # ranks of other hosts had still to end
        (["met", 1, "met", 0], 1, 3),  # a second fault
        ([1, 1, 0], 1, 2),  # it never ran
    ],
)
def test_one_fault_is_one_restart(tmp_path: Path, plan: list[object], status: int, attempts: int) -> None:
    ended, said, tried = Launch(tmp_path, plan, "--max-restarts", "1").end()
    assert (ended, len(tried)) == (status, attempts), said


@pytest.mark.timeout(60)
def test_signal_is_passed_on_and_ends_it(tmp_path: Path) -> None:
    launch = Launch(tmp_path, ["wait", 0], "--max-restarts", "3")
    while not (tmp_path / "waiting").exists():
        assert launch.process.poll() is None
        time.sleep(0.02)
    launch.process.send_signal(signal.SIGTERM)
    assert launch.end() == (7, [], [[]])


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--", "deepspeed", "train.py"], "got deepspeed train.py; give it after --"),
        ([], "got nothing; give it after --"),
        (
            ["--", "no-such-launcher", "tlgc_mp", "train"],
            "COMMAND must be one that can be started, got 'no-such-launcher': No such file",
        ),
        (["--", "torchrun", "-m", "tlgc_mp", "train", "--epocs", "3"], "--epocs"),
        (
            ["--max-restarts", "-1", "--", "torchrun", "-m", "tlgc_mp", "train"],
            "--max-restarts must be 0 or more, got -1",
        ),
    ],
)
def test_mistakes(arguments: list[str], part: str) -> None:
    finished = subprocess.run(
        [str(BIN / "tlgc-mp"), "launch", *arguments], stderr=subprocess.PIPE, text=True, timeout=50
    )
    assert finished.returncode == 2
    assert finished.stderr.startswith("tlgc-mp: error: ") and len(finished.stderr.splitlines()) == 1
    assert part in finished.stderr


@pytest.mark.timeout(60)
def test_loads_no_torch() -> None:
    code = (
        "import sys; import tlgc_mp.resilience.restarts; "
        "print(sorted(sys.modules.keys() & {'torch', 'deepspeed', 'numpy', 'torchvision'}))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.timeout(290)
def test_killed_rank_is_made_good_under_mpirun(tmp_path: Path) -> None:
    with forked(SHORT, tmp_path / "undisturbed", port=free_port()) as undisturbed:
        assert undisturbed.wait(100.0) == [0, 0], undisturbed.said()

    launch = [sys.executable, "-m", "tlgc_mp", "launch", "--max-restarts", "1", "--"]
    fault = {"FAULT": "kill", "FAULT_RANK": "1", "FAULT_STEP": "4", "FAULT_ONCE": str(tmp_path / "once")}
    with started("mpirun", SHORT, tmp_path / "killed", before=launch, module="tests.launch.faulty", **fault) as job:
        assert job.wait(250.0) == 0, job.said()
        assert not job.left()
        said = [line for line in job.stderr.splitlines() if line.startswith("tlgc-mp")]
        assert len(said) == 2 and "rank 1: process" in said[0], said
        assert said[1].endswith(f"from {tmp_path / 'killed' / 'checkpoints' / 'epoch-1'} (restart 1 of 1)")
        assert figures(job.lines()) == figures(undisturbed.lines())


@pytest.mark.timeout(290)
def test_killed_before_its_first_checkpoint_stood_begins_again(tmp_path: Path) -> None:
    """The first epoch's figures are there, its checkpoint is still being written."""
    with forked(SHORT, tmp_path / "undisturbed", port=free_port()) as undisturbed:
        assert undisturbed.wait(100.0) == [0, 0], undisturbed.said()

    launch = [sys.executable, "-m", "tlgc_mp", "launch", "--max-restarts", "1", "--"]
    fault = {"FAULT": "kill", "FAULT_RANK": "1", "FAULT_STEP": "4", "FAULT_ONCE": str(tmp_path / "once")}
    module = "tests.launch.faulty"
    with started("mpirun", SHORT, tmp_path / "killed", before=launch, module=module, NEVER_SAVES="1", **fault) as job:
        assert job.wait(250.0) == 0, job.said()
        assert "from the beginning, as there is no whole checkpoint yet (restart 1 of 1)" in job.stderr
        assert figures(job.lines()) == figures(undisturbed.lines())
