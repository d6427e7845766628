"""What a job leaves when it ends: for ``tlgc-mp launch``, how; for people, the traceback. Loads no torch.

A launcher may end with a status of its own: torchrun ends with 1 whatever its ranks ended with.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import traceback
from typing import NamedTuple, TypedDict, cast

VERDICT_FILE = "TLGC_MP_VERDICT_FILE"
"""The environment variable with the path of the file."""
_MET = ".met"


class Failed(Exception):
    """The run has failed, and that has been told. ``status`` is the exit status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Verdict(NamedTuple):
    """Why a job ends: what ``teller`` found out about ``rank``. ``lost``: that one cannot be asked to leave, whether
    it lives or not. An empty text is not printed."""

    teller: int
    rank: int
    text: str
    status: int
    lost: bool = False

    def line(self) -> str:
        """As it is told."""
        return f"error: {self.text}" if self.status == 2 else f"rank {self.rank}: {self.text}"


def leave_verdict(status: int, text: str) -> None:
    """Leaves the exit status that a job deserves, and the line it printed, where ``tlgc-mp launch`` started it.

    The first to do so is heard.
    """
    path = os.environ.get(VERDICT_FILE)
    if path is not None:
        with contextlib.suppress(OSError), open(path, "x", encoding="utf-8") as file:
            json.dump({"status": status, "text": text}, file)


def note_meeting() -> None:
    """Leaves word for ``tlgc-mp launch`` that all ranks have met."""
    path = os.environ.get(VERDICT_FILE)
    if path is not None:
        with contextlib.suppress(OSError), open(path + _MET, "w", encoding="utf-8"):
            pass


def met(path: str) -> bool:
    """Whether the ranks of the job whose verdict is to be left at ``path`` had met."""
    return os.path.exists(path + _MET)


class LeftVerdict(TypedDict, total=False):
    """What a job left for ``tlgc-mp launch``: the exit status it calls for, and why."""

    status: int
    text: str


def read_verdict(path: str) -> LeftVerdict:
    """What was left at ``path``; empty where nothing was."""
    try:
        with open(path, encoding="utf-8") as file:
            verdict = json.load(file)
    except (OSError, ValueError):
        return {}
    return cast(LeftVerdict, verdict) if isinstance(verdict, dict) else {}


def write_traceback(error: BaseException, rank: int, output_dir: str) -> str | None:
    """The path of the file that the traceback of ``error`` was written to; ``None`` where none could be."""
    text = "".join(traceback.format_exception(error))
    for folder in (output_dir, tempfile.gettempdir()):
        path = os.path.join(folder, f"rank-{rank}.traceback")
        try:
            os.makedirs(folder, exist_ok=True)
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
        except OSError:
            continue
        return path
    return None
