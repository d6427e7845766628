"""The folder of checkpoints: what lies where, what is whole, and which one is the newest. Loads no torch.

FOLDER/TAG/checkpoint.json       what it is a checkpoint of, the size and SHA-256 of every other file, and its own sum
FOLDER/TAG/shard-P-D.safetensors what tensor-parallel rank P of replica D wrote
FOLDER/TAG/scheduler.pt          the state of the learning-rate schedule
FOLDER/TAG/extra_state.pt        the extra state of modules, by name, where there is any
FOLDER/latest                    the tag of the newest checkpoint
FOLDER/best                      the tag of the one with the smallest test error, where somebody says which it is
FOLDER/TAG.partial/              one that is being written, or was when its run was killed

A checkpoint is written as TAG.partial and takes its name when every byte of it is on the disk; ``latest`` moves after
that. So what has a name was whole once, and nothing that is written later touches it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from typing import TypedDict, cast

from tlgc_mp.errors import UsageError, is_count, must_be
from tlgc_mp.host import as_path, replace_file, sync_folder
from tlgc_mp.json_types import JsonObject
from tlgc_mp.models.names import check_coarse_level, check_model, coarse_level_of

CHECKPOINTS = "checkpoints"
DESCRIPTION = "checkpoint.json"
LATEST = "latest"
BEST = "best"
SCHEDULER = "scheduler.pt"
EXTRA_STATE = "extra_state.pt"
PARTIAL = ".partial"
FORMAT = 1
_BLOCK = 1 << 22


class FileEntry(TypedDict):
    """Of a file of a checkpoint, what it must be like."""

    bytes: int
    sha256: str


class Scalar(TypedDict):
    """A number of an optimizer's state, and whether it lies there as a tensor."""

    value: bool | int | float
    tensor: bool


class OptimizerEntry(TypedDict):
    """The optimizer that saved a checkpoint: its class, and for each parameter group its settings and the scalars that
    most of its parameters have; ``apart``, by the name of a parameter, those that differ."""

    type: str
    scalars: list[dict[str, Scalar]]
    apart: dict[str, dict[str, Scalar]]
    groups: list[JsonObject]


class Description(TypedDict):
    """``checkpoint.json``, without its own sum. ``files`` is checked when it is read, the rest where it is used."""

    format: int
    files: dict[str, FileEntry]
    client_state: JsonObject
    tensor_parallel: int
    data_parallel: int
    zero_stage: int
    optimizer: OptimizerEntry
    engine: dict[str, int]
    saved_by: JsonObject


class Progress(TypedDict):
    """Where a training is: complete epochs, steps of the one under way and of each, and what they have taken."""

    epoch: int
    step: int
    steps: int
    seconds: float
    train_seconds: float
    data_seconds: float
    learning_rate: float


class Run(TypedDict):
    """What a run of ``tlgc-mp train`` is, as far as it is read again; its other options stand beside these."""

    model: str
    conv: str
    groups: int
    coarse_everywhere: bool
    coarse_kernel_size: int | None
    coarse_init: str
    coarse_channels: int
    coarse_sum: bool
    batch_size: int
    accumulation: int
    tensor_parallel: int
    data_parallel: int
    zero_stage: int
    data_dir: str | None
    data_fingerprint: str | None
    departures: JsonObject


def is_exported(path: str) -> bool:
    """Whether ``path`` is a file of weights, and not one that names a checkpoint beside it."""
    return os.path.isfile(path) and os.path.basename(path) not in (BEST, LATEST)


def find_checkpoint(path: str) -> tuple[str, str]:
    """The newest checkpoint of the run in ``path``, as (folder of checkpoints, tag); its files are all there.

    ``path`` is a run's output folder, its folder of checkpoints, or one checkpoint in it, ``best`` and ``latest`` by
    these names too. Sizes are compared, contents are not: see :func:`damage`.

    Raises:
        UsageError: there is no checkpoint, or the newest is damaged; the message names the newest whole one before it.
    """
    path = os.path.normpath(as_path("checkpoint", path))
    if os.path.isfile(os.path.join(path, DESCRIPTION)):
        folder, tag = os.path.dirname(os.path.abspath(path)), os.path.basename(path)
    elif os.path.basename(path) in (BEST, LATEST) and (tag := _tag_in(path)):
        folder = os.path.dirname(os.path.abspath(path))
    else:
        places = (os.path.join(path, CHECKPOINTS), path)
        folder = next((place for place in places if _tag_in(os.path.join(place, LATEST)) or tags(place)), "")
        if not folder:
            hint = "give the --output-dir of a run that saved one"
            raise must_be("checkpoint", "one, or a folder that holds one", path, hint)
        tag = _tag_in(os.path.join(folder, LATEST)) or tags(folder)[0]
    problem = missing(folder, tag)
    if problem is not None:
        raise UsageError(f"{problem}; {offer(folder, tag)}")
    return folder, tag


