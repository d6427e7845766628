"""All that wants an accelerator, in one run of nine minutes at most: what scripts/accelerator_checks.sh starts.

tests           tests/accelerator
parity          the losses of a run that is compiled (train --compile) beside those of one that is not
resume          the losses of a run that was stopped and resumed beside those of one that was not
benchmark       tlgc-mp bench scaling, on one device
narrow groups   a two-level layer beside the dense and the group convolution of its channels

DIR/checks.json   {"run": machine, versions, git commit, date and command; "parts": [{name, outcome, seconds,
                  figures, reason}]}
DIR/checks.md     the same as a table
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from tlgc_mp.bench.report import describe, table
from tlgc_mp.bench.settings import output_folder
from tlgc_mp.errors import UsageError
from tlgc_mp.host import describe_run, replace_file
from tlgc_mp.training.runs import METRICS

ROOT = Path(__file__).parents[2]
SECONDS = 530.0
"""Of all parts."""
FIRST_LOSS, LATER_LOSSES = 1e-3, 0.05
"""How far, relatively, the loss of the first step and those of later ones may be off: on an accelerator convolutions
round to TF32, and sum in another order each time."""

Figures = dict[str, Any]


class NotRun(Exception):
    """Why a part did not run."""


@dataclass(frozen=True)
class Plan:
    """What to run on, and how much of it.

    Attributes:
        device: the kind, as torch calls it.
        quick: whether in small, to try the script.
        folder: of what is written.
    """

    device: str
    quick: bool
    folder: Path


class Part(NamedTuple):
    """A check, and the most seconds that it may take."""

    name: str
    seconds: float
    run: Callable[[Plan, float], Figures]


def started(plan: Plan, name: str, words: list[str]) -> tuple[subprocess.Popen[bytes], Path]:
    """A process of this interpreter on the device of ``plan``, and the file of what it says."""
    said = plan.folder / f"{name}.log"
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "DS_ACCELERATOR": plan.device, "PYTHONPATH": os.pathsep.join(path)}
    if plan.device == "cpu":
        environment["CXX"] = "none"  # inductor takes minutes there
    with open(said, "ab") as file:
        process = subprocess.Popen(
            [sys.executable, *words],
            **{"cwd": ROOT, "env": environment, "stdin": subprocess.DEVNULL, "stdout": file, "stderr": file},
            start_new_session=True,
        )
    return process, said


def ended(process: subprocess.Popen[bytes], said: Path, until: float, status: int = 0) -> None:
    """Waits for a process until that time, and raises AssertionError unless it ends with ``status``."""
    try:
        found: int | str = process.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        found = "no end in the time that there was"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    lines = said.read_text(errors="replace").split("\n")
    assert found == status, f"{said.name} ended with {found}: {' '.join(lines[-12:]).strip()[-400:]}"


def tests(plan: Plan, until: float) -> Figures:
    if importlib.util.find_spec("pytest") is None:
        raise NotRun("pytest is not installed")
    report = plan.folder / "tests.xml"
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "tests/accelerator"]
    ended(*started(plan, "tests", words), until)
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    return {key: int(suite.attrib[key]) for key in ("tests", "skipped")}


def training(plan: Plan) -> list[str]:
    """A run that reports the loss of each step."""
    model, steps, size = ("wrn-10-1", 6, 16) if plan.quick else ("wrn-28-10", 100, 64)
    words = ["-m", "tlgc_mp", "train", "--model", model, "--dataset", "synthetic", "--image-size", "32"]
    words += ["--epochs", "1", "--limit-steps", str(steps), "--batch-size", str(size), "--log-interval", "1"]
    return [*words, "--learning-rate", "0.001", "--rank-timeout", "300"]


def trained(plan: Plan, name: str, until: float, *flags: str) -> list[float]:
    folder = ["--output-dir", str(plan.folder / name)]
    ended(*started(plan, name, [*training(plan), *folder, *flags]), until)
    return losses(plan, name)


def losses(plan: Plan, name: str) -> list[float]:
    """Of the steps of a run, by step."""
    path = plan.folder / name / METRICS
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return [line["loss"] for line in lines if "loss" in line]


def compared(found: list[float], expected: list[float]) -> Figures:
    assert len(found) == len(expected) > 0, f"{len(found)} steps beside {len(expected)}"
    off = [abs(one - other) / abs(other) for one, other in zip(found, expected, strict=True)]
    figures = {"steps": len(off), "first off by": off[0], "at most off by": max(off), "last loss": expected[-1]}
    assert off[0] <= FIRST_LOSS and max(off) <= LATER_LOSSES and not math.isnan(sum(off)), f"losses differ: {figures}"
    return figures


def parity(plan: Plan, until: float) -> Figures:
    began = time.monotonic()
    expected = trained(plan, "eager", until)
    seconds = time.monotonic() - began
    found = trained(plan, "compiled", until, "--compile")
    both = {"eager run, s": seconds, "compiled run, s": time.monotonic() - began - seconds}
    return {**compared(found, expected), **both}


def resume(plan: Plan, until: float) -> Figures:
    expected = losses(plan, "eager")
    if not expected:
        raise NotRun("there is no run to compare with")
    process, said = started(plan, "stopped", [*training(plan), "--output-dir", str(plan.folder / "stopped")])
    while process.poll() is None and time.monotonic() < until and not losses(plan, "stopped"):
        time.sleep(0.02)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    ended(process, said, until, 128 + signal.SIGINT)
    before = len(losses(plan, "stopped"))
    assert before < len(expected), "it was stopped after its last step"
    return {"stopped after": before, **compared(trained(plan, "stopped", until, "--resume"), expected)}


def benchmark(plan: Plan, until: float) -> Figures:
    shared = ["-m", "tlgc_mp", "bench", "scaling", "--tp", "1", "--rounds", "1", "--time-limit", "120"]
    shared += ["--output", str(plan.folder / "scaling")]
    if plan.quick:
        flags = ["--depth", "10", "--widths", "1", "--batch-sizes", "2", "--groups", "2", "--steps", "1"]
        strategies = ["gc-2l", "gc"]
    else:
        flags = ["--widths", "10", "--batch-sizes", "128", "--groups", "8", "--steps", "5", "--dtype", "bf16"]
        strategies = ["gc-2l", "gc-2l-dense", "gc-2l-overlapped", "gc", "naive-mp"]
    ended(*started(plan, "benchmark", [*shared, *flags, "--strategies", *strategies]), until)
    rows = json.loads((plan.folder / "scaling" / "scaling.json").read_text())
    assert not any(row["error"] for row in rows), next(row["error"] for row in rows if row["error"])
    return {f"{row['strategy']}, ms a step": 1e3 * row["median_step_seconds"] for row in rows}


def narrow_groups(plan: Plan, until: float) -> Figures:
    points = "3" if plan.quick else "60"
    process, said = started(plan, "narrow", ["-m", "tests.accelerator.narrow", plan.device, "--points", points])
    ended(process, said, until)
    rows = json.loads(said.read_text().splitlines()[-1])
    over = [row["two-level"] / min(row["dense"], row["group"]) for row in rows]
    figures = {"points": len(rows), "median of the faster of dense and group": statistics.median(over)}
    return {**figures, "worst": max(over), "rows": rows}


PARTS = (
    Part("tests", 200.0, tests),
    Part("parity", 150.0, parity),
    Part("resume", 80.0, resume),
    Part("benchmark", 150.0, benchmark),
    Part("narrow groups", 60.0, narrow_groups),
)


def run(plan: Plan) -> list[dict[str, Any]]:
    """A row a part; a part that fails or has no time left keeps none of the others from running."""
    end, rows = time.monotonic() + SECONDS, []
    for part in PARTS:
        print(f"{part.name} ...", flush=True)
        began, row = time.monotonic(), {"name": part.name, "outcome": "passed", "figures": {}, "reason": ""}
        try:
            if began > end:
                raise NotRun("no time was left for it")
            row["figures"] = part.run(plan, min(end, began + part.seconds))
        except NotRun as reason:
            row.update(outcome="not run", reason=str(reason))
        except (AssertionError, OSError, ValueError, LookupError) as reason:
            row.update(outcome="failed", reason=f"{type(reason).__name__}: {' '.join(str(reason).split())}")
        rows.append({**row, "seconds": round(time.monotonic() - began, 1)})
    return rows


def markdown(rows: list[dict[str, Any]], description: dict[str, Any]) -> str:
    lines = []
    for row in rows:
        shown = [f"{key} {value:.4g}" for key, value in row["figures"].items() if isinstance(value, int | float)]
        what = row["reason"] or "; ".join(shown)
        lines.append([row["name"], row["outcome"], f"{row['seconds']:.0f}", what.replace("|", "/")])
    return "\n".join([*table(("check", "outcome", "s", "figures"), lines), "", *describe(description), ""])


def main(words: list[str] | None = None) -> int:
    import torch

    parser = argparse.ArgumentParser("accelerator_checks.sh", description="Check this package on an accelerator.")
    parser.add_argument("--device", choices=["cpu"], help="to try the script without one (default: the accelerator)")
    parser.add_argument("--quick", action="store_true", help="everything in small")
    parser.add_argument("--output", metavar="DIR", help="default: runs/accelerator-DATE")
    options = parser.parse_args(words)
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        if options.device is None and found is None:
            raise UsageError(
                "this machine must have an accelerator, got none; --device cpu --quick tries the script itself"
            )
        folder = output_folder(options.output, time.strftime("accelerator-%Y%m%d-%H%M%S"))
    except UsageError as error:
        print(f"accelerator_checks.sh: error: {error}", file=sys.stderr)
        return 2
    device = options.device or (found.type if found is not None else "")
    rows = run(Plan(device, options.quick, Path(folder).resolve()))
    description = {**describe_run(), "command": ["scripts/accelerator_checks.sh", *(words or sys.argv[1:])]}
    text = markdown(rows, description)
    content = json.dumps({"run": description, "device": device, "parts": rows}, indent=1) + "\n"
    for name, written in (("checks.json", content), ("checks.md", text)):
        replace_file(os.path.join(folder, name), written)
    print(f"{text}\nWrote checks.json and checks.md to {folder}", flush=True)
    return int(any(row["outcome"] == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
