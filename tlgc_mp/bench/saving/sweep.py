"""The benchmark ``tlgc-mp bench saving``: how long a checkpoint holds training up.

P tensor-parallel ranks of GC-2L with SGD and momentum, float32, each saving its share, in rounds: the same bytes
written plainly, a save that training waits for, and one beside it.

    DIR/saving.json   {"run": machine, versions, git commit, date and command; "rows": [see :func:`make_row`]}
    DIR/saving.md     the row as a table
"""

from __future__ import annotations

import json
import os
import statistics
import time
from argparse import Namespace
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, TypedDict, get_args

from tlgc_mp.bench.ranks import launch
from tlgc_mp.bench.report import describe, table
from tlgc_mp.bench.settings import check_counts, check_ranks, check_time_limit, output_folder
from tlgc_mp.bench.zero.sweep import TrainingEngine
from tlgc_mp.errors import must_be, one_of
from tlgc_mp.host import Provenance, describe_run, replace_file
from tlgc_mp.models.names import check_model, check_split


class Seconds(TypedDict):
    """What saving costs a rank, in seconds, a figure a round."""

    plain: list[float]
    blocking: list[float]
    stall: list[float]
    background: list[float]
    step: list[float]
    step_beside: list[float]


class Figures(Seconds):
    """And the bytes that it writes, and the seconds of the first save beside training."""

    bytes: int
    first_stall: float


class Row(TypedDict):
    """The settings, the bytes of the rank that writes most, and seconds by kind: of each the slowest rank's, the median
    over the rounds and all samples."""

    model: str
    groups: int
    tensor_parallel: int
    batch_size: int
    zero_stage: int
    bytes: int
    median: dict[str, float]
    samples: dict[str, list[float]]


Kind: TypeAlias = Literal["plain", "blocking", "stall", "background", "step", "step_beside"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_LINES = (
    ("plain", "the same bytes written once to the same disk, and put there for good"),
    ("blocking", "a save that training waits for (`--blocking-save`)"),
    ("first_stall", "a save beside training: how long training stands still, the first time"),
    ("stall", "every later time"),
    ("background", "until that checkpoint is on the disk"),
    ("step", "a training step"),
    ("step_beside", "a training step while a checkpoint is written"),
)


@dataclass(frozen=True)
class SavingSettings:
    """A run of the benchmark, every choice made.

    Attributes:
        groups: N.
        tensor_parallel: P.
        batch_size: images a step.
        stage: of ZeRO.
        output: the folder of what is written, and on whose disk checkpoints are.
        time_limit: seconds after which it is given up.
    """

    model: str
    groups: int
    tensor_parallel: int
    batch_size: int
    stage: int
    rounds: int
    output: str
    time_limit: float


def resolve(options: Namespace) -> SavingSettings:
    """Turns parsed command-line ``options`` into a complete run.

    Raises:
        UsageError: an option that cannot work, or two that do not fit together.
    """
    check_ranks("--tp", options.tp)
    check_counts({"--batch-size": options.batch_size, "--rounds": options.rounds})
    if options.stage not in range(4):
        raise must_be("--zero-stage", one_of(range(4)), options.stage)
    check_time_limit(options.time_limit)
    model = options.model or ("wrn-10-1" if options.quick else "wrn-28-20")
    groups = options.tp if options.groups is None else options.groups
    check_model(model, "gc-2l", groups)
    check_split(model, "gc-2l", groups, options.tp)
    folder = output_folder(options.output, time.strftime("saving-%Y%m%d-%H%M%S"))
    rounds = 1 if options.quick else options.rounds
    return SavingSettings(
        model, groups, options.tp, options.batch_size, options.stage, rounds, folder, options.time_limit
    )


@dataclass(frozen=True)
class Saving(TrainingEngine[Figures]):
    """What a checkpoint costs at ZeRO ``stage``, in ``rounds``, on the disk of ``folder``."""

    measured_by: ClassVar[str] = "tlgc_mp.bench.saving.rank:measure_saving"
    stage: int
    rounds: int
    folder: str


def run(settings: SavingSettings) -> int:
    """Measures, writes the files, and says how it goes; the exit status: 1 if it could not be measured."""
    description = describe_run()
    request = Saving(
        settings.model,
        settings.groups,
        settings.tensor_parallel,
        settings.batch_size,
        settings.stage,
        settings.rounds,
        os.path.abspath(settings.output),
    )
    outcome = launch.measure(request, settings.tensor_parallel, settings.time_limit)
    if outcome.error is not None:
        print(f"saving  {outcome.error}", flush=True)
        return 1
    row = make_row(settings, outcome.ranks)
    text = markdown(row, description)
    found = json.dumps({"run": description, "rows": [row]}, indent=1) + "\n"
    for name, content in (("saving.json", found), ("saving.md", text)):
        replace_file(os.path.join(settings.output, name), content)
    print(text.partition("\n\n")[2].partition("\n\nMachine")[0])
    print(f"Wrote saving.json and saving.md to {settings.output}", flush=True)
    return 0


def make_row(settings: SavingSettings, ranks: list[Figures]) -> Row:
    """What came of all ranks."""
    samples: dict[str, list[float]] = {
        name: [max(each) for each in zip(*(rank[name] for rank in ranks), strict=True)] for name in KINDS
    }
    samples["first_stall"] = [max(rank["first_stall"] for rank in ranks)]
    return {
        "model": settings.model,
        "groups": settings.groups,
        "tensor_parallel": settings.tensor_parallel,
        "batch_size": settings.batch_size,
        "zero_stage": settings.stage,
        "bytes": max(rank["bytes"] for rank in ranks),
        "median": {name: statistics.median(values) for name, values in samples.items()},
        "samples": samples,
    }


def markdown(row: Row, description: Provenance) -> str:
    """The row as a table, with where it comes from."""
    lines = [[text, f"{row['median'][name]:.3f}"] for name, text in _LINES]
    rounds = len(row["samples"]["plain"])
    return "\n".join(
        [
            "# What a checkpoint costs",
            "",
            f"{row['model']}, GC-2L, N = {row['groups']}, P = {row['tensor_parallel']}, ZeRO {row['zero_stage']}, "
            f"{row['batch_size']} images a step, SGD with momentum, float32. Each rank writes "
            f"{row['bytes'] / 1e6:,.0f} MB. Seconds, of the slowest rank; the median of {rounds} round(s).",
            "",
            *table(("", "s"), lines),
            "",
            *describe(description),
            "",
        ]
    )
