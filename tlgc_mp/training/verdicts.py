"""What a job leaves for ``tlgc-mp launch``: how it ended. Loads no torch.

A launcher may end with a status of its own: torchrun ends with 1 whatever its ranks ended with.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

VERDICT_FILE = "TLGC_MP_VERDICT_FILE"
"""The environment variable with the path of the file."""


def leave_verdict(status: int, text: str) -> None:
    """Leaves the exit status that a job deserves, and the line it printed, where ``tlgc-mp launch`` started it.

    The first to do so is heard.
    """
    path = os.environ.get(VERDICT_FILE)
    if path is not None:
        with contextlib.suppress(OSError), open(path, "x", encoding="utf-8") as file:
            json.dump({"status": status, "text": text}, file)


def read_verdict(path: str) -> dict[str, Any]:
    """What was left at ``path``; empty where nothing was."""
    try:
        with open(path, encoding="utf-8") as file:
            verdict = json.load(file)
    except (OSError, ValueError):
        return {}
    return verdict if isinstance(verdict, dict) else {}
