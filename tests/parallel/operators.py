"""torch's own operator database on split tensors.

Every sample of an operator is computed twice, with plain tensors and with split ones beside plain ones, from the same
seed: value, shape, type and strides of what it returns, what it wrote, the gradients, what a later write to a view
does, and the random numbers that it took have to be the same.

``python -m tests.parallel.operators --output docs/lab/operators.md`` writes the table of all operators.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
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
        computed: operator of torch that it called -> how often it was computed how.
    """

    kinds: collections.Counter[str] = field(default_factory=collections.Counter)
    reasons: dict[str, str] = field(default_factory=dict)
    computed: dict[str, collections.Counter[str]] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        return next((kind for kind in (WRONG, RAISES, OK) if self.kinds[kind]), NONE)

    def add(self, other: Record) -> None:
        self.kinds.update(other.kinds)
        self.reasons = {**other.reasons, **self.reasons}
        for name, counts in other.computed.items():
            self.computed.setdefault(name, collections.Counter()).update(counts)


Records = dict[str, Record]
"""Operator of the database -> what it did."""


def failures(records: Records) -> dict[str, str]:
    return {
        name: f"{record.verdict} {dict(record.kinds)}: {record.reasons[record.verdict]}"
        for name, record in records.items()
        if record.verdict in (WRONG, RAISES)
    }


def computed(records: Records) -> dict[str, collections.Counter[str]]:
    """Operator of torch -> how often it was computed how."""
    total = Record()
    for record in records.values():
        total.add(record)
    return total.computed


def run_on_rank(names: tuple[str, ...], quick: bool, progress: str) -> Records:
    """The records of these operators, on each rank the same; ``progress`` is the file that names the one at work."""
    warnings.filterwarnings("ignore")
    limit = datetime.timedelta(seconds=30)
    ranks = Ranks(dist.new_group(timeout=limit))
    votes = dist.new_group(timeout=limit)  # its own, so that ranks that part do not read each other's data
    records: Records = {}
    record = Record()

    def note(func: Any, how: str) -> None:
        record.computed.setdefault(func._schema.name.removeprefix("aten::"), collections.Counter())[how] += 1

    entries = database()
    observers.append(note)
    try:
        for name in names:
            Path(f"{progress}.{ranks.rank}").write_text(name)
            record = records[name] = Record()
            for call in calls_of(entries[name], ranks.size, quick):
                kind, reason = _agreed(call.verdict(ranks), votes)
                if kind != NONE:
                    record.kinds[kind] += 1
                    if kind != OK:
                        record.reasons.setdefault(kind, reason)
    finally:
        observers.remove(note)
    return records


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


def run(names: tuple[str, ...], size: int, quick: bool = False, timeout: float = 280.0) -> Records:
    """The records of these operators over ``size`` ranks. One that hangs or ends a rank is ``WRONG``."""
    total: Records = {}
    while names:
        with tempfile.TemporaryDirectory() as folder:
            progress = str(Path(folder) / "operator")
            try:
                return total | run_ranks(size, run_on_rank, names, quick, progress, timeout=timeout)[0]
            except AssertionError as error:
                at = [path.read_text() for path in sorted(Path(folder).glob("operator.*"))]
                if not at:
                    raise
                reason = f"a rank hung or ended: {str(error).strip().splitlines()[-1]}"
        failed = min(at, key=names.index)
        total[failed] = Record(collections.Counter({WRONG: 1}), {WRONG: reason})
        names = tuple(name for name in names if name != failed)
    return total


# Reporting.


def table(records: Records, ran: dict[int, int], total: int) -> str:
    """The contents of ``docs/lab/operators.md``. ``ran``: ranks -> how many of the ``total`` were run over them."""
    counts = collections.Counter(record.verdict for record in records.values())
    calls = sum(record.kinds.total() for record in records.values())
    how = computed(records)
    names = sorted(name for name in how if "::" not in name)
    on_shares = [name for name in names if how[name]["shares"]]
    always = [name for name in on_shares if not how[name]["whole"]]
    both = [name for name in on_shares if how[name]["whole"]]
    whole_only = [name for name in names if name not in on_shares]
    failed = failures(records)
    lines = [
        "# Operators on split tensors",
        "",
        f"torch {torch.__version__.split('+')[0]}. Written by `python -m tests.parallel.operators --output"
        " docs/lab/operators.md`, which runs torch's own operator",
        "database on split tensors, in double precision, and compares outputs, gradients, in-place and `out=` forms,"
        " strides, aliasing",
        "and random numbers with those of one device.",
        "",
        "| entries of the database | |",
        "|---|---:|",
        *[f"| run over {size} ranks, of {total} | {count} |" for size, count in ran.items()],
        f"| as on one device | {counts[OK]} |",
        f"| fail | {len(failed)} |",
        f"| take no tensor that can be split | {counts[NONE]} |",
        f"| calls compared | {calls:,} |",
        "",
        "What the lists below lack was not reached by the database; it computes whole unless a rule covers it.",
        "",
        *_section("What fails", [f"- `{name}`: {reason}" for name, reason in failed.items()] or ["Nothing."]),
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


def read(path: Path) -> dict[tuple[str, int], Record]:
    """(operator, ranks) -> its last record in the file."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        name, size, kinds, reasons, how = json.loads(line)
        counted = {key: collections.Counter(counts) for key, counts in how.items()}
        found[name, size] = Record(collections.Counter(kinds), reasons, counted)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parallel.operators", description=__doc__.split("\n")[0])
    parser.add_argument("operators", nargs="*", help="names in torch's operator database (default: all)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3], help="numbers of ranks to split over")
    parser.add_argument("--output", type=Path, help="the file to write the table to")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("runs/operators.json"),
        help="keeps results as they come; what it holds is run again where it is named only (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    known = database()
    names = tuple(arguments.operators or known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"operators must be in torch's operator database, got {unknown}")
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    for size in arguments.ranks:
        done = {} if arguments.operators else read(arguments.results)
        left = [name for name in names if (name, size) not in done]
        for start in range(0, len(left), 50):
            part = run(tuple(left[start : start + 50]), size, timeout=1200.0)
            for name, failure in failures(part).items():
                print(f"{size} ranks, {name}: {failure}", flush=True)
            with arguments.results.open("a") as file:
                for name, record in part.items():
                    line = (name, size, record.kinds, record.reasons, record.computed)
                    file.write(json.dumps(line) + "\n")
            print(f"{size} ranks: {min(start + 50, len(left))} of {len(left)}", file=sys.stderr, flush=True)
    records: Records = {}
    for (name, size), record in sorted(read(arguments.results).items()):
        if name in names and size in arguments.ranks:
            records.setdefault(name, Record()).add(record)
    print(dict(collections.Counter(record.verdict for record in records.values())))
    if arguments.output:
        ran = {n: sum(size == n for _, size in read(arguments.results)) for n in arguments.ranks}
        arguments.output.write_text(table(records, ran, len(names)))
    return int(bool(failures(records)))


if __name__ == "__main__":
    sys.exit(main())
