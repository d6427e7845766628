"""Two hosts on one machine: each a namespace of network, host name, processes and mounts, joined by a bridge, and each
with an ssh server where one is asked for."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.jobs import BIN, ROOT

BRIDGE = f"tlgc{os.getpid()}"  # another run of the tests may have hosts at the same time
NETWORK = "10.78.0"
_TOOLS = ("ip", "unshare", "nsenter")
_SSH_TOOLS = ("ssh", "ssh-keygen", "sshd")
_SYSTEM_PATH = f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin{os.pathsep}/sbin"
_SSH_CONFIG = """
Host *
    IdentityFile {folder}/key
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""
_SSH_SERVER = (
    "mount --bind {folder}/ssh_config /etc/ssh/ssh_config; mount -t tmpfs tmpfs /run; mkdir -p /run/sshd; "
    "{sshd} -h {folder}/key -o AuthorizedKeysFile={folder}/key.pub -o StrictModes=no -o UsePAM=no "
    "-o PermitRootLogin=yes -o MaxStartups=100 -o PidFile=none; "
)


class Host:
    """One of them, ``node1`` or ``node2``."""

    def __init__(self, number: int, pid: int) -> None:
        self.name, self._pid, self._cable = f"node{number}", pid, f"{BRIDGE}{number}"

    def start(self, *command: str, said: Path, **variables: str) -> subprocess.Popen[bytes]:
        """Runs a command there; what it says goes to a file."""
        enter = ["nsenter", "--target", str(self._pid), "--uts", "--pid", "--mount", "--net", f"--wd={ROOT}", "--"]
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("GLOO_", "SLURM_", "MASTER_"))}
        with open(said, "wb") as file:
            return subprocess.Popen(
                [*enter, *command],
                env={
                    **{**kept, "PYTHONPATH": str(ROOT), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
                    **{"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **variables},
                },
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def plug(self, state: str) -> None:
        """Cuts its cable, "down", or mends it, "up"."""
        _run("ip", "link", "set", self._cable, state)


@contextlib.contextmanager
def two_hosts(names: dict[str, str] | None = None, *, ssh: bool = False) -> Iterator[tuple[Host, Host]]:
    """Skips the test where this user may not make them.

    Args:
        names: the address of each host's name on that host itself; its address in the network where not given.
        ssh: whether each reaches the other through ssh, without a password.
    """
    tools = (*_TOOLS, *_SSH_TOOLS) if ssh else _TOOLS
    if os.getuid() != 0 or not all(shutil.which(tool, path=_SYSTEM_PATH) for tool in tools):
        pytest.skip(f"needs root and {', '.join(tools)}")
    made = subprocess.run(["ip", "link", "add", BRIDGE, "type", "bridge"], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no network can be made here: {made.stderr.strip()}")
    with contextlib.ExitStack() as stack:
        stack.callback(_run, "ip", "link", "delete", BRIDGE)
        _run("ip", "link", "set", BRIDGE, "up")
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if ssh:
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key"))
            (folder / "ssh_config").write_text(_SSH_CONFIG.format(folder=folder))
        yield tuple(_host(number, names or {}, folder, stack) for number in (1, 2))  # type: ignore[misc]


def _host(number: int, names: dict[str, str], folder: Path, stack: contextlib.ExitStack) -> Host:
    name, cable = f"node{number}", f"{BRIDGE}{number}"
    hosts = {f"node{each}": f"{NETWORK}.{each}" for each in (1, 2)}
    hosts.update({name: names[name]} if name in names else {})
    lines = [f"{address} {host}\n" for host, address in {"localhost": "127.0.0.1", **hosts}.items()]
    (folder / f"{name}.hosts").write_text("".join(lines))
    ready = folder / f"{name}.ready"
    script = (
        f"hostname {name}; mount --make-rprivate /; mount --bind {folder}/{name}.hosts /etc/hosts; "
        f"mount -t tmpfs tmpfs /dev/shm; ip link set lo up; "
    )
    if (folder / "key").exists():
        script += _SSH_SERVER.format(folder=folder, sshd=shutil.which("sshd", path=_SYSTEM_PATH))
    script += f"touch {ready}; exec sleep infinity"
    unshare = ["unshare", "--uts", "--pid", "--mount", "--net", "--fork", "--mount-proc", "--kill-child"]
    outer = subprocess.Popen([*unshare, "sh", "-ec", script])
    stack.callback(outer.wait)
    stack.callback(outer.kill)
    deadline = time.monotonic() + 20.0
    while not ready.exists():
        assert outer.poll() is None and time.monotonic() < deadline, "a namespace could not be made"
        time.sleep(0.02)
    pid = child_of(outer)
    _run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
    # Connections that nobody answers keep the namespace, and so the cable, when its processes have ended.
    stack.callback(_run, "ip", "link", "delete", cable)
    _run("ip", "link", "set", cable, "master", BRIDGE, "up")
    inside = ["nsenter", "--target", str(pid), "--net", "ip"]
    _run(*inside, "addr", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
    _run(*inside, "link", "set", "eth0", "up")
    return Host(number, pid)


def child_of(process: subprocess.Popen[bytes]) -> int:
    """What ``unshare`` or ``nsenter`` has started."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
