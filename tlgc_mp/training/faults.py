"""What ended a run, in one line: the cause of an exception that a rank raised."""

from __future__ import annotations

import errno
import json
import os
import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from tlgc_mp.errors import UsageError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OUT_OF_MEMORY = re.compile(r"can't allocate memory|cannot allocate memory|out of memory|unable to mmap", re.IGNORECASE)
_CONNECTION = re.compile(
    r"gloo|nccl|mpi_err|connection (closed|reset|refused)|broken pipe|timed out waiting|recv got 0 bytes",
    re.IGNORECASE,
)
_PORT_TAKEN = re.compile(r"port: (\d+).*EADDRINUSE", re.DOTALL)
_LONGEST = 300

VERDICT_FILE = "TLGC_MP_VERDICT_FILE"
"""The environment variable with the path where a rank leaves, for ``tlgc-mp launch``, how its job ended."""


class NonFiniteError(ArithmeticError):
    """The loss, or a weight, is NaN or infinite."""


@dataclass(frozen=True)
class Cause:
    """Why a rank cannot go on.

    Attributes:
        text: one line.
        status: the exit status it calls for.
        traced: whether its traceback tells more than the line.
        shared: whether every rank is likely to find the same, so that rank 0 has the first word.
        echo: whether it may only be the end of another rank, as seen from here.
    """

    text: str
    status: int = 1
    traced: bool = True
    shared: bool = False
    echo: bool = False


def cause_of(error: BaseException) -> Cause:
    """Reads an exception."""
    said = " ".join(str(error).split())
    if isinstance(error, UsageError):
        return Cause(said, status=2, traced=False, shared=True)
    if isinstance(error, NonFiniteError):
        return Cause(said, traced=False, shared=True)
    said = said[:_LONGEST]
    if isinstance(error, OSError) and error.errno in _FULL:
        place = f": {error.filename}" if error.filename else ""
        return Cause(f"a file cannot be written: {os.strerror(error.errno)}{place}", traced=False)
    if (
        isinstance(error, (MemoryError, torch.OutOfMemoryError))
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(said))
    ):
        return Cause(f"out of memory: {said}" if said else "out of memory")
    if taken := _PORT_TAKEN.search(str(error)):
        return Cause(
            f"port {taken[1]}, where the ranks are to meet, is taken by another process; choose another "
            "(MASTER_PORT, or the launcher's --master_port)",
            traced=False,
        )
    text = f"{type(error).__name__}: {said}" if said else type(error).__name__
    connection = isinstance(error, (dist.DistError, ConnectionError)) or (
        isinstance(error, RuntimeError) and _CONNECTION.search(said) is not None
    )
    return Cause(text, echo=connection)


def leave_verdict(status: int, text: str) -> None:
    """Leaves how the job ended for ``tlgc-mp launch``, where it started this job; the first to do so is heard.

    A launcher may end with a status of its own: torchrun ends with 1 whatever its ranks ended with.
    """
    path = os.environ.get(VERDICT_FILE)
    if path is None:
        return
    try:
        with open(path, "x", encoding="utf-8") as file:
            json.dump({"status": status, "text": text}, file)
    except OSError:
        pass


def read_verdict(path: str) -> dict[str, Any]:
    """What a rank left at ``path``; empty where none did."""
    try:
        with open(path, encoding="utf-8") as file:
            verdict = json.load(file)
    except (OSError, ValueError):
        return {}
    return verdict if isinstance(verdict, dict) else {}
