"""``scripts/accelerator_checks.sh``, tried on the CPU in small, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests import forked
from tests.accelerator import checks
from tests.launch.jobs import ROOT


def _script(*words: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "scripts/accelerator_checks.sh", *words],
        env={**os.environ, "PYTHON": python, "OMP_NUM_THREADS": "1"},
        **{"capture_output": True, "text": True, "timeout": 570.0},
    )


@pytest.mark.timeout(600)
def test_every_part_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the script calls, with processes that are forked."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(checks, "subprocess", forked)
    status = checks.main(["--device", "cpu", "--quick", "--output", str(tmp_path)])
    written = json.loads((tmp_path / "checks.json").read_text())
    parts = {part["name"]: part for part in written["parts"]}
    assert [part.name for part in checks.PARTS] == list(parts)
    assert {name: part["outcome"] for name, part in parts.items()} == dict.fromkeys(parts, "passed"), written
    assert status == 0
    assert parts["tests"]["figures"]["tests"] > 50
    assert parts["parity"]["figures"]["steps"] == parts["resume"]["figures"]["steps"] == 6
    assert parts["parity"]["figures"]["at most off by"] < 1e-5
    assert parts["resume"]["figures"]["at most off by"] == 0 < parts["resume"]["figures"]["stopped after"]
    assert set(parts["benchmark"]["figures"]) == {"gc-2l, ms a step", "gc, ms a step"}
    rows = parts["narrow groups"]["figures"]["rows"]
    assert len(rows) == 3 and all(row[kind] > 0 for row in rows for kind in ("dense", "group", "two-level"))
    lines = (tmp_path / "checks.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:7]] == [f"| {name}" for name in parts]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
def test_without_an_accelerator() -> None:
    done = _script()
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == ""
    assert line.startswith("accelerator_checks.sh: error: this machine must have an accelerator, got none")


def test_without_torch() -> None:
    done = _script(python="false")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: torch and deepspeed must be installed for false")


def test_losses_that_differ_fail() -> None:
    assert checks.compared([2.0, 1.0], [2.0, 1.01])["at most off by"] == pytest.approx(0.01 / 1.01)
    for found in ([2.0, 1.2], [2.01, 1.0], [2.0], [], [2.0, float("nan")]):
        with pytest.raises(AssertionError):
            checks.compared(found, [2.0, 1.0])


def test_a_part_that_fails_or_hangs_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def code(text: str) -> checks.Part:
        def started(plan: checks.Plan, until: float) -> checks.Figures:
            checks.ended(*checks.started(plan, "part", ["-c", text]), until)
            return {"one": 1}

        return checks.Part(text, 20.0 if "sleep" not in text else 1.0, started)

    monkeypatch.setattr(checks, "PARTS", [code("import time; time.sleep(60)"), code("1 / 0"), code("pass")])
    began = time.monotonic()
    rows = checks.run(checks.Plan("cpu", True, tmp_path))
    assert time.monotonic() - began < 30
    assert [row["outcome"] for row in rows] == ["failed", "failed", "passed"]
    assert "no end in the time" in rows[0]["reason"] and "ZeroDivisionError" in rows[1]["reason"]
    assert rows[2]["figures"] == {"one": 1}
    monkeypatch.setattr(checks, "SECONDS", -1.0)
    assert {row["outcome"] for row in checks.run(checks.Plan("cpu", True, tmp_path))} == {"not run"}
