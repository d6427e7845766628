"""What a run goes on from, and what of it may be changed. Loads no torch."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import TYPE_CHECKING

from tlgc_mp.checkpoint.folder import CHECKPOINTS, Progress, Run, find_checkpoint, newest_whole, saved_run, tags
from tlgc_mp.errors import UsageError
from tlgc_mp.json_types import JsonObject
from tlgc_mp.training.recipes import FLAGS, find_recipe

if TYPE_CHECKING:
    from tlgc_mp.training.settings import TrainSettings

RESUME_AUTO = "auto"
"""With --resume: go on where the output folder holds a checkpoint, begin where it holds none."""

_SPLIT = ("tensor_parallel", "data_parallel", "zero_stage", "accumulation")
"""How a run is spread over ranks: a resumed one may be spread otherwise."""

_OF_DATA = ("data_dir", "data_fingerprint")
"""Where the images are, which may change, and which they are, known once they were read: :func:`check_data`."""

_CHANGEABLE = {
    "epochs": "--epochs",
    "limit_steps": "--limit-steps",
    "batch_size": "--batch-size",
    "learning_rate": "--learning-rate",
    "departures": "the flags of the recipe",
}
"""What a resumed run may have otherwise, where it is asked for by name: -> how that is done."""


def find_resumed(resume: str, output_dir: str) -> tuple[str, str] | None:
    """The checkpoint that --resume means; ``None`` to begin."""
    if resume != RESUME_AUTO:
        return find_checkpoint(resume or output_dir)
    folder = os.path.join(output_dir, CHECKPOINTS)
    if not tags(folder):
        return None
    try:
        return find_checkpoint(output_dir)
    except UsageError:
        tag = newest_whole(folder)
        if tag is None:
            raise
        return folder, tag


def named_here(options: Namespace, config: JsonObject) -> set[str]:
    """What of :data:`_CHANGEABLE` the options or the DeepSpeed configuration, as it was given, say by name."""
    named = {key for key in _CHANGEABLE if getattr(options, key, None) is not None}
    if any(getattr(options, flag) is not None for flag in FLAGS):
        named.add("departures")
    if "optimizer" in config:
        named.add("learning_rate")
    if {"train_batch_size", "train_micro_batch_size_per_gpu"} & config.keys():
        named.add("batch_size")
    return named


def check_resumed(settings: TrainSettings, saved: Run, named: set[str]) -> None:
    """Refuses to go on with a run that is another one; how it is spread over ranks may change, and what is named."""
    assert settings.resume_from is not None
    for key, value in settings.description().items():
        if key not in (*_SPLIT, *_OF_DATA, *named) and saved.get(key) != value:
            hint = f", or ask for it by {_CHANGEABLE[key]}" if key in _CHANGEABLE else ""
            raise UsageError(
                f"--resume must be of a run with {key}={value!r}, got {saved.get(key)!r} in "
                f"{os.path.join(*settings.resume_from)!r}; give the same, or another --output-dir{hint}"
            )


def check_data(settings: TrainSettings) -> None:
    """Refuses to go on with other images than the run was trained on, once they were read."""
    if settings.resume_from is None:
        return
    saved = saved_run(*settings.resume_from)
    if saved.get("data_fingerprint") != settings.fingerprint:
        raise UsageError(
            f"--resume: --data-dir must hold the images that the run was trained on, {saved.get('data_dir')!r}, got "
            f"{settings.data_dir!r}, whose files, classes or sizes are others; give those, or another --output-dir"
        )


def changes(settings: TrainSettings, saved: Run) -> list[str]:
    """What a resumed run has otherwise than the run that was saved, as ``epochs 2 -> 3``."""
    now = settings.description()
    before, after = saved["departures"], now["departures"]
    told, asked = dict(saved), dict(now)
    changed = [
        f"{key} {told[key]} -> {asked[key]}" for key in _CHANGEABLE if key != "departures" and told[key] != asked[key]
    ]
    flags = [flag for flag in FLAGS if before.get(flag) != after.get(flag)]
    default = find_recipe(settings.recipe)
    return changed + [f"{f} {before.get(f, getattr(default, f))} -> {getattr(settings.method, f)}" for f in flags]


def place(settings: TrainSettings, saved: Run, progress: Progress, steps: int) -> int:
    """How many steps of its epoch a resumed run has behind it, where an epoch now has ``steps``.

    Where the batch was changed, they are as many as its images fill: those that are left over come again.
    """
    if progress["step"] >= progress["steps"]:
        return steps
    return min(steps, progress["step"] * saved["batch_size"] // settings.batch_size)
