"""Starts ``tlgc-mp`` under the real launchers, and sees to it that nothing of a job outlives its test.

The processes of a job are known by its output folder, which no other job has and every rank has on its command line.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
MARK = "TLGC_MP_TEST_JOB"
"""The environment variable by which every process of a job is known: its output folder."""


def command(launcher: str, folder: Path, module: str = "tlgc_mp", port: str | None = None) -> list[str]:
    """What starts two ranks of ``module`` under ``launcher``, up to the options of training, or one process where it is
    ``"plain"``. A script of the project is copied into ``folder``."""
    if launcher.endswith(".sh"):
        return [script(folder, launcher, module), "2"]
    port = port or free_port()
    started = {
        "plain": [sys.executable, "-m", module],
        "deepspeed": [
            *(str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", port),
            *("--log_level", "error", "--module", module),
        ],
        # As scripts/train_mpi.sh starts it.
        "mpirun": [
            *(str(BIN / "mpirun"), "-n", "2", "--oversubscribe", "--bind-to", "none", "--allow-run-as-root"),
            *(sys.executable, "-m", module),
        ],
        "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", port, "-m", module],
    }
    return [*started[launcher], "train"]


def script(folder: Path, name: str, module: str = "tlgc_mp") -> str:
    """The path of a copy of ``scripts/NAME`` in ``folder`` that installs nothing, and runs ``module``."""
    copy = folder / "scripts"
    shutil.copytree(ROOT / "scripts", copy, dirs_exist_ok=True)
    with open(copy / "environment.sh", "a", encoding="utf-8") as file:
        file.write("\nprepare_environment() { :; }\n")
    text = (copy / name).read_text(encoding="utf-8")
    assert "-m tlgc_mp train" in text
    (copy / name).write_text(text.replace("-m tlgc_mp train", f"-m {module} train"), encoding="utf-8")
    return str(copy / name)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class Job:
    """A running launch of ``tlgc-mp train``; see :func:`started`."""

    def __init__(
        self,
        launcher: str,
        options: list[str],
        output_dir: Path,
        stdout: TextIO,
        stderr: TextIO,
        before: list[str],
        module: str,
        port: str | None,
        variables: dict[str, str],
    ) -> None:
        self.output_dir = output_dir
        self._stdout, self._stderr = stdout, stderr
        launched = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "OMPI_", "PMI")
        environment = {key: value for key, value in os.environ.items() if not key.startswith(launched)}
        environment.update(PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}", OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
        environment.update({MARK: str(output_dir), "PYTHONPATH": str(ROOT), **variables})
        self.process = subprocess.Popen(
            [*before, *command(launcher, output_dir.parent, module, port), *options, "--output-dir", str(output_dir)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._stdout,
            stderr=self._stderr,
            start_new_session=True,
            # Tests that run in the background of a shell are to ignore Ctrl-C, and what they start would, too.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def wait(self, seconds: float) -> int:
        """The launcher's exit status."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the job still runs after {seconds} s; it said\n{self.said()}") from None

    @property
    def stdout(self) -> str:
        self._stdout.seek(0)
        return self._stdout.read()

    @property
    def stderr(self) -> str:
        self._stderr.seek(0)
        return self._stderr.read()

    def said(self) -> str:
        return f"{self.stdout}\n{self.stderr}"

    def lines(self) -> list[dict[str, Any]]:
        """The lines of its metrics file that are of epochs."""
        try:
            text = (self.output_dir / "metrics.jsonl").read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [line for line in lines if "loss" not in line]

    def wait_for_epoch(self, seconds: float = 100.0) -> None:
        """Returns when the first epoch's figures are there and the second epoch is under way."""
        deadline = time.monotonic() + seconds
        while not self.lines():
            assert self.process.poll() is None, f"the job ended before it had trained an epoch; it said\n{self.said()}"
            assert time.monotonic() < deadline, f"no epoch within {seconds} s; the job said\n{self.said()}"
            time.sleep(0.02)
        time.sleep(0.2)

    def ctrl_c(self) -> None:
        """What Ctrl-C sends: SIGINT to the whole foreground group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def processes(self) -> dict[int, list[str]]:
        """Everything that runs with this job's output folder on its command line: pid -> the command line."""
        found = {}
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    words = Path(entry.path, "cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
                    if str(self.output_dir) in words:
                        found[int(entry.name)] = words
        return found

    def ranks(self) -> list[int]:
        """The pids of its ranks: the processes that no other process of the job comes from."""
        pids = self.processes()
        parents = {_parent(pid) for pid in pids}
        return sorted(pid for pid in pids if pid not in parents)

    def left(self, seconds: float = 5.0) -> dict[int, list[str]]:
        """What of it still runs ``seconds`` after the launcher has ended."""
        deadline = time.monotonic() + seconds
        while (found := marked(self.output_dir)) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for pid in marked(self.output_dir):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def started(
    launcher: str,
    options: list[str],
    output_dir: Path,
    *,
    before: Sequence[str] = (),
    module: str = "tlgc_mp",
    port: str | None = None,
    **variables: str,
) -> Iterator[Job]:
    """A job in a session of its own, all of which is killed on leaving.

    ``before`` are words in front of its command, ``module`` is what its ranks run, and ``variables`` go into their
    environment.
    """
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as stdout,
        tempfile.TemporaryFile("w+", encoding="utf-8") as stderr,
    ):
        job = Job(launcher, options, output_dir, stdout, stderr, list(before), module, port, variables)
        try:
            yield job
        finally:
            job.end()


def marked(output_dir: Path) -> dict[int, list[str]]:
    """Every process that has inherited the mark of the job of ``output_dir``, data workers too: pid -> its command."""
    found, mark = {}, f"{MARK}={output_dir}".encode()
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if mark in Path(entry.path, "environ").read_bytes().split(b"\0"):
                    command_line = Path(entry.path, "cmdline").read_text(encoding="utf-8", errors="replace")
                    found[int(entry.name)] = command_line.split("\0")
    return found


def _parent(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[1])
