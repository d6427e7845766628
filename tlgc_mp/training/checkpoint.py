"""Saving and loading the state of a run through the engine."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from typing import Any

import torch.distributed as dist

from tlgc_mp.errors import UsageError
from tlgc_mp.parallel.engine import quiet_start
from tlgc_mp.training.runs import CHECKPOINTS, DESCRIPTION, LATEST, replace_file
from tlgc_mp.training.settings import TrainSettings


def save(engine: Any, settings: TrainSettings, progress: dict[str, Any], tag: str) -> str:
    """Saves the engine's state and ``progress`` as checkpoint ``tag``; returns its path. Collective.

    ``latest`` moves after every rank has written its files; only then do checkpoints older than the last
    ``settings.keep`` go.
    """
    folder = os.path.join(settings.output_dir, CHECKPOINTS)
    path = os.path.join(folder, tag)
    with quiet_start():
        engine.save_checkpoint(folder, tag=tag, client_state={"progress": progress}, save_latest=False)
    if settings.topology.rank == 0:
        replace_file(os.path.join(path, DESCRIPTION), json.dumps(settings.description(), indent=1) + "\n")
        replace_file(os.path.join(folder, LATEST), tag + "\n")
        _forget_old(folder, settings.keep)
    dist.barrier()
    return path


def load(engine: Any, settings: TrainSettings) -> dict[str, Any]:
    """Loads the checkpoint the run resumes from into the engine; returns the progress saved with it. Collective.

    Raises:
        UsageError: its files cannot be read.
    """
    assert settings.resume_from is not None
    folder, tag = settings.resume_from
    where = os.path.join(folder, tag)
    problem = None
    try:
        with quiet_start():
            path, state = engine.load_checkpoint(folder, tag=tag)
        if path is None:
            problem = "holds no state"
    except (OSError, RuntimeError, EOFError, AssertionError, KeyError, pickle.UnpicklingError) as error:
        problem = f"cannot be read: {' '.join(str(error).split())[:200]}"
    # A file that only some ranks read stops them all, and is told by the one that speaks.
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for found in filter(None, problems):
        raise UsageError(f"--resume: the checkpoint in {where!r} {found}")
    return dict(state["progress"])


def _forget_old(folder: str, keep: int) -> None:
    """Removes all but the ``keep`` checkpoints written last."""
    tags = [entry.path for entry in os.scandir(folder) if os.path.isfile(os.path.join(entry.path, DESCRIPTION))]
    tags.sort(key=lambda path: os.path.getmtime(os.path.join(path, DESCRIPTION)))
    for path in tags[:-keep]:
        shutil.rmtree(path, ignore_errors=True)
