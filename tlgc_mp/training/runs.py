"""The folder of a run: what lies where, and which checkpoint to go on from. Loads no torch.

OUTPUT/metrics.jsonl                one JSON object an epoch
OUTPUT/result.json                  the row of a finished run: what it was, what came out, and where
OUTPUT/tensorboard/, OUTPUT/csv/    the same figures through DeepSpeed's monitors
OUTPUT/checkpoints/latest           the tag of the newest checkpoint
OUTPUT/checkpoints/TAG/             DeepSpeed's files of one checkpoint, and run.json: what it is a checkpoint of
"""

from __future__ import annotations

import json
import os
from typing import Any

from tlgc_mp.errors import UsageError

CHECKPOINTS = "checkpoints"
DESCRIPTION = "run.json"
LATEST = "latest"
RESULT = "result.json"


def find_checkpoint(path: str) -> tuple[str, str]:
    """The newest checkpoint of the run in ``path``, as (folder of checkpoints, tag).

    ``path`` is a run's output folder, its folder of checkpoints, or one checkpoint in it.

    Raises:
        UsageError: there is no checkpoint.
    """
    path = os.path.normpath(path)
    if os.path.isfile(os.path.join(path, DESCRIPTION)):
        return os.path.dirname(os.path.abspath(path)), os.path.basename(path)
    for folder in (os.path.join(path, CHECKPOINTS), path):
        try:
            with open(os.path.join(folder, LATEST), encoding="utf-8") as file:
                tag = file.read().strip()
        except OSError:
            continue
        if tag and os.path.isfile(os.path.join(folder, tag, DESCRIPTION)):
            return folder, tag
        raise UsageError(f"--resume: {folder!r} names {tag!r} as its latest checkpoint, and that is not there")
    raise UsageError(f"--resume: {path!r} holds no checkpoint; give the --output-dir of a run that saved one")


def read_description(folder: str, tag: str) -> dict[str, Any]:
    """What the checkpoint ``tag`` in ``folder`` is a checkpoint of.

    Raises:
        UsageError: the file that says so cannot be read.
    """
    path = os.path.join(folder, tag, DESCRIPTION)
    try:
        with open(path, encoding="utf-8") as file:
            description = json.load(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"--resume: {path!r} cannot be read: {error}") from None
    if not isinstance(description, dict):
        raise UsageError(f"--resume: {path!r} does not describe a run")
    return description


def replace_file(path: str, text: str) -> None:
    """Writes ``text`` to ``path`` so that a reader finds the old content or the new, never a part."""
    temporary = f"{path}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
