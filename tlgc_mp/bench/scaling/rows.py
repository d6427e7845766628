"""Measurements of one strategy -> its row of ``scaling.json``.

A row is one strategy on one network at one number of ranks; ``null`` stands for what could not be measured. Of what
differs between ranks, the busiest rank's counts, which is the one with the most CPU seconds a step, unless the table
says otherwise.

    key                        unit       what
    strategy                              gc-2l, gc, naive-mp, pipeline, channel-parallel or zero3
    width, depth                          w and depth of the WideResNet
    groups                                N; 1 for the dense network
    tp                                    P, the ranks; for zero3 its replicas
    batch_size                 images     of a step, over all ranks
    dtype                                 fp32, or bf16: autocast over fp32 parameters
    momentum                              of SGD; 0.0 where it keeps none
    micro_batches                         of a step of pipeline, the fastest number tried; 1 for all others
    activation_checkpointing              whether residual units keep only their input for backward
    coarse_channels                       r of a two-level network; 1 for all others
    coarse_sum                            whether its representatives are summed
    micro_batch_seconds        s          number of micro-batches -> median step, of those tried in the first round
    median_step_seconds        s          over all samples
    images_per_second          images/s   at the median step
    samples                               a list of {round, step, seconds, busy_cpu_seconds}: of one timed step, the
                                          slowest rank's wall clock, and the CPU seconds of each rank's process, by rank
    busy_cpu_seconds           s          CPU seconds of a step, median over the samples of the busiest rank's
    flops_per_rank             FLOP       of a step: what the formulas of its convolutions and its head need, forward
                                          and backward; a multiplication and an addition are two
    busy_device_seconds        s          of a profiled step: in which the accelerator computed, collectives
                                          excepted; null on the CPU
    achieved_flops_per_second  FLOP/s     flops_per_rank over the median step; over busy_cpu_seconds where a rank does
                                          not have a core to itself, or idles by design (naive-mp; on an accelerator
                                          over busy_device_seconds)
    best_flops_per_second      FLOP/s     the fastest dense 3x3 convolution, forward and backward, on a core (or an
                                          accelerator) in this run while all do the same
    achieved_share                        the first of these two over the second
    collective_seconds         s          of a step, in collectives, sends and receives, waiting for other ranks
                                          included; measured in steps of their own, as are the next five
    collective_bytes           bytes      of a step; of each message the larger of what went in and what came out
    network_bytes              bytes      of a step, that the host sent to others; all its ranks and processes count
    collectives                           kind -> {calls, seconds, bytes}
    accounting                 s          kind of work -> seconds of a profiled step, which they add up to
    coarse_seconds             s          of these, gathers and reduce-scatters of the coarse level, or its sums and
                                          that of the logits
    activation_bytes           bytes      the most kept for backward; as the next four, of the rank of largest peak
    parameter_bytes            bytes
    gradient_bytes             bytes
    optimizer_bytes            bytes      momentum, and the copies of its parameters that ZeRO keeps
    peak_memory_bytes          bytes      of the process; on an accelerator, of its tensors
    hours_for_200_epochs       h          of 50000 images each, at images_per_second
    note                                  what is particular, null for nothing
    error                                 why there are no figures, or not of every round; null where there are
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypedDict

from tlgc_mp.bench.settings import Case, StepFigures

EPOCHS = 200
IMAGES_AN_EPOCH = 50_000
MOMENTUM = 0.9


class Sample(TypedDict):
    """Of one timed step: the slowest rank's wall clock, and CPU seconds by rank."""

    round: int
    step: int
    seconds: float
    busy_cpu_seconds: list[float]


Row: TypeAlias = dict[str, Any]
"""This module's docstring says what its keys are; what was not measured is ``None``."""


@dataclass
class Record:
    """All that was measured of a case.

    Attributes:
        measurements: (round, what each rank measured), of the number of micro-batches that is kept.
        micro_batch_seconds: number of micro-batches -> median step, of those tried.
    """

    case: Case
    momentum: bool
    update_in_backward: bool = False
    note: str | None = None
    error: str | None = None
    out_of_memory: bool = False
    micro_batches: int | None = None
    micro_batch_seconds: dict[int, float] = field(default_factory=dict)
    measurements: list[tuple[int, list[StepFigures]]] = field(default_factory=list)


