"""Rows, and the tables and plot made from them, hold the numbers that were measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.bench import fabricated
from tlgc_mp import figures
from tlgc_mp.bench import report
from tlgc_mp.bench.scaling.rows import Record, make_row
from tlgc_mp.bench.settings import Case


def _cells(text: str, *first: str) -> list[list[str]]:
    """The table lines that begin with these cells."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [cells for cells in lines if cells[: len(first)] == list(first)]


def test_a_sample_is_the_slowest_ranks_step() -> None:
    case = Case("gc-2l", 28, 10, 2, 2, 8)
    rounds = [
        (0, [fabricated.rank_result([1.0, 4.0], [0.5, 0.7]), fabricated.rank_result([2.0, 3.0], [0.9, 0.6])]),
        (1, [fabricated.rank_result([3.0, 3.0], [0.5, 0.5]), fabricated.rank_result([3.0, 5.0], [0.8, 0.8])]),
    ]
    row = make_row(Record(case, True, measurements=rounds), "fp32", 2e9, cores=2)
    assert [(s["round"], s["step"], s["seconds"]) for s in row["samples"]] == [
        (0, 0, 2.0),
        (0, 1, 4.0),
        (1, 0, 3.0),
        (1, 1, 5.0),
    ]
    assert row["samples"][0]["busy_cpu_seconds"] == [0.5, 0.9]
    assert row["median_step_seconds"] == 3.5
    assert row["images_per_second"] == pytest.approx(8 / 3.5)
    assert row["busy_cpu_seconds"] == pytest.approx(0.8)  # of 0.9, 0.7, 0.8, 0.8
    assert row["achieved_flops_per_second"] == pytest.approx(1e9 / 3.5)
    assert row["achieved_share"] == pytest.approx(0.5 / 3.5)
    assert row["hours_for_200_epochs"] == pytest.approx(200 * 50_000 * 3.5 / 8 / 3600)


def test_arithmetic_is_over_cpu_seconds_where_a_rank_idles_or_shares_its_core() -> None:
    assert fabricated.row("naive-mp", 40, 2, 4.0, 2.0)["achieved_flops_per_second"] == pytest.approx(0.5e9)
    assert fabricated.row("gc-2l", 40, 4, 4.0, 2.0)["achieved_flops_per_second"] == pytest.approx(0.5e9)
    assert fabricated.row("gc-2l", 40, 2, 4.0, 2.0)["achieved_flops_per_second"] == pytest.approx(0.25e9)


def test_on_accelerators_arithmetic_is_over_their_own_seconds_where_a_rank_idles() -> None:
    ranks = [fabricated.rank_result([4.0], [9.0], busy_device_seconds=0.5)] * 2
    ours, dense = (
        make_row(Record(Case(name, 28, 40, 2, 2, 8), True, measurements=[(0, ranks)]), "fp32", 2e9, cores=1)
        for name in ("gc-2l", "naive-mp")
    )
    assert ours["achieved_flops_per_second"] == pytest.approx(0.25e9)
    assert dense["achieved_flops_per_second"] == pytest.approx(2e9)
    machine = {**fabricated.DESCRIPTION["machine"], "accelerator": "Abacus X"}
    text = report.markdown([ours], {**fabricated.DESCRIPTION, "machine": machine})
    assert "Machine: Abacus X on Abacus 9, 2 cores" in text
    assert _cells(text, "40", "gc-2l", "2", "2")[1][6:9] == ["9.000", "0.500", "1.0"]


def test_memory_is_that_of_the_rank_with_the_largest_peak() -> None:
    ranks = [
        fabricated.rank_result([1.0], [1.0], peak_memory_bytes=9, activation_bytes=3),
        fabricated.rank_result([1.0], [1.0], peak_memory_bytes=8, activation_bytes=5),
    ]
    row = make_row(Record(Case("gc-2l", 28, 10, 2, 2, 8), True, measurements=[(0, ranks)]), "fp32", 2e9, cores=2)
    assert (row["peak_memory_bytes"], row["activation_bytes"]) == (9, 3)


def test_every_row_has_the_same_keys() -> None:
    failed = make_row(Record(Case("gc", 28, 10, 2, 2, 8), True, error="rank 0: no"), "fp32", None, cores=2)
    assert set(failed) == set(fabricated.row("gc", 10, 2, 1.0, 1.0))
    assert failed["median_step_seconds"] is None and failed["samples"] == [] and failed["error"] == "rank 0: no"


def test_speed_ups_stand_beside_the_papers() -> None:
    text = report.markdown(fabricated.table_2_rows(), fabricated.DESCRIPTION)
    comparison = _cells(text, "40", "gc-2l", "2", "2")[0]
    # 40 x 3.6 s over 40 x 0.95 s; the paper's 49.7158 h over 17.7883 h; N P; 40 x 3.6 s over 40 x 0.9 s
    assert comparison[7:12] == ["38.000", "3.79", "2.79", "4", "4.00"]
    assert comparison[12:] == [f"{200 * 50_000 * 38 / 8 / 3600:.1f}", "17.8"]
    for width, paper in (("40", "5.74"), ("60", "7.61"), ("80", "12.63")):
        at_4 = _cells(text, width, "gc-2l", "4", "4")[0]
        assert at_4[8:12] == ["7.20", paper, "16", "14.40"]  # compared with naive-mp at 2 ranks, there being no other
    assert _cells(text, "60", "naive-mp", "1", "2")[0][13] == "89.8"


