"""``tlgc-mp report`` averages seeds, fits slopes, sets figures beside the paper's, and refuses what it cannot read."""

from __future__ import annotations

import copy
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from tests.bench import fabricated
from tests.bench.test_report import written_in
from tlgc_mp.cli.main import main
from tlgc_mp.paper.report import slope
from tlgc_mp.paper.rows import read_rows

LOSSES = {"sc": 0.1, "gc": 0.5, "gc-2l": 0.3}


def row(conv: str, groups: int, seed: int, error: float, **changes: Any) -> dict[str, Any]:
    """A run of two epochs."""
    lines = [{"epoch": epoch, "train_loss": 2.0 / epoch + LOSSES[conv] + seed / 100} for epoch in (1, 2)]
    return {
        "model": "wrn-28-10",
        "dataset": "cifar10",
        "image_size": None,
        "recipe": "cifar",
        "epochs": 2,
        "batch_size": 128,
        "learning_rate": 0.1,
        "limit_steps": None,
        "conv": conv,
        "groups": groups,
        "coarse_kernel_size": None,
        "coarse_init": "zero",
        "seed": seed,
        "tensor_parallel": 1,
        "data_parallel": 1,
        "parameters": 18_349_146,
        "effective_parameters": None,
        "test_error_percent": error,
        "seconds": 7200.0,
        "train_seconds": 1000.0,
        "data_seconds": 30.0,
        "epoch_lines": lines,
        **fabricated.DESCRIPTION,
        "versions": {"torch": "2.0", "deepspeed": "0.1"},
        **changes,
    }


ROWS = [
    row("sc", 1, 0, 4.0),
    row("sc", 1, 1, 5.0),
    *(row("gc", n, seed, 5.0 + 2 * k + seed) for k, n in enumerate((2, 4)) for seed in (0, 1)),
    *(row("gc-2l", n, seed, 4.0 + k + 2 * k * seed) for k, n in enumerate((2, 4)) for seed in (0, 1)),
    row("gc-2l", 2, 0, 6.5, coarse_kernel_size=1),
    row("gc-2l", 2, 0, 6.25, coarse_init="he"),
    row("gc-2l", 2, 0, 6.75, coarse_channels=3),
    row("gc-2l", 2, 0, 7.25, coarse_channels=2, coarse_sum=True),
]


def _write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in rows))
    return str(path)


