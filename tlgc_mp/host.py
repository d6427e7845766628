"""The machine that this process runs on: its cores, its memory and its files, and where a figure comes from.

Loads no torch. What is said here of the whole process (:func:`use_huge_pages`, :func:`keep_freed_memory`) only happens
where it is called: the command line does, the library does not.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, TypedDict

from tlgc_mp import __version__
from tlgc_mp.errors import must_be

if TYPE_CHECKING:
    from typing_extensions import NotRequired


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
"""Parameters of glibc's ``mallopt``."""
_KEEP_FREED = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 64 << 20}
_RETURN_FREED = {
    _M_MMAP_MAX: 65536,
    _M_TRIM_THRESHOLD: 128 << 10,
    _M_TOP_PAD: 128 << 10,
    _M_MMAP_THRESHOLD: 128 << 10,
}
"""As glibc begins. By itself it lets the threshold grow to the largest block that was freed, and keeps smaller ones."""


class Machine(TypedDict):
    """A machine: ``cores`` are those that may be used; ``accelerator``, by name, where one was measured."""

    cpu: str
    cores: int
    memory_bytes: int
    system: str
    accelerator: NotRequired[str | None]


class Provenance(TypedDict):
    """Where figures come from; ``commit`` is ``None`` where the package lies in no working copy."""

    machine: Machine
    versions: dict[str, str]
    commit: str | None
    uncommitted_changes: bool
    date: str
    command: list[str]


def as_path(argument: str, value: object) -> str:
    """A path that a caller has given as ``argument``.

    Raises:
        UsageError: it is no path.
    """
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise must_be(argument, "a path", value)
    return text


def replace_file(path: str, text: str) -> None:
    """Writes ``text`` to ``path`` so that a reader finds the old content or the new, never a part, and puts it on the
    disk for good."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise OSError(error.errno, error.strerror, path) from error  # a write that fails does not say where
    sync_folder(os.path.dirname(path) or ".")


def sync_folder(folder: str) -> None:
    """Puts the names in a folder on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_port() -> int:
    """A port that nobody listens on, on this machine, now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def host_on_network() -> str:
    """What tells this host from others on the network; containers with networks of their own count as hosts."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/net"))
    return "/".join(parts)


def use_huge_pages() -> None:
    """Asks torch for huge pages under large CPU tensors; to be called before torch allocates its first."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory() -> None:
    """Keeps freed CPU memory with the process, where the C library is glibc, instead of handing it back each time.

    Large blocks would be mapped afresh for every filter gradient and scratch buffer, and each of their pages cleared
    by the kernel on its first touch: a third of the time of a wide layer's step. Not for ZeRO 3, which gathers and
    frees parameters of all sizes between what lives on: the holes that this leaves come to more than the parameters.
    """
    _set_allocator(_KEEP_FREED)


def return_freed_memory() -> None:
    """Undoes :func:`keep_freed_memory`, and has blocks of 128 KiB and more handed back as they are freed, for good: the
    process holds what its tensors hold, and no holes. Each is cleared by the kernel anew."""
    _set_allocator(_RETURN_FREED)


def _set_allocator(values: dict[int, int]) -> None:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for parameter, value in values.items():
        mallopt(parameter, value)


def describe_machine() -> Machine:
    """The machine that this runs on."""
    import psutil

    cpu, memory = platform.processor() or platform.machine(), psutil.virtual_memory().total
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            cpu = next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, ValueError, StopIteration):
        pass
    return {"cpu": cpu, "cores": usable_cores(), "memory_bytes": memory, "system": platform.platform()}


def describe_run() -> Provenance:
    """Where the figures of this process's run come from."""
    versions = {"python": platform.python_version(), "tlgc-mp": __version__}
    for package in ("torch", "deepspeed", "numpy"):
        versions[package] = importlib.metadata.version(package)
    return {
        "machine": describe_machine(),
        "versions": versions,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": ["tlgc-mp", *sys.argv[1:]],
    }


def _git(*arguments: str) -> str | None:
    """What git says about the working copy that this package lies in; ``None`` where it lies in none."""
    folder = os.path.dirname(os.path.abspath(__file__))
    try:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
