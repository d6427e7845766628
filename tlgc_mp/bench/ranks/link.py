"""Two hosts for a measurement on one machine: network namespaces joined by a cable whose bandwidth can be chosen.

Nothing of them outlives this process: a namespace goes with its last process, which ends with its standard input.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator

from tlgc_mp.bench.ranks.launch import Place
from tlgc_mp.errors import UsageError, must_be

NETWORK = "10.79.0"
INTERFACE = "eth0"
_REAL_HOSTS = "use bench scaling --hosts with real hosts"
TOOLS = ("ip", "tc", "unshare", "nsenter")
UNLIMITED = "unlimited"

_UNITS = {"kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_RATE = re.compile(r"(\d{1,6})(kbit|mbit|gbit)")
_BURST_SECONDS = 0.001
_LEAST_BURST = 1 << 16  # bytes: the most that the kernel hands to an interface at once
_QUEUE = "200ms"
_SECONDS = 20.0


def bits_per_second(rate: str) -> float | None:
    """``"20mbit"`` -> 2e7, ``"unlimited"`` -> ``None``.

    Raises:
        UsageError: it is no bandwidth.
    """
    if rate == UNLIMITED:
        return None
    found = _RATE.fullmatch(rate)
    if found is None or not int(found[1]):
        raise must_be("--rates", f"{UNLIMITED} or a bandwidth", rate, "use e.g. 1gbit, 100mbit or 500kbit")
    return float(int(found[1]) * _UNITS[found[2]])


class Cable:
    """What joins the two hosts.

    Attributes:
        places: the hosts, for :func:`tlgc_mp.bench.ranks.launch.measure`.
    """

    def __init__(self, holders: list[subprocess.Popen[bytes]]) -> None:
        self.places = tuple(
            Place(f"{NETWORK}.{number}", ("nsenter", "--target", str(holder.pid), "--net", "--"))
            for number, holder in enumerate(holders, 1)
        )

    def limit(self, rate: str) -> None:
        """Has each side send at most at ``rate``, as :func:`bits_per_second` reads it."""
        bits = bits_per_second(rate)
        for place in self.places:
            if bits is None:
                _run(*place.enter, "tc", "qdisc", "replace", "dev", INTERFACE, "root", "pfifo")
            else:
                burst = str(max(_LEAST_BURST, int(bits * _BURST_SECONDS / 8)))
                shaped = ("tbf", "rate", rate, "burst", burst, "latency", _QUEUE)
                _run(*place.enter, "tc", "qdisc", "replace", "dev", INTERFACE, "root", *shaped)


@contextlib.contextmanager
def cable() -> Iterator[Cable]:
    """Two hosts, joined, until it is left.

    Raises:
        UsageError: this user, or this machine, cannot make them.
    """
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if os.name != "posix" or os.geteuid() != 0 or missing:
        need = f"have {', '.join(missing)}" if missing else "let you be root"
        raise UsageError(f"this machine must {need} to link two hosts on it, got none; {_REAL_HOSTS}")
    holders: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(2):
            command = ["unshare", "--net", "cat"]
            holders.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL))
        for holder in holders:
            _wait_for_namespace(holder)
        first, second = (str(holder.pid) for holder in holders)
        end = ("name", INTERFACE, "netns")
        _run("ip", "link", "add", *end, first, "type", "veth", "peer", *end, second)
        joined = Cable(holders)
        for place in joined.places:
            _run(*place.enter, "ip", "address", "add", f"{place.address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                _run(*place.enter, "ip", "link", "set", interface, "up")
        yield joined
    finally:
        for holder in holders:
            holder.communicate(timeout=_SECONDS)


def _wait_for_namespace(holder: subprocess.Popen[bytes]) -> None:
    own = os.readlink("/proc/self/ns/net")
    deadline = time.monotonic() + _SECONDS
    while os.readlink(f"/proc/{holder.pid}/ns/net") == own:
        if holder.poll() is not None or time.monotonic() > deadline:
            raise UsageError(f"this machine must allow network namespaces, got none; {_REAL_HOSTS}")
        time.sleep(0.01)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    if done.returncode:
        raise must_be(f"`{' '.join(command)}`", "allowed on this machine", done.stderr.strip(), _REAL_HOSTS)
