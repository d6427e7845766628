"""The rows of finished training runs: read, and sorted by what is compared with what."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tlgc_mp.errors import UsageError
from tlgc_mp.models.names import COARSE_INITS, CONVOLUTIONS
from tlgc_mp.training.runs import RESULT

Row = dict[str, Any]

SETTING = ("model", "dataset", "image_size", "recipe", "epochs", "batch_size", "learning_rate", "limit_steps")
"""What rows that are compared have in common."""

LABELS = {
    "sc": "SC",
    "gc": "GC",
    "gc-2l": "GC-2L",
    "gc-2l-proto": "GC-2L prototype",
    "shuffle": "Shuffle",
    "flgc": "FLGC",
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
            raise UsageError(f"report: {source!r} does not exist; give folders of runs, or files of rows")
        for path in _files(source):
            for row in _read(path):
                found.setdefault(json.dumps({key: row[key] for key in (*SETTING, *_IDENTITY)}), row)
    if not found:
        raise UsageError(f"report: no finished run (a {RESULT}) is in {', '.join(map(repr, sources))}")
    return list(found.values())


_IDENTITY = ("conv", "groups", "coarse_kernel_size", "coarse_init", "seed", "tensor_parallel", "data_parallel")


def _files(source: str) -> list[str]:
    if os.path.isfile(source):
        return [source]
    return sorted(os.path.join(folder, RESULT) for folder, _, names in os.walk(source) if RESULT in names)


def _read(path: str) -> list[Row]:
    try:
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file if line.strip()]
        missing = [key for row in rows for key in (*SETTING, *_IDENTITY, "epoch_lines") if key not in row]
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"report: {path!r} cannot be read as rows of runs: {' '.join(str(error).split())}") from None
    if missing:
        raise UsageError(f"report: a row in {path!r} has no {missing[0]!r}; give rows that tlgc-mp train has written")
    return rows


def setting_of(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in SETTING)


def variant_of(row: Row) -> Variant:
    departures = []
    if row["coarse_kernel_size"] is not None:
        departures.append(f"d0 = {row['coarse_kernel_size']}")
    if row["coarse_init"] != COARSE_INITS[0]:
        departures.append(f"{row['coarse_init']} initialization")
    return Variant(row["conv"], row["groups"], ", ".join(departures))


def grouped(rows: Iterable[Row], key: Any) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def variants_of(rows: list[Row]) -> dict[Variant, list[Row]]:
    """Variant -> its rows, a seed each, in the order of the convolutions' names and N."""
    groups = grouped(rows, variant_of)
    return {v: groups[v] for v in sorted(groups, key=lambda v: (v.departure, CONVOLUTIONS.index(v.conv), v.groups))}