def _cells(text: str, *first: str) -> list[list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [cells for cells in lines if cells[: len(first)] == list(first)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    runs = folder / "runs"
    for index, line in enumerate(ROWS[:4]):
        (runs / str(index)).mkdir(parents=True)
        (runs / str(index) / "result.json").write_text(json.dumps(line) + "\n")
    rest = _write(folder / "rest.jsonl", ROWS[3:])  # one of them is found twice
    assert main(["report", str(runs), rest, "--output", str(folder / "out")]) == 0
    return folder / "out"


def test_every_row_is_kept_once(folder: Path) -> None:
    kept = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert sorted(map(json.dumps, kept)) == sorted(map(json.dumps, ROWS))


def test_seeds_are_averaged_and_their_spread_told(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    gc = _cells(text, "GC", "2", "2")[0]
    assert gc[4] == f"5.50 ± {statistics.stdev([5, 6]):.2f}"
    assert gc[5] == f"1.5050 ± {statistics.stdev([1.50, 1.51]):.4f}"
    assert gc[6:] == ["120.0", "3.0"]
    assert _cells(text, "GC-2L, d0 = 1", "2", "1")[0][4] == "6.50"
    assert _cells(text, "GC-2L, he initialization", "2", "1")[0][4] == "6.25"
    assert _cells(text, "GC-2L, r = 3", "2", "1")[0][4] == "6.75"
    assert _cells(text, "GC-2L, r = 2, summed", "2", "1")[0][4] == "7.25"


def test_slopes_are_those_of_each_seed(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    assert _cells(text, "GC", "2.00 ± 0.00")
    assert _cells(text, "GC-2L", f"2.00 ± {statistics.stdev([1, 3]):.2f}")
    assert not _cells(text, "SC", "0.00")


def test_slope_is_per_doubling() -> None:
    assert slope({2: 1.0, 4: 3.0, 8: 5.0}) == pytest.approx(2.0)
    assert slope({2: 1.0, 4: 1.0, 16: 2.0}) == pytest.approx(15 / 42)  # by hand: x = 1, 2, 4


def test_whether_the_loss_lies_between_is_told_seed_by_seed(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    assert _cells(text, "2")[0][4] == "2 of 2"


def test_the_papers_figures_stand_beside(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    assert "## The paper's Table 1" in text and "## The paper's Table 3" not in text
    (line,) = _cells(text, "wrn-28-10", "GC-2L", "4", "cifar10")
    assert line[4:] == ["18.35", "9.25", f"6.00 ± {statistics.stdev([5, 7]):.2f}", "4.34", "2", "2", ""]
    (unmeasured,) = _cells(text, "wrn-28-10", "GC-2L", "16", "cifar100")
    assert unmeasured[4:] == ["", "2.54", "", "23.49", "", "", ""]


def test_figures_are_written(folder: Path) -> None:
    for name in ("loss", "error"):
        assert (folder / f"wrn-28-10-cifar10-{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (folder / f"wrn-28-10-cifar10-{name}.svg").read_text()
        assert f"(wrn-28-10-cifar10-{name}.png)" in (folder / "report.md").read_text()


def test_runs_of_another_recipe_are_not_mixed_in(tmp_path: Path) -> None:
    rows = [row("sc", 1, 0, 4.0), row("sc", 1, 0, 9.0, epochs=3)]
    assert main(["report", _write(tmp_path / "rows.jsonl", rows), "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out/report.md").read_text()
    assert [cells[4] for cells in _cells(text, "SC", "1", "1")] == ["4.00", "9.00"]
    assert len(list((tmp_path / "out").glob("*-error.png"))) == 2


def _without(key: str) -> dict[str, Any]:
    line = copy.deepcopy(ROWS[0])
    del line[key]
    return line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "which does not exist"),
        ("{", "': Expecting property name"),
        ("[1]\n", "must hold a JSON object on each line, got [1]"),
        ("7\n", "must hold a JSON object on each line, got 7"),
        ("[" * 100_000, "': maximum recursion"),
        (json.dumps({**ROWS[0], "groups": "1"}), 'must be a count, got "1"; give rows that tlgc-mp train wrote'),
        (
            json.dumps({**ROWS[0], "model": "../wrn"}),
            "': model must be wrn-<depth>-<width>, imagenet-wrn-34-2, mobilenet_v2",
        ),
        (
            json.dumps({**ROWS[0], "epoch_lines": []}),
            "must be a list of epochs, each with its number and train_loss, got []; give rows that tlgc-mp train wrote",
        ),
        (
            json.dumps({**ROWS[0], "epoch_lines": [{"epoch": 1}]}),
            'must be a list of epochs, each with its number and train_loss, got [{"epoch": 1}]',
        ),
        (
            json.dumps({**ROWS[0], "test_error_percent": float("nan")}),
            "must be a number, got NaN; give rows that tlgc-mp train wrote",
        ),
        (json.dumps({**ROWS[0], "train_seconds": 0}), "must be a time, got 0; give rows that tlgc-mp train wrote"),
        (json.dumps({**ROWS[0], "machine": {}}), "must be a machine, got {}; give rows that tlgc-mp train wrote"),
        (
            json.dumps({**ROWS[0], "effective_parameters": "few"}),
            'must be a count or null, got "few"; give rows that tlgc-mp train wrote',
        ),
        ("", "SOURCE must hold a finished run (a result.json), got none in"),
        (json.dumps(_without("seed")), "must have seed, got none; give rows that tlgc-mp train wrote"),
    ],
)
def test_what_cannot_be_read_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    assert main(["report", str(path), "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_file_that_cannot_be_replaced_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, folder = _write(tmp_path / "rows.jsonl", ROWS[:1]), tmp_path / "out"
    (folder / "rows.jsonl").mkdir(parents=True)
    assert main(["report", source, "--output", str(folder)]) == 2
    said = capsys.readouterr().err
    assert (
        f"--output must be a folder to write to, got '{folder}': '{folder}/rows.jsonl': " in said
        and said.count("\n") == 1
    )
    assert [path.name for path in folder.iterdir()] == ["rows.jsonl"]


def test_seeds_with_more_epochs_are_plotted_beside_those_with_fewer(tmp_path: Path) -> None:
    rows = [row("sc", 1, 0, 4.0), row("sc", 1, 1, 5.0)]
    del rows[1]["epoch_lines"][0]
    assert main(["report", _write(tmp_path / "rows.jsonl", rows), "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/wrn-28-10-cifar10-loss.png").read_bytes().startswith(b"\x89PNG")


def test_an_output_that_is_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _write(tmp_path / "rows.jsonl", ROWS[:1])
    assert main(["report", source, "--output", source]) == 2
    assert "--output" in capsys.readouterr().err
    assert len(read_rows([source])) == 1


def test_another_recipe_is_another_setting(tmp_path: Path) -> None:
    """Runs with a flag of the recipe's are not seeds of those without."""
    rows = [row("sc", 1, 0, 4.0), row("sc", 1, 1, 2.0, departures={"schedule": "onecycle", "ema": 0.999})]
    assert main(["report", _write(tmp_path / "rows.jsonl", rows), "--output", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report/report.md").read_text()
    assert "recipe cifar. Mean" in text
    assert "recipe cifar with schedule onecycle, ema 0.999. Mean" in text
    assert [cells[2:5:2] for cells in _cells(text, "SC", "1")] == [["1", "4.00"], ["1", "2.00"]]


def test_epochs_are_plotted_of_what_runs_have(tmp_path: Path) -> None:
    rows = [row("sc", 1, 0, 4.0), row("gc", 2, 0, 5.0)]
    for each in rows:
        for line in each["epoch_lines"]:
            line.update(test_loss=3.0 / line["epoch"], test_error_percent=20.0 / line["epoch"])
    out = tmp_path / "out"
    assert main(["report", _write(tmp_path / "rows.jsonl", rows), "--output", str(out)]) == 0
    for name, label in (("loss", "training loss"), ("test-loss", "test loss"), ("test-error", "test error, %")):
        said = written_in(out / f"wrn-28-10-cifar10-{name}.svg")
        assert {label, "epoch", "N = 2", "SC", "GC"} <= set(said)
        assert f"(wrn-28-10-cifar10-{name}.png)" in (out / "report.md").read_text()


def test_without_test_figures_of_epochs_there_is_no_picture_of_them(folder: Path) -> None:
    assert not list(folder.glob("*-test-*")) and "-test-" not in (folder / "report.md").read_text()


def test_at_one_n_errors_are_bars_beside_the_papers(tmp_path: Path) -> None:
    rows = [{**line, "dtype": "float32"} for line in ROWS if line["groups"] in (1, 2)]
    assert main(["report", _write(tmp_path / "rows.jsonl", rows), "--output", str(tmp_path / "out")]) == 0
    said = written_in(tmp_path / "out/wrn-28-10-cifar10-error.svg")
    assert {"4.50", "5.50", "4.00"} <= set(said)  # of SC, GC and GC-2L, each a mean over its seeds
    assert {"dashed: the paper's", "test error, %"} <= set(said)
    assert any("Abacus 9, 2 cores; batch 128; float32" in text for text in said)


def test_at_several_n_the_papers_errors_are_named(folder: Path) -> None:
    said = written_in(folder / "wrn-28-10-cifar10-error.svg")
    assert {"dotted: the paper's", "N, number of groups"} <= set(said)
