"""Where a figure comes from: machine, versions, git commit, date and command. Loads no torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from typing import Any

from tlgc_mp import __version__
from tlgc_mp.parallel.topology import usable_cores


def describe_machine() -> dict[str, Any]:
    """Of the machine that this runs on: ``cpu``, ``cores`` that may be used, ``memory_bytes``, ``system``."""
    cpu, memory = platform.processor() or platform.machine(), None
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            cpu = next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, StopIteration):
        pass
    return {"cpu": cpu, "cores": usable_cores(), "memory_bytes": memory, "system": platform.platform()}


def describe_run() -> dict[str, Any]:
    """Of this process's run: ``machine``, ``versions``, ``commit``, ``uncommitted_changes``, ``date``, ``command``."""
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
