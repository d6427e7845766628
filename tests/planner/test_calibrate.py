"""``tlgc-mp plan --calibrate``: what it measures, and what a plan makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.planner.measured import beside
from tlgc_mp.cli.main import main
from tlgc_mp.planner.devices import find_device

pytestmark = pytest.mark.skipif(torch.accelerator.is_available(), reason="tells of a process on a CPU")


def test_a_calibrated_plan_tells_what_a_process_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "here.json")
    assert main(["plan", "--calibrate", path]) == 0
    assert f"wrote {path}" in capsys.readouterr().out
    device = find_device("", path)
    assert not device.accelerator and device.source.startswith("measured ")
    for name, side, batch, stage in (("wrn-16-4", 32, 16, 1), ("mobilenet_v2", 64, 16, 0)):
        candidate, (answer,) = beside(device, name, side, batch, 1, 1, stage, False)
        assert candidate.needed == pytest.approx(answer["peak"], rel=0.025)
        assert candidate.memory.total == pytest.approx(answer["peak"] - candidate.fixed, rel=0.1)


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--calibrate", str(tmp_path / "nowhere" / "here.json")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tlgc-mp: error: --calibrate must be a file to write, got ")
