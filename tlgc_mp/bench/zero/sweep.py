"""The benchmark ``tlgc-mp bench zero``: memory of a rank at each ZeRO stage, measured, beside what the stage promises.

P tensor-parallel ranks share the groups of GC-2L, and ZeRO splits over D replicas what each of them holds: SGD with
momentum, float32. All is measured in one launch, each stage as DeepSpeed comes and with its buffers bounded.

    DIR/zero.json   {"run": machine, versions, git commit, date and command; "rows": see :func:`make_rows`}
    DIR/zero.md     the rows as a table, and what to read in it
"""

from __future__ import annotations

import json
import os
import time
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, TypeAlias, TypedDict

from tlgc_mp.bench.ranks import launch
from tlgc_mp.bench.report import describe, table
from tlgc_mp.bench.settings import check_counts, check_ranks, check_time_limit, output_folder
from tlgc_mp.errors import must_be
from tlgc_mp.host import Provenance, describe_run, replace_file
from tlgc_mp.models.names import check_model, check_split

STAGES = (0, 1, 2, 3)
OWN, BOUNDED = "DeepSpeed's own", "bounded"
BYTES = 4  # of a float32

Held: TypeAlias = dict[str, int]
"""Bytes by kind, as :func:`tlgc_mp.engine.memory.engine_memory` has them."""


class Moments(TypedDict):
    """What a rank holds: the most as each gradient arrived, after backward, and as the optimizer was about to step."""

    in_backward: Held
    after_backward: Held
    at_step: Held


class Setting(TypedDict):
    """A stage, the name of its settings, these, and the parameters of a rank."""

    stage: int
    settings: str
    zero_optimization: dict[str, int]
    parameters: int


class Case(Setting, Moments):
    """What a rank measures of a stage and its settings."""


class Cases(TypedDict):
    """What a rank measures."""

    cases: list[Case]


class Row(Setting, Moments):
    """A stage and its settings: what was promised, and of the rank with the most of each kind, what it held."""

    promised: dict[str, float]


@dataclass(frozen=True)
class ZeroSettings:
    """A run of the benchmark, every choice made.

    Attributes:
        groups: N.
        tensor_parallel: P.
        replicas: D.
        batch_size: images a step, over all replicas.
        output: the folder of what is written.
        time_limit: seconds after which it is given up.
    """

    model: str
    groups: int
    tensor_parallel: int
    replicas: int
    batch_size: int
    output: str
    time_limit: float


def resolve(options: Namespace) -> ZeroSettings:
    """Turns parsed command-line ``options`` into a complete run.

    Raises:
        UsageError: an option that cannot work, or two that do not fit together.
    """
    check_ranks("--tp", options.tp)
    check_ranks("--replicas", options.replicas)
    check_ranks("--tp x --replicas", options.tp * options.replicas)
    check_counts({"--batch-size": options.batch_size})
    check_time_limit(options.time_limit)
    model = options.model or ("wrn-16-4" if options.quick else "wrn-28-10")
    groups = 4 if options.groups is None else options.groups
    check_model(model, "gc-2l", groups)
    check_split(model, "gc-2l", groups, options.tp)
    batch_size = 2 * options.replicas if options.batch_size is None else options.batch_size
    if batch_size % options.replicas:
        raise must_be("--batch-size", f"a multiple of {options.replicas}, the replicas", batch_size)
    folder = output_folder(options.output, time.strftime("zero-%Y%m%d-%H%M%S"))
    return ZeroSettings(model, groups, options.tp, options.replicas, batch_size, folder, options.time_limit)


def bounds(parameters: int) -> dict[str, int]:
    """Settings of ZeRO that bound what it holds beyond its promise to a few times ``parameters``."""
    return {
        "reduce_bucket_size": parameters,
        "allgather_bucket_size": parameters,
        "sub_group_size": parameters,
        "stage3_max_live_parameters": parameters,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_param_persistence_threshold": 0,
    }


def promise(stage: int, parameters: int, replicas: int) -> dict[str, float]:
    """Bytes of ``parameter_bytes``, ``gradient_bytes`` and ``state_bytes`` a rank that a ZeRO stage promises.

    Args:
        parameters: that the rank holds of the model split over tensor-parallel ranks, all trained.
        replicas: D.
    """
    whole = float(BYTES * parameters)
    return {
        "parameter_bytes": whole / replicas if stage >= 3 else whole,
        "gradient_bytes": whole / replicas if stage >= 2 else whole,
        "state_bytes": whole / replicas if stage >= 1 else whole,
    }


@dataclass(frozen=True)
class TrainingEngine(launch.Request[launch.T]):
    """An engine that trains ``model`` over P = ``tensor_parallel`` ranks a replica."""

    model: str
    groups: int
    tensor_parallel: int
    batch_size: int


@dataclass(frozen=True)
class ZeroMemory(TrainingEngine[Cases]):
    """The memory of each ZeRO stage."""

    measured_by: ClassVar[str] = "tlgc_mp.bench.zero.rank:measure_rank"


