"""The rows of finished training runs: read, and sorted by what is compared with what."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard, TypeVar

from tlgc_mp.data.catalog import DATASETS
from tlgc_mp.errors import UsageError, check_representatives, is_count, is_number, must_be, shown
from tlgc_mp.models.names import COARSE_INITS, COARSE_LEVEL, CONVOLUTIONS, TWO_LEVEL, check_model, coarse_level_of
from tlgc_mp.training.runs import RESULT

Key = TypeVar("Key")
Row: TypeAlias = dict[str, Any]

SETTING = ("model", "dataset", "image_size", "recipe", "epochs", "batch_size", "learning_rate", "limit_steps")
"""What rows that are compared have in common, beside what they have otherwise than the recipe, and the images."""

LABELS = {
    "sc": "SC",
    "gc": "GC",
    "gc-2l": "GC-2L",
    "gc-2l-proto": "GC-2L prototype",
    "shuffle": "Shuffle",
    "flgc": "FLGC",
    "bgc": "BGC",
}


@dataclass(frozen=True, order=True)
class Variant:
    """What is compared: a convolution, its N, and how its coarse level departs from the default, if it does."""

    conv: str
    groups: int
    departure: str = ""

    @property
    def label(self) -> str:
        """For a table."""
        return f"{LABELS[self.conv]}, {self.departure}" if self.departure else LABELS[self.conv]


def read_rows(sources: Sequence[str]) -> list[Row]:
    """The rows in ``sources``: files of JSON lines, and folders, in which every ``result.json`` counts.

    A run that is found twice counts once.

    Raises:
        UsageError: a source is missing or damaged, or there is no finished run in any.
    """
    found: dict[str, Row] = {}
    for source in sources:
        if not os.path.exists(source):
            raise UsageError(
                f"SOURCE must be a folder of runs, or a file of rows, got {source!r}, which does not exist"
            )
        for path in _files(source):
            for row in _read(path):
                whole = {**row, **coarse_level_of(row)}
                found.setdefault(json.dumps([setting_of(row), *(whole[key] for key in _IDENTITY)]), row)
    if not found:
        raise UsageError(f"SOURCE must hold a finished run (a {RESULT}), got none in {', '.join(map(repr, sources))}")
    return list(found.values())


_IDENTITY = ("conv", "groups", *COARSE_LEVEL, "seed", "tensor_parallel", "data_parallel")


def _files(source: str) -> list[str]:
    if os.path.isfile(source):
        return [source]
    return sorted(os.path.join(folder, RESULT) for folder, _, names in os.walk(source) if RESULT in names)


def _read(path: str) -> list[Row]:
    try:
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        note = f": {' '.join(str(error).split())}"
        raise must_be("SOURCE", "a folder of runs, or a file of rows", path, note=note) from None
    for row in rows:
        _check(row, path)
    return rows


def _check(row: object, path: str) -> None:
    """Refuses a row that is not as a finished run leaves it."""
    if not isinstance(row, dict):
        raise UsageError(f"{path!r} must hold a JSON object on each line, got {shown(row)}")
    for key, (fits, what) in _FIELDS.items():
        if key not in row:
            raise UsageError(f"a row in {path!r} must have {key}, got none; give rows that tlgc-mp train wrote")
        if not fits(row[key]):
            raise UsageError(
                f"{key} of a row in {path!r} must be {what}, got {shown(row[key])}; give rows that tlgc-mp train wrote"
            )
    if not isinstance(row.get("data_fingerprint"), str | None):
        raise UsageError(f"data_fingerprint of a row in {path!r} must be text, got {shown(row['data_fingerprint'])}")
    if not isinstance(row.get("departures", {}), dict):
        raise UsageError(f"departures of a row in {path!r} must be an object, got {shown(row['departures'])}")
    try:
        coarse = coarse_level_of(row)
        check_representatives(coarse["coarse_channels"], coarse["coarse_sum"])
    except UsageError as error:
        raise UsageError(f"a row in {path!r}: {error}") from None
    if not _PERHAPS_COUNT[0](row.get("effective_parameters")):
        raise UsageError(
            f"effective_parameters of a row in {path!r} must be {_PERHAPS_COUNT[1]}, got "
            f"{shown(row['effective_parameters'])}; give rows that tlgc-mp train wrote"
        )
    try:
        check_model(row["model"], row["conv"], row["groups"])
    except UsageError as error:
        raise UsageError(f"a row in {path!r}: {error}") from None


def _is_figure(value: object) -> TypeGuard[float]:
    return is_number(value) and abs(value) <= _LARGEST_FIGURE


def _is_count(value: object) -> bool:
    return is_count(value) and _is_figure(value)


def _are_lines(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(e, dict) and _is_count(e.get("epoch")) and _is_figure(e.get("train_loss")) for e in value)
    )


def _holds(**parts: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(isinstance(value.get(k), kind) for k, kind in parts.items())


_LARGEST_FIGURE = 1e18
_COUNT = (_is_count, "a count")
_PERHAPS_COUNT = (lambda value: value is None or _is_count(value), "a count or null")
_FIGURE = (_is_figure, "a number")
_TEXT = (lambda value: isinstance(value, str), "text")
_FIELDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "model": _TEXT,
    "dataset": (lambda value: value in DATASETS, "a data set"),
    "image_size": _PERHAPS_COUNT,
    "recipe": _TEXT,
    "epochs": _COUNT,
    "batch_size": _COUNT,
    "learning_rate": _FIGURE,
    "limit_steps": _PERHAPS_COUNT,
    "conv": _TEXT,
    "groups": _COUNT,
    "coarse_kernel_size": _PERHAPS_COUNT,
    "coarse_init": (lambda value: value in COARSE_INITS, "an initialization"),
    "seed": (lambda value: is_count(value, 0), "a seed"),
    "tensor_parallel": _COUNT,
    "data_parallel": _COUNT,
    "epoch_lines": (_are_lines, "a list of epochs, each with its number and train_loss"),
    "parameters": _COUNT,
    "test_error_percent": _FIGURE,
    "seconds": _FIGURE,
    "train_seconds": (lambda value: _is_figure(value) and value > 0, "a time"),
    "data_seconds": _FIGURE,
    "machine": (_holds(cpu=str, cores=int), "a machine"),
    "versions": (_holds(torch=str, deepspeed=str), "versions"),
    "date": _TEXT,
}
"""What a report reads of a row, what it must be, and what that is called."""


def setting_of(row: Row) -> tuple[object, ...]:
    departures = json.dumps(row.get("departures") or {}, sort_keys=True)
    return (*(row[key] for key in SETTING), departures, row.get("data_fingerprint"))


def variant_of(row: Row) -> Variant:
    departures, coarse = [], coarse_level_of(row)
    if row["coarse_kernel_size"] is not None:
        departures.append(f"d0 = {row['coarse_kernel_size']}")
    if coarse["coarse_channels"] != 1:
        departures.append(f"r = {coarse['coarse_channels']}")
    if coarse["coarse_sum"]:
        departures.append("summed")
    if row["conv"] in TWO_LEVEL and row["coarse_init"] != COARSE_INITS[0]:
        departures.append(f"{row['coarse_init']} initialization")
    return Variant(row["conv"], row["groups"], ", ".join(departures))


def grouped(rows: Iterable[Row], key: Callable[[Row], Key]) -> dict[Key, list[Row]]:
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def variants_of(rows: list[Row]) -> dict[Variant, list[Row]]:
    """Variant -> its rows, a seed each, in the order of the convolutions' names and N."""
    groups = grouped(rows, variant_of)
    return {v: groups[v] for v in sorted(groups, key=lambda v: (v.departure, CONVOLUTIONS.index(v.conv), v.groups))}
