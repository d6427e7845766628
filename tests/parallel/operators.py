"""torch's own operator database on split tensors.

Every sample of an operator is computed twice, with plain tensors and with split ones beside plain ones, from the same
seed: value, shape, type and strides of what it returns, what it wrote, the gradients, what a later write to a view
does, and the random numbers that it took have to be the same.

``python -m tests.parallel.operators --output docs/operators.md`` writes the table of all operators.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import sys
import tempfile
import textwrap
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.parallel.operator_calls import NONE, OK, RAISES, WRONG, calls_of, database
from tests.ranks import run_ranks
from tlgc_mp.parallel.split_tensor import Ranks, observers


@dataclass
class Record:
    """What one operator of the database did.

    Attributes:
        kinds: how many calls were ``OK``, ``WRONG`` or ``RAISES``.
        reasons: of the first call of each kind that is not ``OK``.
    """

    kinds: collections.Counter[str] = field(default_factory=collections.Counter)
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        return next((kind for kind in (WRONG, RAISES, OK) if self.kinds[kind]), NONE)


@dataclass
class Outcome:
    """Of a run: the record of each operator of the database, and how often each operator of torch was computed how."""

    records: dict[str, Record] = field(default_factory=dict)
    computed: dict[str, collections.Counter[str]] = field(default_factory=dict)

    def add(self, other: Outcome) -> None:
        for name, record in other.records.items():
            own = self.records.setdefault(name, Record())
            own.kinds.update(record.kinds)
            own.reasons = {**record.reasons, **own.reasons}
        for name, counts in other.computed.items():
            self.computed.setdefault(name, collections.Counter()).update(counts)

    def failures(self) -> dict[str, str]:
        return {
            name: f"{record.verdict} {dict(record.kinds)}: {record.reasons[record.verdict]}"
            for name, record in self.records.items()
            if record.verdict in (WRONG, RAISES)
        }


def run_on_rank(names: tuple[str, ...], quick: bool, progress: str) -> Outcome:
    """The outcome of these operators, on each rank the same; ``progress`` is the file that names the one at work."""
    warnings.filterwarnings("ignore")
    limit = datetime.timedelta(seconds=30)
    ranks = Ranks(dist.new_group(timeout=limit))
    votes = dist.new_group(timeout=limit)  # its own, so that ranks that part do not read each other's data
    outcome = Outcome()

    def note(func: Any, how: str) -> None:
        outcome.computed.setdefault(func._schema.name.removeprefix("aten::"), collections.Counter())[how] += 1

    entries = database()
    observers.append(note)
    try:
        for name in names:
            Path(f"{progress}.{ranks.rank}").write_text(name)
            record = outcome.records.setdefault(name, Record())
            for call in calls_of(entries[name], ranks.size, quick):
                kind, reason = _agreed(call.verdict(ranks), votes)
                if kind != NONE:
                    record.kinds[kind] += 1
                    if kind != OK:
                        record.reasons.setdefault(kind, reason)
    finally:
        observers.remove(note)
    return outcome


def _agreed(own: tuple[str, str], group: dist.ProcessGroup | None) -> tuple[str, str]:
    """The worst verdict of the ranks."""
    verdicts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(verdicts, own, group=group)
    kinds = {kind for kind, _ in verdicts}
    worst = next(kind for kind in (WRONG, RAISES, OK, NONE) if kind in kinds)
    reason = next(reason for kind, reason in verdicts if kind == worst)
    if RAISES in kinds and len(kinds) > 1:
        return WRONG, f"raises on some ranks only: {reason}"
    return worst, reason


def run(names: tuple[str, ...], size: int, quick: bool = False, timeout: float = 280.0) -> Outcome:
    """The outcome of these operators over ``size`` ranks. One that hangs or ends a rank is ``WRONG``."""
    total = Outcome()
    while names:
        with tempfile.TemporaryDirectory() as folder:
            progress = str(Path(folder) / "operator")
            try:
                total.add(run_ranks(size, run_on_rank, names, quick, progress, timeout=timeout)[0])
                return total
            except AssertionError as error:
                at = [path.read_text() for path in sorted(Path(folder).glob("operator.*"))]
                if not at:
                    raise
                reason = f"a rank hung or ended: {str(error).strip().splitlines()[-1]}"
        failed = min(at, key=names.index)
        total.records[failed] = Record(collections.Counter({WRONG: 1}), {WRONG: reason})
        names = tuple(name for name in names if name != failed)
    return total


# Reporting.


def table(outcome: Outcome) -> str:
    """The contents of ``docs/operators.md``."""
    counts = collections.Counter(record.verdict for record in outcome.records.values())
    calls = sum(record.kinds.total() for record in outcome.records.values())
    names = sorted(name for name in outcome.computed if "::" not in name)
    on_shares = [name for name in names if outcome.computed[name]["shares"]]
    always = [name for name in on_shares if not outcome.computed[name]["whole"]]
    both = [name for name in on_shares if outcome.computed[name]["whole"]]
    whole_only = [name for name in names if name not in on_shares]
    failures = outcome.failures()
    lines = [
        "# Operators on split tensors",
        "",
        f"torch {torch.__version__.split('+')[0]}. Written by `python -m tests.parallel.operators --output"
        " docs/operators.md`, which runs torch's own operator",
        "database over two and three ranks, in double precision, and compares outputs, gradients, in-place and `out=`"
        " forms, strides, aliasing",
        "and random numbers with those of one device.",
        "",
        "| entries of the database | |",
        "|---|---:|",
        f"| as on one device | {counts[OK]} |",
        f"| fail | {len(failures)} |",
        f"| take no tensor that can be split | {counts[NONE]} |",
        f"| calls compared | {calls:,} |",
        "",
        "What the lists below lack was not reached by the database; it computes whole unless a rule covers it.",
        "",
        *_section("What fails", [f"- `{name}`: {reason}" for name, reason in failures.items()] or ["Nothing."]),
        *_section(
            "On shares",
            ["Whatever the arguments were, each rank computed with its share.", "", _list(always)],
        ),
        *_section(
            "On shares or whole",
            [
                "On shares where the dimension that is split stands for itself in the result, and whole where it does",
                "not: a flip along another dimension, and a flip along this one.",
                "",
                _list(both),
            ],
        ),
        *_section(
            "Whole",
            [
                "Each rank gathers the tensor and computes all of it: right, and no faster or smaller than one device.",
                "",
                _list(whole_only),
            ],
        ),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _section(title: str, lines: list[str]) -> list[str]:
    return [f"## {title}", "", *lines, ""]


def _list(names: list[str]) -> str:
    return textwrap.fill(", ".join(f"`{name}`" for name in names), 120, break_long_words=False, break_on_hyphens=False)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parallel.operators", description=__doc__.split("\n")[0])
    parser.add_argument("operators", nargs="*", help="names in torch's operator database (default: all)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3], help="numbers of ranks to split over")
    parser.add_argument("--output", type=Path, help="the file to write the table to")
    arguments = parser.parse_args(argv)
    known = database()
    names = tuple(arguments.operators or known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"operators must be in torch's operator database, got {unknown}")
    outcome = Outcome()
    for size in arguments.ranks:
        for start in range(0, len(names), 50):
            part = run(names[start : start + 50], size, timeout=1200.0)
            for name, failure in part.failures().items():
                print(f"{size} ranks, {name}: {failure}", flush=True)
            print(f"{size} ranks: {min(start + 50, len(names))} of {len(names)}", file=sys.stderr, flush=True)
            outcome.add(part)
    print(dict(collections.Counter(record.verdict for record in outcome.records.values())))
    if arguments.output:
        arguments.output.write_text(table(outcome))
    return int(bool(outcome.failures()))


if __name__ == "__main__":
    sys.exit(main())