def run(settings: ZeroSettings) -> int:
    """Measures, writes the files, and says how it goes; the exit status: 1 if it could not be measured."""
    description = describe_run()
    request = ZeroMemory(settings.model, settings.groups, settings.tensor_parallel, settings.batch_size)
    outcome = launch.measure(request, settings.tensor_parallel * settings.replicas, settings.time_limit)
    if outcome.error is not None:
        print(f"zero  {outcome.error}", flush=True)
        return 1
    rows = make_rows(settings, outcome.ranks)
    text = markdown(settings, rows, description)
    found = json.dumps({"run": description, "rows": rows}, indent=1) + "\n"
    for name, content in (("zero.json", found), ("zero.md", text)):
        replace_file(os.path.join(settings.output, name), content)
    for row in rows:
        held = ", ".join(f"{kind[:-6]} {row['after_backward'][kind] / 1e6:.2f}" for kind in row["promised"])
        print(f"ZeRO {row['stage']}  {row['settings']}  MB after backward: {held}", flush=True)
    print(f"Wrote zero.json and zero.md to {settings.output}", flush=True)
    return 0


def make_rows(settings: ZeroSettings, ranks: list[Cases]) -> list[Row]:
    """One row a stage and its settings."""
    rows = []
    for index, case in enumerate(ranks[0]["cases"]):
        measured = [rank["cases"][index] for rank in ranks]
        rows.append(
            Row(
                stage=case["stage"],
                settings=case["settings"],
                zero_optimization=case["zero_optimization"],
                parameters=case["parameters"],
                promised=promise(case["stage"], case["parameters"], settings.replicas),
                in_backward=_most(rank["in_backward"] for rank in measured),
                after_backward=_most(rank["after_backward"] for rank in measured),
                at_step=_most(rank["at_step"] for rank in measured),
            )
        )
    return rows


def _most(ranks: Iterable[Held]) -> Held:
    """Of each kind, of the rank that holds the most of it."""
    held = list(ranks)
    return {kind: max(each[kind] for each in held) for kind in held[0]}


_HEAD = (
    "stage",
    "settings",
    "parameters, promised",
    "held",
    "optimizer state, promised",
    "held",
    "gradients, promised",
    "held after backward",
    "as the optimizer steps",
    "most in backward",
    "ZeRO's copy",
    "buckets",
    "other",
    "parameters, most in backward",
)

_READING = """\
Promised, for M parameters of a tensor-parallel rank in float32: 4 M bytes each for parameters, gradients and momentum;
at stage 1 momentum, at stage 2 gradients too, at stage 3 parameters too are divided by D. Held: the storages of the
tensors that the engine holds, each counted once. Parameters and optimizer state are as they are after backward. Buckets
and other: the most at any of the moments. *Bounded* sets every size below to that of the rank's largest parameter
(`zero.json` has the numbers) and the persistence threshold to 0.

What DeepSpeed holds beyond the promise, and what removes it:

- **ZeRO's copy**: at stages 1 to 3 the optimizer steps a copy of the partition, in float32, which is made even where
  the parameters are float32 themselves: 4 M / D more. At stage 3 DeepSpeed means to do without it there, but compares a
  device with the name of a device, which are never equal. No setting removes it.
- **Gradients of a parameter across a border**: at stages 1 and 2 partitions are cut anywhere, and the gradient of a
  parameter that lies in two of them is held whole in both after backward. The optimizer steps exactly the partition's,
  copied out of these, which are then let go. The excess is at most one parameter at each end of a partition. No setting
  removes it; its share falls as layers become more.
- **Gradients in backward**: at stage 1 all, as promised, and afterwards only the partition's. At stages 2 and 3 a
  gradient arrives whole and lies in a bucket until it is reduced.
- **Buckets**: `reduce_bucket_size` parameters, 500 million where nothing is said: 2 GB, held in backward at stages 1
  and 2, and always at stage 3. On the CPU what is never touched takes no memory; on an accelerator all of it does.
- **Small parameters at stage 3** stay whole beside their partition from one step to the next, where they have up to
  `stage3_param_persistence_threshold` elements: 100,000 where nothing is said. With 0 none does.
- **Parameters in backward at stage 3**: whole ones that layers need now or soon:
  `stage3_max_live_parameters`, `stage3_prefetch_bucket_size`, `stage3_max_reuse_distance`.
- **Gradients as the optimizer steps, at stage 3**: those of one sub-group are copied: `sub_group_size`, a billion where
  nothing is said."""


def markdown(settings: ZeroSettings, rows: list[Row], description: Provenance) -> str:
    """The rows as a table, in MB, with where they come from and how to read them."""
    return "\n".join(
        [
            "# Memory under ZeRO, beside tensor parallelism",
            "",
            f"{settings.model}, GC-2L, N = {settings.groups}, P x D = {settings.tensor_parallel} x "
            f"{settings.replicas}, {settings.batch_size} images a step, SGD with momentum, float32. "
            f"M = {rows[0]['parameters']:,} parameters a tensor-parallel rank. MB, of the rank that holds the most.",
            "",
            *table(_HEAD, [_line(row) for row in rows]),
            "",
            *describe(description),
            "",
            _READING,
            "",
        ]
    )


def _line(row: Row) -> list[str]:
    promised, backward, after, step = row["promised"], row["in_backward"], row["after_backward"], row["at_step"]
    figures = (
        promised["parameter_bytes"],
        after["parameter_bytes"],
        promised["state_bytes"],
        after["state_bytes"],
        promised["gradient_bytes"],
        after["gradient_bytes"],
        step["gradient_bytes"],
        backward["gradient_bytes"],
        after["master_bytes"],
        *(max(moment[kind] for moment in (backward, after, step)) for kind in ("bucket_bytes", "other_bytes")),
        backward["parameter_bytes"],
    )
    return [str(row["stage"]), row["settings"] if row["stage"] else "", *(f"{figure / 1e6:.2f}" for figure in figures)]
