"""A step against bandwidth: over a real cable, gone on with, left out where it takes too long, and told."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.bench import fabricated
from tlgc_mp.bench.ranks import launch, link
from tlgc_mp.bench.scaling import bandwidth
from tlgc_mp.bench.settings import Steps
from tlgc_mp.cli.main import main

needs_hosts = pytest.mark.skipif(
    os.getuid() != 0 or not all(shutil.which(tool) for tool in link.TOOLS), reason=f"needs root and {link.TOOLS}"
)
FILES = ["bandwidth.json", "bandwidth.md", "bandwidth.png", "bandwidth.svg"]


@needs_hosts
@pytest.mark.timeout(280)
def test_a_step_takes_as_long_as_its_bytes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--quick", "--strategies", "naive-mp", "--rates", "20mbit", "--output", str(tmp_path)]
    assert main(["bench", "bandwidth", *flags]) == 0, capfd.readouterr().out
    unlimited, limited = _rows(tmp_path)
    activations = 4 * 32 * 16 * 32 * 32  # bytes: WRN-10-1's at the cut, sent one way, and as many gradients back
    for row in (unlimited, limited):
        assert activations < row.network_bytes < 1.2 * activations
    assert limited.on_the_way == pytest.approx(8 * limited.network_bytes / 20e6)
    assert limited.median is not None and limited.median > 0.95 * 2 * 8 * activations / 20e6 > 1.5
    assert capfd.readouterr().out.count("s a step") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES

    assert main(["bench", "bandwidth", *flags]) == 0
    assert "s a step" not in capfd.readouterr().out  # all of it is measured
    assert main(["bench", "bandwidth", *flags, "--width", "2"]) == 2
    assert (
        "--output must be a new folder, or one that holds a run with the same settings, got" in capfd.readouterr().err
    )


@needs_hosts
def test_nothing_is_left_of_a_cable() -> None:
    with link.cable() as joined:
        joined.limit("1gbit")
        first = joined.places[0].enter
        shaped = subprocess.run([*first, "tc", "qdisc", "show", "dev", link.INTERFACE], capture_output=True, text=True)
        assert "tbf" in shaped.stdout and "rate 1Gbit" in shaped.stdout
        joined.limit(link.UNLIMITED)
        shaped = subprocess.run([*first, "tc", "qdisc", "show", "dev", link.INTERFACE], capture_output=True, text=True)
        assert "tbf" not in shaped.stdout
    assert not os.path.exists(f"/proc/{first[2]}")


class Measurements:
    """Stands in for :func:`launch.measure` and for the cable."""

    def __init__(self, network_bytes: float, error: str | None = None) -> None:
        self.asked: list[tuple[str, str]] = []
        self.network_bytes, self.error = network_bytes, error
        self.places, self._rate = (), ""

    def limit(self, rate: str) -> None:
        self._rate = rate

    def __call__(self, request: Steps, ranks: int, time_limit: float, places: Any) -> launch.Outcome:
        self.asked.append((request.strategy, self._rate))
        if self.error is not None and len(self.asked) == 2:
            return launch.Outcome(error=self.error)
        result = fabricated.rank_result([0.5, 0.75, 0.5], [0.5] * 3, network_bytes=self.network_bytes)
        return launch.Outcome([result] * ranks)

    def __enter__(self) -> Measurements:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def _run(monkeypatch: pytest.MonkeyPatch, folder: Path, measurements: Measurements, *flags: str) -> int:
    monkeypatch.setattr(launch, "measure", measurements)
    monkeypatch.setattr(bandwidth, "cable", lambda: measurements)
    return main(["bench", "bandwidth", "--output", str(folder), "--steps", "3", *flags])


def _rows(folder: Path) -> list[bandwidth.Row]:
    return [bandwidth.Row(**row) for row in json.loads((folder / "bandwidth.json").read_text())["rows"]]


def test_what_must_take_too_long_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measurements = Measurements(30e6)  # at 20 Mbit/s 12 s a step, of which there are seven
    flags = ["--strategies", "gc-2l", "--rates", "100mbit", "20mbit", "--rounds", "2", "--time-limit", "80"]
    assert _run(monkeypatch, tmp_path, measurements, *flags) == 0
    assert measurements.asked == [("gc-2l", "unlimited"), ("gc-2l", "100mbit")] * 2
    assert _rows(tmp_path)[2].missing == "left out: 12 s a step for its 30 MB alone"
    text = (tmp_path / "bandwidth.md").read_text()
    assert "| 100mbit | gc-2l | 0.500 | 0.000 | 30 | 2.400 | 0.250 |" in text
    assert "| 20mbit | gc-2l | left out: 12 s a step for its 30 MB alone |" in text


def test_a_failure_is_told_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measurements = Measurements(1e6, error="rank 1: no")
    flags = ["--strategies", "gc-2l", "gc", "--rates", "1gbit", "--rounds", "1"]
    assert _run(monkeypatch, tmp_path, measurements, *flags) == 1
    assert [row.missing for row in _rows(tmp_path)] == [None, "rank 1: no", None, None]
    assert len(measurements.asked) == 4
    assert _run(monkeypatch, tmp_path, measurements, *flags) == 0
    assert measurements.asked[4:] == [("gc", "unlimited")]
    assert [row.missing for row in _rows(tmp_path)] == [None] * 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--rates", "fast"],
            "--rates must be unlimited or a bandwidth, got 'fast'; use e.g. 1gbit, 100mbit or 500kbit",
        ),
        (
            ["--rates", "0mbit"],
            "--rates must be unlimited or a bandwidth, got '0mbit'; use e.g. 1gbit, 100mbit or 500kbit",
        ),
        (
            ["--strategies", "gc@3"],
            "--strategies must be at an even number of ranks, for two hosts, got 'gc@3'; use e.g. gc@2",
        ),
        (
            ["--strategies", "gc@0"],
            "--strategies must be NAME or NAME@P, with P a number of ranks, got 'gc@0'; use e.g. gc@2",
        ),
        (
            ["--strategies", "faster"],
            "--strategies must be one of gc-2l, gc, shuffle, bgc, naive-mp, pipeline, channel-parallel, zero3",
        ),
        (["--rounds", "0"], "--rounds must be 1 or more, got 0"),
        (["--depth", "11"], "model must be of a depth 6 u + 4, got 'wrn-11-4'; use one of 10, 16, 22, 28, 34, 40"),
        (["--batch-size", "0"], "--batch-size must be 1 or more, got 0"),
        (["--time-limit", "nan"], "--time-limit must be a positive number of seconds, got nan; use e.g. 1800"),
    ],
)
def test_mistakes(options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "bandwidth", "--output", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
