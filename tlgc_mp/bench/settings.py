"""What ``tlgc-mp bench scaling`` is to measure, checked before anything starts. Loads no torch."""

from __future__ import annotations

import os
import time
from argparse import Namespace
from dataclasses import dataclass
from typing import ClassVar, TypedDict

from tlgc_mp.bench.ranks.launch import Request
from tlgc_mp.errors import UsageError, check_representatives, divisors, must_be, one_of
from tlgc_mp.models.names import check_model, check_split

STRATEGIES: dict[str, str] = {
    "gc-2l": "gc-2l",
    "gc": "gc",
    "shuffle": "shuffle",
    "bgc": "bgc",
    "naive-mp": "sc",
    "pipeline": "sc",
    "channel-parallel": "sc",
    "zero3": "sc",
    "gc-2l-overlapped": "gc-2l",
    "gc-2l-fused": "gc-2l",
    "gc-2l-dense": "gc-2l",
}
"""Name of a strategy -> the convolution of the network that it trains.

gc-2l: two-level group convolution. gc-2l-overlapped, gc-2l-fused, gc-2l-dense: the same with every layer in that coarse
mode, where gc-2l leaves each its own; the last on one rank only. gc: group convolution. shuffle: group convolution, its
output channels shuffled over all ranks. bgc: balanced group convolution. naive-mp: the dense network split by layers,
one rank busy at a time; on one rank it is the dense network on one device. pipeline: the same with micro-batches.
channel-parallel: the dense network, input channels gathered and output channels split. zero3: the dense network,
data-parallel, parameters split (ZeRO stage 3).
"""

CHECKPOINTED = tuple(name for name, conv in STRATEGIES.items() if conv != "sc" or name == "channel-parallel")
"""Strategies that activation checkpointing applies to."""

QUICK_STRATEGIES = tuple(name for name in STRATEGIES if not name.startswith("gc-2l-"))

DTYPES = ("fp32", "bf16")
MICRO_BATCHES = (2, 4, 8)
IMAGE_SIZE = 32
LARGEST_COUNT = 1_000_000
LARGEST_RANKS = 256
NUM_CLASSES = 10

WARM_UP_STEPS = 2
"""The first allocates, the second finds what the first has freed."""

INSTRUMENTED_STEPS = 2
"""After the timed ones."""


@dataclass(frozen=True)
class Case:
    """One strategy on one network and one number of ranks.

    Attributes:
        groups: N; 1 for the dense network.
        ranks: P, or the number of replicas of ``zero3``.
        batch_size: images a step, over all ranks.
        micro_batches: numbers of micro-batches to choose from; ``(1,)`` for all but ``pipeline``.
        activation_checkpointing: whether residual units keep only their input for backward.
        coarse_channels, coarse_sum: r of a two-level network, and whether its representatives are summed.
    """

    strategy: str
    depth: int
    width: int
    groups: int
    ranks: int
    batch_size: int
    micro_batches: tuple[int, ...] = (1,)
    activation_checkpointing: bool = False
    coarse_channels: int = 1
    coarse_sum: bool = False

    @property
    def conv(self) -> str:
        """The convolution of the network."""
        return STRATEGIES[self.strategy]

    def steps(self, *, dtype: str, momentum: bool, update_in_backward: bool, micro_batches: int, steps: int) -> Steps:
        """What is asked of the ranks to measure this case; the arguments are what it leaves open."""
        return Steps(
            strategy=self.strategy,
            depth=self.depth,
            width=self.width,
            groups=self.groups,
            batch_size=self.batch_size,
            activation_checkpointing=self.activation_checkpointing,
            coarse_channels=self.coarse_channels,
            coarse_sum=self.coarse_sum,
            dtype=dtype,
            momentum=momentum,
            update_in_backward=update_in_backward,
            micro_batches=micro_batches,
            steps=steps,
        )


class Calls(TypedDict):
    """Of one kind of collective in a step."""

    calls: int
    seconds: float
    bytes: int


class Memory(TypedDict):
    """Of a rank, in bytes, as the optimizer is about to step."""

    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int


class InstrumentedFigures(Memory):
    """What meters that would slow the timed steps find: ``accounting`` and ``collectives`` by kind,
    ``busy_device_seconds`` of a step (``None`` on the CPU)."""

    accounting: dict[str, float]
    busy_device_seconds: float | None
    collectives: dict[str, Calls]
    collective_seconds: float
    collective_bytes: float
    coarse_seconds: float
    activation_bytes: int