def step_samples(round_index: int, ranks: list[StepFigures]) -> list[Sample]:
    """One sample a timed step of a measurement."""
    return [
        {
            "round": round_index,
            "step": step,
            "seconds": max(rank["seconds"][step] for rank in ranks),
            "busy_cpu_seconds": [rank["busy_cpu_seconds"][step] for rank in ranks],
        }
        for step in range(len(ranks[0]["seconds"]))
    ]


def median_seconds(ranks: list[StepFigures]) -> float:
    """Of the timed steps of one measurement."""
    return statistics.median(sample["seconds"] for sample in step_samples(0, ranks))


def make_row(record: Record, dtype: str, best_flops_per_second: float | None, cores: int) -> Row:
    """The row of ``record``; this module's docstring says what its keys are.

    Args:
        cores: of the machine, among which the ranks share.
    """
    case = record.case
    row: Row = {
        "strategy": case.strategy,
        "width": case.width,
        "depth": case.depth,
        "groups": case.groups,
        "tp": case.ranks,
        "batch_size": case.batch_size,
        "dtype": dtype,
        "momentum": MOMENTUM if record.momentum else 0.0,
        "micro_batches": record.micro_batches or case.micro_batches[0],
        "activation_checkpointing": case.activation_checkpointing,
        "coarse_channels": case.coarse_channels,
        "coarse_sum": case.coarse_sum,
        "micro_batch_seconds": {str(count): seconds for count, seconds in record.micro_batch_seconds.items()},
        "samples": [],
        "note": record.note,
        "error": record.error,
    }
    if not record.measurements:
        return {**row, **dict.fromkeys(_MEASURED)}
    samples = [sample for index, ranks in record.measurements for sample in step_samples(index, ranks)]
    last = record.measurements[-1][1]
    by_rank = [statistics.median(s["busy_cpu_seconds"][rank] for s in samples) for rank in range(case.ranks)]
    busiest = max(range(case.ranks), key=by_rank.__getitem__)
    median = statistics.median(sample["seconds"] for sample in samples)
    busy = statistics.median(max(sample["busy_cpu_seconds"]) for sample in samples)
    busy_device = last[busiest]["busy_device_seconds"]
    if busy_device is not None:
        worked = busy_device if case.strategy == "naive-mp" else median
    else:
        worked = busy if case.strategy == "naive-mp" or case.ranks > cores else median
    achieved = last[busiest]["flops"] / worked
    largest = max((r for _, ranks in record.measurements for r in ranks), key=lambda r: r["peak_memory_bytes"])
    seconds_an_image = median / case.batch_size

    def over_rounds(key: Literal["collective_seconds", "coarse_seconds"]) -> float:
        return statistics.median(ranks[busiest][key] for _, ranks in record.measurements)

    return {
        **row,
        "samples": samples,
        "median_step_seconds": median,
        "images_per_second": 1 / seconds_an_image,
        "busy_cpu_seconds": busy,
        "busy_device_seconds": busy_device,
        "flops_per_rank": last[busiest]["flops"],
        "achieved_flops_per_second": achieved,
        "best_flops_per_second": best_flops_per_second,
        "achieved_share": achieved / best_flops_per_second if best_flops_per_second else None,
        "collective_seconds": over_rounds("collective_seconds"),
        "collective_bytes": last[busiest]["collective_bytes"],
        "network_bytes": last[busiest]["network_bytes"],
        "collectives": last[busiest]["collectives"],
        "accounting": last[busiest]["accounting"],
        "coarse_seconds": over_rounds("coarse_seconds"),
        "activation_bytes": largest["activation_bytes"],
        "parameter_bytes": largest["parameter_bytes"],
        "gradient_bytes": largest["gradient_bytes"],
        "optimizer_bytes": largest["optimizer_bytes"],
        "peak_memory_bytes": largest["peak_memory_bytes"],
        "hours_for_200_epochs": EPOCHS * IMAGES_AN_EPOCH * seconds_an_image / 3600,
    }


_MEASURED = (
    "median_step_seconds",
    "images_per_second",
    "busy_cpu_seconds",
    "busy_device_seconds",
    "flops_per_rank",
    "achieved_flops_per_second",
    "best_flops_per_second",
    "achieved_share",
    "collective_seconds",
    "collective_bytes",
    "network_bytes",
    "collectives",
    "accounting",
    "coarse_seconds",
    *("activation_bytes", "parameter_bytes", "gradient_bytes", "optimizer_bytes", "peak_memory_bytes"),
    "hours_for_200_epochs",
)
