"""A Slurm of one node on this machine, with state and sockets of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.jobs import BIN, ROOT, free_port

DAEMONS = ("munged", "slurmctld", "slurmd")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
KillWait=10
InactiveLimit=0
SchedulerParameters=batch_sched_delay=1,sched_interval=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=10000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """Its commands, and the environment in which they find it."""

    def __init__(self, folder: Path) -> None:
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "RANK", "WORLD_SIZE"))},
            **{"SLURM_CONF": str(folder / "slurm.conf"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            **{"DS_ACCELERATOR": "cpu", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
        }

    def run(
        self, *command: str, cwd: Path = ROOT, seconds: float = 100.0, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=cwd, env={**self.environment, **variables}, capture_output=True, text=True, timeout=seconds
        )

    def told(self, job: str) -> dict[str, str]:
        """What Slurm says of a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for_state(self, job: str, *states: str, seconds: float = 200.0) -> dict[str, str]:
        deadline = time.monotonic() + seconds
        while (told := self.told(job)).get("JobState") not in states:
            assert time.monotonic() < deadline, told
            time.sleep(0.2)
        return told


@contextlib.contextmanager
def running_slurm() -> Iterator[Slurm]:
    """Skips the test where Slurm is not installed, or this user may not start it."""
    if os.getuid() != 0 or not all(shutil.which(name, path=_PATH) for name in DAEMONS):
        pytest.skip(f"needs root and {', '.join(DAEMONS)} (apt-get install slurm-wlm munge)")
    # Short, for the sockets, and open, for munge.
    with tempfile.TemporaryDirectory(prefix="slurm-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "state").mkdir()
        (folder / "key").write_bytes(os.urandom(128))
        (folder / "key").chmod(0o600)
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        host, ports = socket.gethostname().partition(".")[0], (free_port(), free_port())
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(host=host, controller=ports[0], node=ports[1], folder=folder)
        )
        slurm = Slurm(folder)
        files = [f"--{what}-file={folder / what}" for what in ("key", "log", "pid", "seed")]
        for command in (
            ["munged", "--foreground", "--force", f"--socket={folder / 'munge'}", *files],
            ["slurmctld", "-D", "-f", str(folder / "slurm.conf")],
            ["slurmd", "-D", "-f", str(folder / "slurm.conf"), "-N", host],
        ):
            stack.enter_context(_daemon(command, folder, slurm.environment))
            time.sleep(0.5)
        deadline = time.monotonic() + 30.0
        while "idle" not in slurm.run("sinfo", "--noheader", "--format=%T").stdout:
            assert time.monotonic() < deadline, "".join(path.read_text() for path in folder.glob("*.said"))
            time.sleep(0.2)
        yield slurm
        slurm.run("scancel", "--user=root")


_PATH = f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin"


@contextlib.contextmanager
def _daemon(command: list[str], folder: Path, environment: dict[str, str]) -> Iterator[None]:
    with open(folder / f"{command[0]}.said", "wb") as said:
        process = subprocess.Popen(
            [shutil.which(command[0], path=_PATH) or "", *command[1:]], env=environment, stdout=said, stderr=said
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
