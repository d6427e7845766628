"""The benchmark ``tlgc-mp bench bandwidth``: a training step of several strategies against the bandwidth between hosts.

Half of the ranks run on each of two hosts that :mod:`tlgc_mp.bench.ranks.link` makes on this machine. A round goes
through all bandwidths and all strategies. What a run finds measured in its folder it does not measure again.

    DIR/bandwidth.json   {"run": machine, versions, git commit, date and command; "settings": what is measured; "rows":
                         one a strategy and bandwidth, see :class:`Row`}
    DIR/bandwidth.md     the rows as a table
    DIR/bandwidth.png, DIR/bandwidth.svg    the step against the bandwidth
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field

from tlgc_mp.bench.ranks import launch
from tlgc_mp.bench.ranks.link import UNLIMITED, Cable, bits_per_second, cable
from tlgc_mp.bench.report import describe, table
from tlgc_mp.bench.settings import (
    INSTRUMENTED_STEPS,
    WARM_UP_STEPS,
    Case,
    check_counts,
    check_time_limit,
    make_case,
    output_folder,
    parse_strategy,
)
from tlgc_mp.errors import must_be
from tlgc_mp.figures import COLORS, caption, machine_of, pyplot, rounded, save
from tlgc_mp.host import Machine, Provenance, describe_run, replace_file

STRATEGIES = ("gc-2l", "gc", "channel-parallel", "naive-mp", "zero3")
RATES = (UNLIMITED, "1gbit", "100mbit", "20mbit")
HOSTS = 2
NAME = "bandwidth.json"


@dataclass(frozen=True)
class BandwidthSettings:
    """A run of the benchmark, every choice made.

    Attributes:
        rates: bandwidths in the words of :func:`tlgc_mp.bench.ranks.link.bits_per_second`, unlimited first.
        rounds: how often to go through them.
        steps: timed steps of a measurement, after those to warm up.
        output: the folder of what is written.
        time_limit: seconds that a measurement may take; one that is known to take longer is left out.
    """

    cases: tuple[Case, ...]
    rates: tuple[str, ...]
    rounds: int
    steps: int
    output: str
    time_limit: float

    def measured(self) -> dict[str, object]:
        """What two runs must have in common for one to go on with the other."""
        return {"cases": [dataclasses.asdict(case) for case in self.cases], "rates": self.rates, "steps": self.steps}


@dataclass
class Row:
    """A strategy at a bandwidth.

    Attributes:
        seconds: of each timed step, the slowest rank's wall clock, by round.
        network_bytes: that the host that sends most sends in a step, headers included, where nothing is limited and so
            nothing is sent twice.
        coarse_seconds: of a step, in which a rank issued the coarse level's collectives or waited for them, by round.
        missing: why there is nothing.
    """

    strategy: str
    rate: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    network_bytes: float = 0.0
    coarse_seconds: dict[str, float] = field(default_factory=dict)
    missing: str | None = None

    @property
    def median(self) -> float | None:
        """Of all timed steps."""
        samples = [seconds for each in self.seconds.values() for seconds in each]
        return statistics.median(samples) if samples else None

    @property
    def on_the_way(self) -> float:
        """Seconds that the bytes of a step take at the bandwidth."""
        bits = bits_per_second(self.rate)
        return 0.0 if bits is None else 8 * self.network_bytes / bits


def resolve(options: Namespace) -> BandwidthSettings:
    """Turns parsed command-line ``options`` into a complete run.

    Raises:
        UsageError: an option that cannot work, or two that do not fit together.
    """
    quick = options.quick
    check_counts({"--rounds": options.rounds, "--steps": options.steps, "--batch-size": options.batch_size})
    check_time_limit(options.time_limit)
    rates = options.rates or ([UNLIMITED, "20mbit"] if quick else RATES)
    for rate in rates:
        bits_per_second(rate)
    width = (1 if quick else 4) if options.width is None else options.width
    cases: dict[Case, None] = {}
    for name in options.strategies or STRATEGIES:
        strategy, counts = parse_strategy(name, [HOSTS])
        for ranks in counts:
            if ranks % HOSTS:
                raise must_be(
                    "--strategies", "at an even number of ranks, for two hosts", name, f"use e.g. {strategy}@{HOSTS}"
                )
            cases[make_case(strategy, options.depth, width, ranks, options.batch_size, options)] = None
    return BandwidthSettings(
        cases=tuple(cases),
        rates=tuple(dict.fromkeys([UNLIMITED, *rates])),
        rounds=1 if quick else options.rounds,
        steps=1 if quick else options.steps,
        output=output_folder(options.output, time.strftime("bandwidth-%Y%m%d-%H%M%S")),
        time_limit=options.time_limit,
    )


def run(settings: BandwidthSettings) -> int:
    """Measures, writes the files, and says how it goes; the exit status: 1 if a measurement failed."""
    rows, failed = _found(settings), False
    with cable() as joined:
        for round_index in range(settings.rounds):
            for row, case in _of_a_round(rows, settings):
                if str(round_index) in row.seconds or row.missing is not None:
                    continue
                failed |= not _measure(row, case, round_index, joined, rows, settings)
                _write(rows, settings)
                result = row.missing or f"{statistics.median(row.seconds[str(round_index)]):.3f} s a step"
                print(f"round {round_index + 1}  {row.rate}  {row.strategy}  {result}", flush=True)
    _write(rows, settings)
    plot(rows, settings.cases[0], describe_run()["machine"], settings.output)
    print(f"Wrote {NAME}, bandwidth.md, bandwidth.png and bandwidth.svg to {settings.output}", flush=True)
    return int(failed)


def _of_a_round(rows: list[Row], settings: BandwidthSettings) -> Iterator[tuple[Row, Case]]:
    return zip(rows, list(settings.cases) * len(settings.rates), strict=True)


def _found(settings: BandwidthSettings) -> list[Row]:
    """The rows of the run that was begun in this folder, empty ones where none was."""
    path = os.path.join(settings.output, NAME)
    if not os.path.exists(path):
        return [Row(case.strategy, rate) for rate in settings.rates for case in settings.cases]
    with open(path, encoding="utf-8") as file:
        found = json.load(file)
    if found["settings"] != json.loads(json.dumps(settings.measured())):
        raise must_be(
            "--output",
            "a new folder, or one that holds a run with the same settings",
            settings.output,
            "use the same settings, or another folder",
        )
    return [Row(**{**row, "missing": None}) for row in found["rows"]]  # what failed is tried again


def _measure(
    row: Row, case: Case, round_index: int, joined: Cable, rows: list[Row], settings: BandwidthSettings
) -> bool:
    """Fills in a round of ``row``, or why there is none; whether nothing failed."""
    known = next(other for other in rows if (other.strategy, other.rate) == (row.strategy, UNLIMITED))
    row.network_bytes = known.network_bytes
    total = (WARM_UP_STEPS + settings.steps + INSTRUMENTED_STEPS) * row.on_the_way
    if total > settings.time_limit:
        row.missing = f"left out: {row.on_the_way:.0f} s a step for its {row.network_bytes / 1e6:.0f} MB alone"
        return True
    joined.limit(row.rate)
    request = case.steps(
        dtype="fp32", momentum=True, update_in_backward=False, micro_batches=case.micro_batches[0], steps=settings.steps
    )
    outcome = launch.measure(request, case.ranks, settings.time_limit, joined.places)
    if outcome.error is not None:
        row.missing = outcome.error
        return False
    by_step = zip(*(rank["seconds"] for rank in outcome.ranks), strict=True)
    row.seconds[str(round_index)] = [max(ranks) for ranks in by_step]
    if row is known:
        row.network_bytes = max(rank["network_bytes"] for rank in outcome.ranks)
    row.coarse_seconds[str(round_index)] = max(rank["coarse_seconds"] for rank in outcome.ranks)
    return True


def _write(rows: list[Row], settings: BandwidthSettings) -> None:
    description = describe_run()
    found = {"run": description, "settings": settings.measured(), "rows": [dataclasses.asdict(row) for row in rows]}
    replace_file(os.path.join(settings.output, NAME), json.dumps(found, indent=1) + "\n")
    replace_file(os.path.join(settings.output, "bandwidth.md"), markdown(rows, settings.cases[0], description))


_HEAD = (
    "bandwidth",
    "strategy",
    "step, s",
    "longer than unlimited, s",
    "MB sent",
    "s on the way",
    "s in the coarse level",
)

_READING = """\
MB sent: by a host in a step, headers included, without a limit. On the way: what these take at the bandwidth. What a
step is longer by is less where they travel under the computation. In the coarse level: a rank issues its collectives,
or waits for them."""


def markdown(rows: list[Row], case: Case, description: Provenance) -> str:
    """The rows as a table, with where they come from and how to read them."""
    lines = [_line(row, rows) for row in rows]
    return "\n".join(
        [
            "# A step against bandwidth",
            "",
            f"WRN-{case.depth}-{case.width}, {case.batch_size} images a step, SGD with momentum, float32, "
            f"{HOSTS} hosts. Seconds of the slowest rank, medians over {len(rows[0].seconds)} round(s).",
            "",
            *table(_HEAD, lines),
            "",
            _READING,
            "",
            *describe(description),
            "",
        ]
    )


def _line(row: Row, rows: list[Row]) -> list[str]:
    median, unlimited = row.median, next(other for other in rows if other.strategy == row.strategy).median
    if median is None or unlimited is None:
        return [row.rate, row.strategy, row.missing or "", *[""] * 4]
    coarse = statistics.median(row.coarse_seconds.values())
    limited = row.rate != UNLIMITED
    return [
        row.rate,
        row.strategy,
        f"{median:.3f}",
        f"{median - unlimited:.3f}" if limited else "",
        rounded(row.network_bytes / 1e6),
        f"{row.on_the_way:.3f}" if limited else "",
        f"{coarse:.3f}" if coarse else "",
    ]


def plot(rows: list[Row], case: Case, machine: Machine, folder: str) -> None:
    """Writes ``bandwidth.png`` and ``bandwidth.svg`` to ``folder``."""
    plt = pyplot()
    rates = list(dict.fromkeys(row.rate for row in rows))
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for index, strategy in enumerate(dict.fromkeys(row.strategy for row in rows)):
        line = [row for row in rows if row.strategy == strategy]
        axes.plot(
            [rates.index(row.rate) for row in line if row.median is not None],
            [row.median for row in line if row.median is not None],
            color=COLORS[index % len(COLORS)],
            marker="o",
            label=f"{strategy}, {rounded(line[0].network_bytes / 1e6)} MB",
        )
    axes.set_xticks(range(len(rates)), rates)
    axes.set_xlabel("bandwidth between two hosts")
    axes.set_ylabel("a step, s")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(title="strategy, and what a host sends in a step", fontsize="small", frameon=False)
    network = f"WRN-{case.depth}-{case.width}"
    caption(figure, network, machine_of(machine), f"batch {case.batch_size}", "fp32")
    save(figure, os.path.join(folder, "bandwidth"))