def newest_whole(folder: str, before: str | None = None) -> str | None:
    """The tag of the newest checkpoint in ``folder`` whose every byte is as it was written; ``None`` without one.

    Args:
        before: only checkpoints older than this one.
    """
    candidates = tags(folder)
    if before in candidates:
        candidates = candidates[candidates.index(before) + 1 :]
    return next((tag for tag in candidates if tag != before and damage(folder, tag) is None), None)


def offer(folder: str, tag: str) -> str:
    """The end of a message about a damaged checkpoint: which one to go on from instead."""
    other = newest_whole(folder, before=tag)
    if other is None:
        return "no whole checkpoint lies before it"
    return f"the newest whole one before it is {os.path.join(folder, other)!r}: go on from that"


def tags(folder: str) -> list[str]:
    """The checkpoints in ``folder``, the newest first. None of a folder that is not there."""
    try:
        entries = [entry for entry in os.scandir(folder) if not entry.name.endswith(PARTIAL)]
    except OSError:
        return []
    saved = {}
    for entry in entries:
        path = os.path.join(entry.path, DESCRIPTION)
        if os.path.isfile(path):
            saved[entry.name] = _saved_at(path)
    return sorted(saved, key=lambda tag: saved[tag], reverse=True)


def read_description(folder: str, tag: str) -> Description:
    """The contents of the checkpoint's ``checkpoint.json``, without its sum.

    Raises:
        UsageError: it cannot be read, is of another format, or is not as it was written.
    """
    path = os.path.join(folder, tag, DESCRIPTION)
    try:
        with open(path, encoding="utf-8") as file:
            description = json.load(file)
        written = description.pop("sha256", None) if isinstance(description, dict) else None
        changed = written != _sum_of(description)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(description, dict):
        raise UsageError(f"{path!r} does not describe a checkpoint")
    if description.get("format") != FORMAT or isinstance(description["format"], bool):
        raise UsageError(
            f"{path!r} must be of format {FORMAT}, got {description.get('format')!r}; use the version that wrote it"
        )
    if changed:
        raise UsageError(f"{path!r} is damaged: its checksum does not match")
    files = description.get("files")
    if not isinstance(files, dict):
        raise UsageError(f"{path!r} does not describe a checkpoint: it names no files")
    for name, entry in files.items():
        if os.path.basename(name) != name or not isinstance(entry, dict) or not _is_sealed(entry):
            raise UsageError(f"{path!r} does not describe a checkpoint: it gives no size and checksum for {name!r}")
    return cast(Description, description)


def description_text(content: Mapping[str, object]) -> str:
    """What stands in ``checkpoint.json``: ``content`` and the SHA-256 of it, as JSON."""
    return json.dumps({**content, "sha256": _sum_of(content)}, indent=1) + "\n"