def test_activation_checkpointing_is_named() -> None:
    case = Case("gc-2l", 28, 40, 2, 2, 8, activation_checkpointing=True)
    row = make_row(Record(case, True, measurements=[(0, [fabricated.rank_result([1.0], [1.0])] * 2)]), "fp32", 2e9, 2)
    assert row["activation_checkpointing"] is True
    text = report.markdown([row], fabricated.DESCRIPTION)
    assert len(_cells(text, "40", "gc-2l, activation checkpointing", "2", "2")) == 4  # one of each table


def test_all_figures_are_in_the_tables() -> None:
    text = report.markdown([fabricated.row("gc-2l", 10, 2, 4.0, 3.0)], fabricated.DESCRIPTION)
    comparison, times, memory, accounting = _cells(text, "10", "gc-2l", "2", "2")
    assert comparison[8:11] == ["", "", "4"]  # nothing to compare with
    assert times[4:] == ["4.000", "2.00", "3.000", "", "1.0", "0.2", "2.0", "0.12", "0.500", "0.250", "2.00"]
    assert memory[4:] == ["5.0", "1.0", "2.0", "3.0", "4.0"]
    assert accounting[4:] == ["0.750", "0.250"]
    for said in ("Abacus 9, 2 cores, 16 GiB", "torch 2.0", "abc123", "tlgc-mp bench scaling"):
        assert said in text


def test_what_failed_and_what_is_particular_is_told() -> None:
    rows = [
        make_row(Record(Case("zero3", 28, 80, 1, 2, 2), False, error="does not fit"), "fp32", None, cores=2),
        fabricated.row("naive-mp", 80, 2, 1.0, 1.0, note="without momentum"),
    ]
    text = report.markdown(rows, fabricated.DESCRIPTION)
    assert "- zero3, w=80, P=2: does not fit" in text
    assert "- naive-mp, w=80, P=2: without momentum" in text


def test_rows_without_momentum_are_not_compared_with_rows_that_have_it() -> None:
    dense, ours = fabricated.row("naive-mp", 40, 2, 4.0, 2.0), fabricated.row("gc-2l", 40, 2, 1.0, 1.0)
    assert report.speed_up(ours, [dense, ours]) == 4.0
    assert report.speed_up(ours, [{**dense, "momentum": 0.0}, ours]) is None


@pytest.mark.parametrize("rows", [fabricated.table_2_rows(), [fabricated.row("gc", 10, 2, 1.0, 1.0)]])
def test_plot_is_written(tmp_path: Path, rows: list[report.Row]) -> None:
    report.write(rows, fabricated.DESCRIPTION, str(tmp_path))
    growth = ["growth.png", "growth.svg"] if len(rows) > 1 else []
    assert sorted(path.name for path in tmp_path.iterdir()) == [*growth, "scaling.md", "scaling.png", "scaling.svg"]
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (tmp_path / "scaling.svg").read_text()


def written_in(picture: Path) -> list[str]:
    """The texts of a picture, which an SVG of matplotlib holds as comments beside their outlines."""
    return re.findall(r"<!-- (.*?) -->", picture.read_text(), flags=re.DOTALL)


def test_at_one_width_every_strategy_is_a_bar(tmp_path: Path) -> None:
    rows = [row for row in fabricated.table_2_rows() if row["width"] == 40]
    failed = make_row(Record(Case("zero3", 28, 80, 1, 2, 2), False, error="does not fit"), "fp32", None, cores=2)
    report.write([*rows, fabricated.row("gc", 40, 2, 20.0, 20.0), failed], fabricated.DESCRIPTION, str(tmp_path))
    said = written_in(tmp_path / "scaling.svg")
    assert {"gc-2l, N = 2, P = 2", "gc-2l, N = 4, P = 4", "naive-mp, N = 1, P = 2", "gc, N = 2, P = 2"} <= set(said)
    assert {"38 (3.79)", "20 (7.20)", "144 (1.00)"} <= set(said)  # 40 x 3.6 s over 40 x 0.95 s and 40 x 0.5 s
    assert said.count("5") >= len(rows) + 1 and said.count("2") >= len(rows) + 1  # MB of memory, and in collectives
    assert not any("zero3" in text for text in said)
    assert "WRN-28-40; Abacus 9, 2 cores; batch 8; fp32" in said


def test_pictures_say_what_they_show(tmp_path: Path) -> None:
    rows = [{**row, "batch_size": 4 if row["width"] == 80 else 8} for row in fabricated.table_2_rows()]
    report.write(rows, fabricated.DESCRIPTION, str(tmp_path))
    said = written_in(tmp_path / "scaling.svg")
    assert {"Abacus 9, 2 cores; batch 8, 4; fp32", "arithmetic allows N P = 4", "arithmetic allows N P = 16"} <= set(
        said
    )
    said = written_in(tmp_path / "growth.svg")
    assert "GC-2L; Abacus 9, 2 cores; batch 8, 4; fp32" in said
    assert "by formula: FLOP at the best rate, 12 bytes a parameter, the coarse level" in said


def test_figures_are_rounded_without_powers_of_ten() -> None:
    given = (0, 0.7743, 12.345, 999.4, 999.6, 3575.9, 2_256_000)
    assert [figures.rounded(value) for value in given] == ["0", "0.774", "12.3", "999", "1,000", "3,580", "2,260,000"]
