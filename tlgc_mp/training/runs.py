"""The folder of a run: what lies where. Loads no torch.

OUTPUT/run.yaml                     the options it was started with, as --config takes them
OUTPUT/metrics.jsonl                JSON lines of steps and epochs
OUTPUT/result.json                  the row of a finished run: what it was, what came out, and where
OUTPUT/tensorboard/, OUTPUT/csv/    the same figures through DeepSpeed's monitors
OUTPUT/checkpoints/                 see :mod:`tlgc_mp.checkpoint.folder`
OUTPUT/profile/rank-K.json          with --profile: a trace of some steps
OUTPUT/lock                         locked while a run writes here; it says which process
OUTPUT/rank-K.traceback             of an exception that ended rank K
"""

from __future__ import annotations

import os

from tlgc_mp.checkpoint.folder import CHECKPOINTS, LATEST, tags
from tlgc_mp.errors import UsageError, must_be

LOCK = "lock"
OPTIONS = "run.yaml"
METRICS = "metrics.jsonl"
PROFILE = "profile"
RESULT = "result.json"


def check_free(path: str, argument: str, again: str) -> None:
    """Refuses a folder, given as ``argument``, that cannot take a new run; ``again`` says how one is resumed."""
    try:
        path.encode()
    except UnicodeEncodeError:  # which TensorBoard does not take
        raise must_be(argument, "a path in UTF-8", path, "use e.g. 'runs/mine'") from None
    if os.path.exists(path) and not os.path.isdir(path):
        raise UsageError(f"{argument} must be a folder, got {path!r}, which is a file")
    metrics = os.path.join(path, METRICS)
    # One cut off in its first epoch has written no line.
    if os.path.exists(metrics) and os.path.getsize(metrics) and not _never_saved(os.path.join(path, CHECKPOINTS)):
        raise UsageError(
            f"{argument} must be a folder without a run, got {path!r}, which holds one; {again} to resume it, or use "
            "another"
        )
    existing = path
    while not os.path.exists(existing):
        existing = os.path.dirname(os.path.abspath(existing))
    if not os.path.isdir(existing):
        raise UsageError(f"{argument} must be a folder, got {path!r}, where {existing!r} is a file")
    if not os.access(existing, os.W_OK):
        raise must_be(argument, "a folder in which you may write", path)


def _never_saved(checkpoints: str) -> bool:
    """Whether a run was cut off while its first checkpoint was being written, the first epoch's figures just before: it
    cannot be gone on with, only begun again."""
    latest = os.path.join(checkpoints, LATEST)
    return os.path.isdir(checkpoints) and not os.path.exists(latest) and not tags(checkpoints)
