"""What saving a checkpoint costs: measured on real ranks, and told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tlgc_mp.bench.saving import sweep as saving
from tlgc_mp.cli.main import main

NAMES = {"plain", "blocking", "first_stall", "stall", "background", "step", "step_beside"}


@pytest.mark.timeout(200)
@pytest.mark.usefixtures("forked_ranks")
def test_quick_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "saving", "--quick", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "saving.json").read_text())
    (row,) = found["rows"]
    assert row["bytes"] > 2 * 4 * 10_000  # weights and momentum of half the network
    assert set(row["median"]) == set(row["samples"]) == NAMES
    assert all(value > 0 for value in row["median"].values())
    assert row["median"]["stall"] < row["median"]["background"]
    assert found["run"]["command"][:1] == ["tlgc-mp"]
    text = (tmp_path / "saving.md").read_text()
    assert f"| a training step | {row['median']['step']:.3f} |" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saving.json", "saving.md"]  # no checkpoint is left
    assert "a training step" in capfd.readouterr().out


def test_the_slowest_rank_counts() -> None:
    settings = saving.SavingSettings("wrn-10-1", 2, 2, 8, 1, 3, "", 1.0)
    ranks = [
        {"bytes": 10 * (rank + 1), "first_stall": 1.0 + rank, **{name: samples for name in NAMES - {"first_stall"}}}
        for rank, samples in enumerate(([1.0, 5.0, 3.0], [2.0, 4.0, 9.0]))
    ]
    row = saving.make_row(settings, ranks)
    assert row["bytes"] == 20
    assert row["samples"]["stall"] == [2.0, 5.0, 9.0] and row["median"]["stall"] == 5.0
    assert row["median"]["first_stall"] == 2.0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tp", "0"], "--tp must be 1 to 256 ranks, got 0"),
        (["--tp", "257"], "--tp must be 1 to 256 ranks, got 257"),
        (["--rounds", "9" * 400], "--rounds must be 1000000 or less, got"),
        (["--rounds", "0"], "--rounds must be 1 or more, got 0"),
        (["--batch-size", "0"], "--batch-size must be 1 or more, got 0"),
        (["--zero-stage", "4"], "--zero-stage must be one of 0, 1, 2, 3, got 4"),
        (["--time-limit", "nan"], "--time-limit must be a positive number of seconds, got nan; use e.g. 1800"),
        (["--model", "wrn-11-2"], "wrn-11-2"),
        (["--tp", "3"], "use one of 1, 2, 4"),
    ],
)
def test_mistakes(options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "saving", "--output", str(tmp_path / "out"), *options]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and said in err
    assert not (tmp_path / "out").exists()
