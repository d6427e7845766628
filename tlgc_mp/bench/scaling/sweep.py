"""The benchmark ``tlgc-mp bench scaling``: rounds of measurements, and the files made from them.

A round goes through all cases once, each in processes of its own; rounds repeat (A B C, A B C), since machines drift.

    DIR/scaling.json    a list of rows, see :mod:`tlgc_mp.bench.scaling.rows`; written after each measurement
    DIR/run.json        machine, versions, git commit, date and command
    DIR/scaling.md      tables, beside the paper's Table 2
    DIR/scaling.png, DIR/scaling.svg    speed-up over naive model parallelism against w
    DIR/growth.png, DIR/growth.svg      time, memory and bytes of gc-2l against w, where several N = P were measured
"""

from __future__ import annotations

import json
import math
import os

from tlgc_mp.bench import report
from tlgc_mp.bench.ranks import launch
from tlgc_mp.bench.scaling import capacity
from tlgc_mp.bench.scaling.rows import Record, Row, make_row, median_seconds
from tlgc_mp.bench.settings import BenchSettings, Case, CoreRate, StepFigures
from tlgc_mp.host import describe_run, replace_file


def run(settings: BenchSettings) -> int:
    """Measures, writes the files, says how it goes; the exit status: 1 if a strategy failed other than for memory."""
    description = describe_run()
    cores_here = description["machine"]["cores"] * max(1, len(settings.hosts))  # hosts are taken to be alike
    _write_json(settings, "run.json", description)
    best: dict[int, float] = {}
    device_memory: int | None = None
    records: list[Record] = []
    rows: list[Row] = []
    for round_index in range(settings.rounds):
        for cores in sorted({min(case.ranks, cores_here) for case in settings.cases}):
            outcome = _on_hosts(CoreRate(settings.dtype), cores, settings)
            result = outcome.error
            if result is None:
                rate = max(rank["best_flops_per_second"] for rank in outcome.ranks)
                best[cores] = max(best.get(cores, 0.0), rate)
                description["machine"]["accelerator"] = outcome.ranks[0]["device"]
                device_memory = outcome.ranks[0]["device_memory_bytes"]
                result = f"{rate / 1e9:.1f} GFLOP/s each"
            print(f"round {round_index + 1}  core-rate  ranks={cores}  {result}", flush=True)
        _write_json(settings, "run.json", description)
        if not records:
            host_memory = _host_memory(settings)  # once, so that all cases of a width are decided alike
            records = [_plan(case, settings, host_memory, device_memory) for case in settings.cases]
        for record in records:
            if record.error is None:
                _measure(record, round_index, settings, device_memory)
                _say(record, round_index)
            rows = [_row(r, settings, best, cores_here) for r in records]
            _write_json(settings, "scaling.json", rows)
    report.write(rows, description, settings.output)
    print(f"Wrote scaling.json, scaling.md, scaling.png and scaling.svg to {settings.output}", flush=True)
    return int(any(record.error is not None and not record.out_of_memory for record in records))


def _row(record: Record, settings: BenchSettings, best: dict[int, float], cores: int) -> Row:
    return make_row(record, settings.dtype, best.get(min(record.case.ranks, cores)), cores)


def _on_hosts(request: launch.Request[launch.T], ranks: int, settings: BenchSettings) -> launch.Outcome[launch.T]:
    shared_folder = settings.output if settings.hosts else None
    return launch.measure(request, ranks, settings.time_limit, launch.places(settings.hosts), shared_folder)


def _host_memory(settings: BenchSettings) -> int:
    """What is free on this machine, and so on each of the hosts."""
    return capacity.available_bytes() * max(1, len(settings.hosts))


def _available(case: Case, host_memory: int, device_memory: int | None) -> int:
    """Memory for all ranks of ``case``: what is free on the hosts, or where each has an accelerator, on those."""
    return host_memory if device_memory is None else device_memory * case.ranks


def _plan(case: Case, settings: BenchSettings, host_memory: int, device_memory: int | None) -> Record:
    """With momentum, unless the dense network among the cases of its width has no room for it.

    Then no case of that width has any, so that all do the same work, and the naive one, which would not fit even so,
    steps each parameter as soon as its gradient is there.
    """
    record = Record(case, settings.momentum)
    dense = [other for other in settings.cases if other.width == case.width and other.strategy in _DENSE_SPLIT]
    too_large = [
        (needed, available)
        for other in dense
        for available in [_available(other, host_memory, device_memory)]
        if (needed := capacity.needed_bytes(other, momentum=True)) > available
    ]
    if settings.momentum and too_large:
        needed, available = max(too_large)
        record.momentum = False
        record.note = (
            f"without momentum: with it the dense network at w={case.width} needs about {needed / 1e9:.0f} GB, "
            f"and {available / 1e9:.0f} GB are free"
        )
        if case.strategy == "naive-mp":
            record.update_in_backward = True
            record.note += "; each parameter is stepped as soon as its gradient is there"
    return record


_DENSE_SPLIT = ("naive-mp", "pipeline", "channel-parallel")
"""Strategies that hold the dense network once; ZeRO holds more than that, which says nothing about the network."""


def _measure(record: Record, round_index: int, settings: BenchSettings, device_memory: int | None) -> None:
    """Measures ``record``'s case once more, and in the first round finds its number of micro-batches."""
    case = record.case
    needed = capacity.needed_bytes(case, record.momentum, record.update_in_backward)
    available = _available(case, _host_memory(settings), device_memory)
    if needed > available:
        record.out_of_memory = True
        record.error = f"does not fit: needs about {needed / 1e9:.0f} GB, and {available / 1e9:.0f} GB are free"
        return
    fastest = math.inf
    kept: tuple[int, list[StepFigures]] | None = None
    failed = launch.Outcome[StepFigures]()
    for count in case.micro_batches if record.micro_batches is None else (record.micro_batches,):
        request = case.steps(
            dtype=settings.dtype,
            momentum=record.momentum,
            update_in_backward=record.update_in_backward,
            micro_batches=count,
            steps=settings.steps,
        )
        outcome = _on_hosts(request, case.ranks, settings)
        if outcome.error is not None:
            failed = outcome
            continue
        seconds = median_seconds(outcome.ranks)
        if record.micro_batches is None and len(case.micro_batches) > 1:
            record.micro_batch_seconds[count] = seconds
        if seconds < fastest:
            fastest, kept = seconds, (count, outcome.ranks)
    if kept is None:
        record.error, record.out_of_memory = failed.error, failed.out_of_memory
        return
    record.micro_batches = kept[0]
    record.measurements.append((round_index, kept[1]))


def _say(record: Record, round_index: int) -> None:
    case = record.case
    name = case.strategy if case.strategy != "pipeline" else f"pipeline ({record.micro_batches} micro-batches)"
    result = record.error
    if result is None:
        result = f"{median_seconds(record.measurements[-1][1]):.3f} s a step"
    print(f"round {round_index + 1}  w={case.width}  tp={case.ranks}  {name}  {result}", flush=True)


def _write_json(settings: BenchSettings, name: str, value: object) -> None:
    replace_file(os.path.join(settings.output, name), json.dumps(value, indent=1) + "\n")