class StepFigures(InstrumentedFigures):
    """What a training step costs a rank: ``seconds`` and ``busy_cpu_seconds`` of each timed step, ``network_bytes``
    that its host sent in one."""

    seconds: list[float]
    busy_cpu_seconds: list[float]
    network_bytes: float
    flops: int
    peak_memory_bytes: int


class CoreFigures(TypedDict):
    """The best rate of a rank, and the name and the free memory of its accelerator, where it has one."""

    best_flops_per_second: float
    device: str | None
    device_memory_bytes: int | None


@dataclass(frozen=True)
class Steps(Request[StepFigures]):
    """Training steps of a case.

    Attributes:
        dtype: fp32, or bf16 for autocast.
        momentum: whether SGD keeps any.
        update_in_backward: whether each parameter is stepped as soon as its gradient is there (naive-mp only).
        micro_batches: of ``pipeline``; 1 of others.
        steps: how many are timed.
    """

    measured_by: ClassVar[str] = "tlgc_mp.bench.scaling.rank:measure_steps"
    strategy: str
    depth: int
    width: int
    groups: int
    batch_size: int
    activation_checkpointing: bool
    coarse_channels: int
    coarse_sum: bool
    dtype: str
    momentum: bool
    update_in_backward: bool
    micro_batches: int
    steps: int


@dataclass(frozen=True)
class CoreRate(Request[CoreFigures]):
    """The best rate of a dense 3x3 convolution."""

    measured_by: ClassVar[str] = "tlgc_mp.bench.scaling.rank:measure_core_rate"
    dtype: str


@dataclass(frozen=True)
class BenchSettings:
    """A run of the benchmark, every choice made.

    Attributes:
        cases: what to measure, in the order of a round.
        rounds: how often to go through the cases.
        steps: timed steps of each measurement, after one to warm up.
        momentum: whether SGD keeps momentum, where there is memory for it.
        output: the folder of what is written.
        time_limit: seconds after which a measurement is given up.
        hosts: on which the ranks run, through ssh; this machine where empty.
    """

    cases: tuple[Case, ...]
    rounds: int
    steps: int
    dtype: str
    momentum: bool
    output: str
    time_limit: float
    hosts: tuple[str, ...] = ()


def resolve(options: Namespace) -> BenchSettings:
    """Turns parsed command-line ``options`` into a complete run.

    Raises:
        UsageError: an option that cannot work, or two that do not fit together.
    """
    quick = options.quick
    check_counts({"--rounds": options.rounds, "--steps": options.steps})
    for count in options.micro_batches or ():
        check_counts({"--micro-batches": count})
    check_time_limit(options.time_limit)
    if options.dtype not in DTYPES:
        raise must_be("--dtype", one_of(DTYPES), options.dtype)
    widths = options.widths or ([10] if quick else [40, 60, 80])
    batch_sizes = _batch_sizes(options.batch_sizes, widths)
    names = options.strategies or (list(QUICK_STRATEGIES) if quick else ["gc-2l", "naive-mp"])
    depth = 28 if options.depth is None else options.depth
    cases: dict[Case, None] = {}
    for width, batch_size in zip(widths, batch_sizes, strict=True):
        for name in names:
            strategy, ranks = parse_strategy(name, options.tp or [2])
            for count in ranks:
                case = make_case(strategy, depth, width, count, batch_size, options)
                cases[case] = None
    if (options.coarse_channels != 1 or options.coarse_sum) and not any(case.conv == "gc-2l" for case in cases):
        raise UsageError(
            "--coarse-channels and --coarse-sum must be left out without a strategy gc-2l, got "
            f"{' '.join(names)}; add gc-2l"
        )
    hosts = tuple(options.hosts or ())
    for case in cases:
        if hosts and case.ranks % len(hosts):
            raise UsageError(
                f"--hosts must share the {case.ranks} ranks of {case.strategy} evenly, got {len(hosts)} hosts; "
                f"use {one_of(divisors(case.ranks))} of them, or another --tp"
            )
    return BenchSettings(
        cases=tuple(cases),
        rounds=options.rounds or (1 if quick else 2),
        steps=options.steps or (1 if quick else 2),
        dtype=options.dtype,
        momentum=not options.no_momentum,
        output=output_folder(options.output, time.strftime("scaling-%Y%m%d-%H%M%S")),
        time_limit=options.time_limit,
        hosts=hosts,
    )


def _batch_sizes(given: list[int] | None, widths: list[int]) -> list[int]:
    if given is None:
        return [8 if width <= 40 else 4 if width <= 60 else 2 for width in widths]
    for batch_size in given:
        check_counts({"--batch-sizes": batch_size})
    if len(given) not in (1, len(widths)):
        raise UsageError(f"--batch-sizes must be one for all {len(widths)} widths, or one for each, got {len(given)}")
    return given * len(widths) if len(given) == 1 else given


