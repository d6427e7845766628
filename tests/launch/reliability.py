"""Faults that need a launcher or a network, each many times at random moments: the rows of docs/reliability.md.

    python -m tests.launch.reliability --results runs/reliability.json [--times 20] [--only WORD ...]

goes through all cases in turn, notes each repetition as it ends, goes on where it was stopped, and prints the rows. Of
a repetition the job's line, its end, what it leaves and its going on are checked as the tests of one such fault do.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.launch.forked import SHORT, figures, forked
from tests.launch.hosts import child_of, two_hosts
from tests.launch.jobs import free_port
from tests.launch.test_hosts import check_named, training
from tests.launch.test_stopping import LAUNCHERS, MOMENTS, TAGS, check_resumed, check_stopped, lingering, wait_for
from tlgc_mp.host import describe_machine

LINGERING = 1.0
"""Seconds of which a moment that ``LINGERS`` makes long has some left."""

Figures = list[dict[str, Any]]


def ctrl_c(launcher: str, moment: str, folder: Path, chance: random.Random, undisturbed: Figures) -> float:
    with lingering(launcher, folder, moment) as job:
        wait_for(folder / "there", job)
        time.sleep(chance.uniform(0.0, LINGERING))
        began = time.monotonic()
        job.ctrl_c()
        check_stopped(job, TAGS[moment])
        seconds = time.monotonic() - began
    check_resumed(folder / "run", undisturbed)
    return seconds


def on_two_hosts(fault: str, folder: Path, chance: random.Random, undisturbed: Figures) -> float:
    there = folder / "there"
    variables = {"LINGERS": "training", "THERE": str(there)}
    with two_hosts() as hosts, training(hosts, folder, "--tp", "2", "--rank-timeout", "10", **variables) as ranks:
        deadline = time.monotonic() + 200.0
        while not there.exists():
            assert ranks[0].poll() is None and time.monotonic() < deadline, (folder / "node1").read_text()
            time.sleep(0.02)
        time.sleep(chance.uniform(0.0, LINGERING))
        began = time.monotonic()
        if fault == "kill":
            os.kill(child_of(ranks[1]), signal.SIGKILL)
        elif fault == "stop":
            os.kill(child_of(ranks[1]), signal.SIGSTOP)
        else:
            hosts[1].plug("down")
        assert ranks[0].wait(60.0) == 1, (folder / "node1").read_text()
        seconds = time.monotonic() - began
        check_named(folder, fault)
    check_resumed(folder / "run", undisturbed)
    return seconds


Case = Callable[[Path, random.Random, Figures], float]
CASES: dict[str, Case] = {
    **{
        f"Ctrl-C with data workers under {launcher}: {moment}": functools.partial(ctrl_c, launcher, moment)
        for launcher in LAUNCHERS
        for moment in MOMENTS
    },
    "rank killed that was alone on its host": functools.partial(on_two_hosts, "kill"),
    "rank stopped that was alone on its host": functools.partial(on_two_hosts, "stop"),
    "cable of a host cut": functools.partial(on_two_hosts, "cut"),
}


def repeat(results: Path, times: int, names: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Runs what is missing; name -> its repetitions, each with ``seconds``, or with how it ``failed``."""
    found = json.loads(results.read_text()) if results.exists() else {}
    found["machine"] = describe_machine()
    rows = found.setdefault("rows", {})
    undisturbed: Figures | None = None
    for repetition in range(times):
        for name in names:
            if len(rows.setdefault(name, [])) > repetition:
                continue
            undisturbed = undisturbed or _undisturbed()
            with tempfile.TemporaryDirectory() as folder:
                try:
                    outcome = {"seconds": CASES[name](Path(folder), random.Random(f"{name} {repetition}"), undisturbed)}
                except Exception:
                    outcome = {"failed": traceback.format_exc()}  # type: ignore[dict-item]
            rows[name].append({"date": time.strftime("%F %T"), "load": os.getloadavg()[0], **outcome})
            results.write_text(json.dumps(found, indent=1) + "\n")
            print(f"{name}, repetition {repetition}: {rows[name][-1]}", file=sys.stderr, flush=True)
    return rows


def _undisturbed() -> Figures:
    with tempfile.TemporaryDirectory() as folder, forked(SHORT, Path(folder) / "run", port=free_port()) as job:
        assert job.wait(150.0) == [0, 0], job.said()
        return figures(job.lines())


def table(rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The rows as those of docs/reliability.md."""
    lines = ["| fault | times | failed | ended within, s: median | longest |", "|---|---|---|---|---|"]
    for name, repetitions in rows.items():
        seconds = sorted(each["seconds"] for each in repetitions if "seconds" in each)
        if seconds:
            failed = len(repetitions) - len(seconds)
            figures = f"{seconds[len(seconds) // 2]:.1f} | {seconds[-1]:.1f}"
            lines.append(f"| {name} | {len(repetitions)} | {failed} | {figures} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="cases whose names have one of these")
    options = parser.parse_args()
    names = [name for name in CASES if any(word in name for word in options.only)]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    print(*table(repeat(options.results, options.times, names)), sep="\n")


if __name__ == "__main__":
    main()
