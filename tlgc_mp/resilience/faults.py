"""What ended a run, in one line: the cause of an exception that a rank raised."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass

import torch
import torch.distributed as dist

from tlgc_mp.checkpoint import SaveError
from tlgc_mp.errors import UsageError
from tlgc_mp.training.finite import NonFiniteError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OUT_OF_MEMORY = re.compile(r"can't allocate memory|cannot allocate memory|out of memory|unable to mmap", re.IGNORECASE)
_CONNECTION = re.compile(
    r"gloo|nccl|mpi_err|connection (closed|reset|refused)|broken pipe|timed out waiting|recv got 0 bytes",
    re.IGNORECASE,
)
_PORT_TAKEN = re.compile(r"port: (\d+).*EADDRINUSE", re.DOTALL)
_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")  # by which torch tells that one is gone
_LONGEST = 300


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
    if isinstance(error, (NonFiniteError, SaveError)):
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
    if isinstance(error, RuntimeError) and (worker := _WORKER.match(said)):
        return Cause(f"data worker process {worker[1]} has died", traced=False)
    text = f"{type(error).__name__}: {said}" if said else type(error).__name__
    connection = isinstance(error, (dist.DistError, ConnectionError)) or (
        isinstance(error, RuntimeError) and _CONNECTION.search(said) is not None
    )
    return Cause(text, echo=connection)