def parse_strategy(name: str, ranks: list[int]) -> tuple[str, list[int]]:
    """``"gc-2l@4"`` -> its name and the numbers of ranks at which it runs: 4, or ``ranks`` where it names none."""
    strategy, at, count = name.partition("@")
    if strategy not in STRATEGIES:
        raise must_be("--strategies", f"{one_of(STRATEGIES)}, each with or without @P", name)
    if not at:
        return strategy, ranks
    if not count.isdecimal() or len(count) > 9 or int(count) < 1:
        raise must_be("--strategies", "NAME or NAME@P, with P a number of ranks", name, f"use e.g. {strategy}@2")
    return strategy, [int(count)]


def make_case(strategy: str, depth: int, width: int, ranks: int, batch_size: int, options: Namespace) -> Case:
    """A case that can be measured; ``options`` have its ``groups``, ``micro_batches``, ``activation_checkpointing``,
    ``coarse_channels`` and ``coarse_sum``.

    Raises:
        UsageError: it cannot.
    """
    conv = STRATEGIES[strategy]
    check_ranks("--tp", ranks)
    check_representatives(options.coarse_channels, options.coarse_sum)
    if conv == "sc" and ranks == 1 and strategy != "naive-mp":
        raise must_be("--tp", f"2 or more for {strategy}", ranks, f"use {strategy}@2, or leave it out")
    if strategy == "gc-2l-dense" and ranks > 1:
        raise must_be(
            "--tp",
            f"1 for {strategy}, which holds all groups on one rank",
            ranks,
            f"use {strategy}@1, or leave it out",
        )
    groups = 1 if conv == "sc" else ranks if options.groups is None else options.groups
    model = f"wrn-{depth}-{width}"
    check_model(model, conv, groups)
    if strategy == "channel-parallel" or conv != "sc":
        check_split(model, conv, groups, ranks)
    units = (depth - 4) // 2
    if strategy in ("naive-mp", "pipeline") and ranks > units:
        least = 1 if strategy == "naive-mp" else 2
        raise must_be("--tp", f"{least} to {units} for {strategy}, the number of residual units of {model}", ranks)
    if strategy == "zero3" and batch_size % ranks:
        raise must_be("--batch-sizes", f"a multiple of {ranks}, the replicas of zero3, at width {width}", batch_size)
    micro_batches: tuple[int, ...] = (1,)
    if strategy == "pipeline":
        micro_batches = tuple(m for m in options.micro_batches or MICRO_BATCHES if batch_size % m == 0)
        if not micro_batches:
            tried = " ".join(str(m) for m in options.micro_batches or MICRO_BATCHES)
            raise UsageError(
                f"--micro-batches must hold a divisor of the batch of {batch_size} at width {width}, got {tried}; "
                f"use {one_of(divisors(batch_size))}"
            )
    checkpointed = options.activation_checkpointing and strategy in CHECKPOINTED
    dial = (options.coarse_channels, options.coarse_sum) if conv == "gc-2l" else ()
    return Case(strategy, depth, width, groups, ranks, batch_size, micro_batches, checkpointed, *dial)


def check_counts(flags: dict[str, int | None]) -> None:
    """Raises :class:`UsageError` for a flag whose value is below 1, or beyond what anyone measures."""
    for flag, value in flags.items():
        if value is not None and value < 1:
            raise must_be(flag, "1 or more", value)
        if value is not None and value > LARGEST_COUNT:
            raise must_be(flag, f"{LARGEST_COUNT} or less", value)


def check_ranks(flag: str, ranks: int) -> None:
    """Raises :class:`UsageError` unless this machine can be asked to start so many processes."""
    if not 1 <= ranks <= LARGEST_RANKS:
        raise must_be(flag, f"1 to {LARGEST_RANKS} ranks", ranks)


def check_time_limit(seconds: float) -> None:
    """Raises :class:`UsageError` unless ``seconds`` is a time to wait."""
    if not 0 < seconds < float("inf"):
        raise must_be("--time-limit", "a positive number of seconds", seconds, "use e.g. 1800")


def output_folder(given: str | None, default: str) -> str:
    """The folder of what is written, made where it is missing: ``given``, or ``default`` in the folder of all runs.

    Raises:
        UsageError: it cannot be made, or not be written.
    """
    path = given or os.path.join("runs", default)
    try:
        os.makedirs(path, exist_ok=True)
    except (OSError, ValueError) as error:  # a ValueError is no path at all
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--output must be a folder that can be made, got {path!r}: {reason}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise must_be("--output", "a folder in which you may write", path)
    return path
