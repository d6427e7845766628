"""A run's output folder is one run's at a time, and the same one for all its ranks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from typing import TextIO

import torch.distributed as dist

from tlgc_mp.errors import UsageError
from tlgc_mp.training.runs import LOCK

LOOK_SECONDS = 20.0
"""How long a rank looks for what rank 0 has written: NFS shows a new file late."""
_LOOK_PAUSE_SECONDS = 0.2
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


@contextlib.contextmanager
def claimed(output_dir: str, resume_from: tuple[str, str] | None) -> Iterator[None]:
    """Makes the folder, and holds it until it is left. Collective.

    Rank 0 locks ``OUTPUT/lock``, which the kernel, or the server of the file system, unlocks when that process ends in
    whatever way; on file systems that have no locks nothing is held. The other ranks look for what it wrote there.

    Raises:
        UsageError: another run holds the folder, or the ranks do not see the same one.
    """
    rank = dist.get_rank()
    file, owner = _locked(output_dir) if rank == 0 else (None, "")
    try:
        said = [owner, resume_from and resume_from[1]]
        dist.broadcast_object_list(said)
        if rank > 0:
            _look(output_dir, rank, said[0] or "")
            if said[1] != (resume_from and resume_from[1]):
                raise UsageError(
                    f"--resume must mean the same checkpoint on every rank, got {resume_from and resume_from[1]!r} on "
                    f"rank {rank} and {said[1]!r} on rank 0; name the checkpoint, and give all ranks one folder"
                )
        yield
    finally:
        if file is not None:
            file.close()


def _locked(output_dir: str) -> tuple[TextIO, str]:
    """The file that is locked while it is open, and what was written to it."""
    os.makedirs(output_dir, exist_ok=True)
    path = os.path.join(output_dir, LOCK)
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UsageError(
            f"--output-dir must be a folder that no other run writes to, got {output_dir!r}, which "
            f"{_owner(file.read())} holds; wait until that has ended, or give another folder (where its host is gone "
            f"for good, remove {path!r})"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    owner = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "run": uuid.uuid4().hex})
    try:
        file.truncate(0)
        file.write(owner)
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    return file, owner


def _owner(text: str) -> str:
    try:
        owner = json.loads(text)
        return f"process {owner['pid']} on {owner['host']}"
    except (ValueError, KeyError, TypeError):  # it is about to write it
        return "another process"


def _look(output_dir: str, rank: int, owner: str) -> None:
    """Returns when this rank sees what rank 0 wrote."""
    deadline = time.monotonic() + LOOK_SECONDS
    while True:
        with contextlib.suppress(OSError):
            os.listdir(os.path.dirname(os.path.abspath(output_dir)))  # has NFS forget that the folder was not there
        with (
            contextlib.suppress(OSError, UnicodeDecodeError),
            open(os.path.join(output_dir, LOCK), encoding="utf-8") as file,
        ):
            if file.read() == owner:
                return
        if time.monotonic() > deadline:
            raise UsageError(
                f"--output-dir must be a folder that all ranks see, got {os.path.abspath(output_dir)!r}, which on rank "
                f"{rank} ({socket.gethostname()}) is another than on rank 0; give a folder on a shared file system"
            )
        time.sleep(_LOOK_PAUSE_SECONDS)