def _sum_of(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _is_sealed(entry: Mapping[str, object]) -> bool:
    return is_count(entry.get("bytes"), 0) and isinstance(entry.get("sha256"), str)


def is_own(description: Description) -> bool:
    """Whether ``tlgc-mp train`` saved a checkpoint, as far as what it keeps can be seen; else other code did."""
    state = description.get("client_state")
    return not isinstance(state, dict) or bool({"run", "progress"} & state.keys())


def saved_run(folder: str, tag: str) -> Run:
    """The description of the run of ``tlgc-mp train`` that saved a checkpoint.

    Raises:
        UsageError: something else saved it.
    """
    state, where = read_description(folder, tag).get("client_state"), os.path.join(folder, tag)
    own = "one that tlgc-mp train saved"
    if not isinstance(state, dict):
        raise must_be("checkpoint", own, where, note=", which has no client_state")
    run, progress = state.get("run"), state.get("progress")
    if not isinstance(run, dict):
        raise must_be("checkpoint", own, where, note=", which has no run")
    odd = [name for name in _COUNTED if not is_count(run.get(name))]
    odd += [name for name in _TOLD if name not in run]
    odd += [] if isinstance(run.get("coarse_everywhere"), bool) else ["coarse_everywhere"]
    if not isinstance(progress, dict) or not all(_fits(progress.get(name), kind) for name, kind in _PROGRESS.items()):
        odd.append("progress")
    if odd:
        raise must_be("checkpoint", own, where, note=f", which has no {odd[0]}")
    if run["batch_size"] % (run["accumulation"] * run["data_parallel"]):
        raise must_be("checkpoint", own, where, note=", whose batch_size is not valid")
    try:
        classes = cast(int, state.get("num_classes"))
        check_model(run["model"], run["conv"], run["groups"], classes, run["coarse_everywhere"])
        check_coarse_level(run["conv"], coarse_level_of(run))
    except UsageError as error:
        raise UsageError(f"{where!r}: {error}") from None
    return cast(Run, {**run, **coarse_level_of(run)})


_COUNTED = ("groups", "batch_size", "accumulation", "tensor_parallel", "data_parallel")
_TOLD = ("model", "conv", "zero_stage", "coarse_everywhere", "coarse_kernel_size", "coarse_init")
_PROGRESS = {
    **{"epoch": int, "step": int, "steps": int},
    **dict.fromkeys(("seconds", "train_seconds", "data_seconds", "learning_rate"), float),
}


def _fits(value: object, kind: type) -> bool:
    return is_count(value, 0) or (kind is float and isinstance(value, float) and 0.0 <= value < float("inf"))


def missing(folder: str, tag: str) -> str | None:
    """What is wrong with the names and sizes of a checkpoint's files, or ``None``."""
    try:
        files = read_description(folder, tag)["files"]
    except UsageError as error:
        return str(error)
    for name, entry in files.items():
        path = os.path.join(folder, tag, name)
        try:
            size = os.path.getsize(path)
        except OSError:
            return f"{path!r} is missing"
        if size != entry["bytes"]:
            return f"{path!r} is damaged: it holds {size:,} of {entry['bytes']:,} bytes"
    return None


def damage(folder: str, tag: str, names: list[str] | None = None) -> str | None:
    """What is wrong with a checkpoint's files, every byte read, or ``None``.

    Args:
        names: of the files to read; all where not given.
    """
    problem = missing(folder, tag)
    if problem is not None:
        return problem
    files = read_description(folder, tag)["files"]
    for name in sorted(files) if names is None else names:
        path = os.path.join(folder, tag, name)
        try:
            found = checksum(path)
        except OSError as error:
            return f"{path!r} cannot be read: {error.strerror}"
        if found != files[name]["sha256"]:
            return f"{path!r} is damaged: its checksum does not match"
    return None


def checksum(path: str) -> str:
    """The SHA-256 of a file, as ``sha256sum`` prints it."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            total.update(block)
    return total.hexdigest()


def sealed(path: str) -> FileEntry:
    """Puts a file on the disk for good; returns its entry in ``checkpoint.json``."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"bytes": os.path.getsize(path), "sha256": checksum(path)}


def free_tag(folder: str, tag: str) -> str:
    """``tag``, or ``tag`` with a number where a checkpoint has that name already: none is ever written over."""
    name, number = tag, 1
    while os.path.exists(os.path.join(folder, name)):
        number += 1
        name = f"{tag}.{number}"
    return name


def begin(folder: str, tag: str) -> None:
    """Makes TAG.partial, and clears away what killed runs left of theirs."""
    os.makedirs(folder, exist_ok=True)
    for entry in os.scandir(folder):
        if entry.name.endswith(PARTIAL):
            shutil.rmtree(entry.path, ignore_errors=True)
    os.mkdir(os.path.join(folder, tag + PARTIAL))


def commit(folder: str, tag: str, description: Mapping[str, object]) -> None:
    """Names a checkpoint whose files are all on the disk, and moves ``latest`` to it."""
    partial = os.path.join(folder, tag + PARTIAL)
    content = {"format": FORMAT, **description, "saved": time.time()}
    replace_file(os.path.join(partial, DESCRIPTION), description_text(content))
    os.rename(partial, os.path.join(folder, tag))
    sync_folder(folder)
    replace_file(os.path.join(folder, LATEST), tag + "\n")


def abandon(folder: str, tag: str) -> None:
    """Clears away a checkpoint that could not be written."""
    shutil.rmtree(os.path.join(folder, tag + PARTIAL), ignore_errors=True)


def mark_best(folder: str, tag: str) -> None:
    """Makes ``best`` name ``tag``."""
    replace_file(os.path.join(folder, BEST), tag + "\n")


def forget_old(folder: str, keep: int) -> None:
    """Removes all but the ``keep`` newest checkpoints and the best."""
    stay = {_tag_in(os.path.join(folder, name)) for name in (LATEST, BEST)}
    for tag in tags(folder)[keep:]:
        if tag not in stay:
            shutil.rmtree(os.path.join(folder, tag), ignore_errors=True)


def _saved_at(path: str) -> float:
    """When a checkpoint was named, in seconds since 1970: as it says itself, since a copy has another time."""
    try:
        with open(path, encoding="utf-8") as file:
            return float(json.load(file)["saved"])
    except (OSError, ValueError, TypeError, KeyError):
        return 0.0  # damaged: none that can be read is older


def _tag_in(path: str) -> str:
    """The tag that a file names; nothing where it names none."""
    try:
        if not os.path.isfile(path):  # a pipe would be waited on
            return ""
        with open(path, encoding="utf-8") as file:
            tag = file.read().strip()
        return tag if tag == os.path.basename(tag) else ""
    except (OSError, UnicodeDecodeError):
        return ""
