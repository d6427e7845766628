"""The scripts that train the paper's tables: which rows they start, on how many ranks, and how they go on.

A stand-in for the launcher notes what it is asked to train and leaves a finished run; ``SMALLEST=1`` trains for real.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.test_training_report import ROWS
from tlgc_mp.paper.printed import printed_rows

SCRIPTS = Path(__file__).parents[2] / "scripts"

STAND_IN = """
import json, os, sys
ranks, arguments = int(sys.argv[1]), sys.argv[2:]
options = dict(zip(arguments, arguments[1:]))
with open(os.environ["NOTES"], "a") as file:
    file.write(json.dumps([ranks, arguments]) + "\\n")
if options["--conv"] == os.environ.get("FAILS"):
    sys.exit("it does not fit")
row = json.loads(os.environ["ROW"])
row.update({key: options["--" + key] for key in ("model", "conv", "dataset")}, groups=int(options["--groups"]))
with open(os.path.join(options["--output-dir"], "result.json"), "w") as file:
    file.write(json.dumps(row))
"""


class Bench:
    """A copy of the scripts that installs nothing, and the stand-in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        checkout = folder / "checkout"
        shutil.copytree(SCRIPTS, checkout / "scripts")
        with open(checkout / "scripts/environment.sh", "a") as file:
            file.write("\nprepare_environment() { :; }\n")
        (folder / "stand_in.py").write_text(STAND_IN)
        self.notes = folder / "notes.jsonl"

    def run(self, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.folder / "checkout" / "scripts" / script), "data", "out"],
            cwd=self.folder,
            env={
                **os.environ,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "LAUNCHER": f"{sys.executable} {self.folder}/stand_in.py {{ranks}}",
                "NOTES": str(self.notes),
                "ROW": json.dumps(ROWS[0]),
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=120,
        )

    def started(self) -> list[tuple[int, dict[str, str], list[str]]]:
        """(ranks, options, all arguments) of each row, in order."""
        rows = [json.loads(line) for line in self.notes.read_text().splitlines()]
        return [(ranks, _options(arguments), arguments) for ranks, arguments in rows]


def _options(arguments: list[str]) -> dict[str, str]:
    flags = [index for index, word in enumerate(arguments) if word.startswith("--")]
    return {arguments[i]: arguments[i + 1] for i in flags if i + 1 < len(arguments) and i + 1 not in flags}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.mark.parametrize("table", [1, 2, 3, 4])
def test_every_printed_row_is_trained(bench: Bench, table: int) -> None:
    done = bench.run(f"reproduce_table{table}.sh")
    assert done.returncode == 0, done.stderr
    started = [
        (options["--model"], options["--conv"], int(options["--groups"]), options["--dataset"])
        for _, options, _ in bench.started()
    ]
    printed = [
        (row.model, row.conv, row.groups, dataset)
        for row in printed_rows()
        for dataset in row.errors
        # Table 3 repeats GC and GC-2L from Table 1.
        if row.table == table or (table == 3 and row.table == 1 and row.conv in ("gc", "gc-2l"))
    ]
    assert sorted(started) == sorted(printed)
    assert {options["--data-dir"] for _, options, _ in bench.started()} == {
        str(bench.folder / "data" / dataset) for _, _, _, dataset in printed
    }
    assert f"The paper's Table {table}" in (bench.folder / "out/report/report.md").read_text()


def test_table_2_has_a_rank_for_each_group(bench: Bench) -> None:
    assert bench.run("reproduce_table2.sh").returncode == 0
    ranks = {(o["--model"], o["--conv"], o["--groups"]): ranks for ranks, o, _ in bench.started()}
    assert {key: count for key, count in ranks.items() if key[1] == "gc-2l"} == {
        (f"wrn-28-{width}", "gc-2l", str(groups)): groups for width in (40, 60, 80) for groups in (2, 4)
    }
    dense = {options["--model"]: (ranks, options["--tp"]) for ranks, options, _ in bench.started() if "--tp" in options}
    assert dense == {"wrn-28-40": (1, "1"), "wrn-28-60": (2, "2"), "wrn-28-80": (4, "4")}


def test_finished_rows_are_left_and_others_go_on(bench: Bench) -> None:
    assert bench.run("reproduce_table4.sh", FAILS="flgc").returncode == 1
    first = bench.started()
    assert len(first) == 13  # those after a failure too
    checkpoints = bench.folder / "out/mobilenet_v2-flgc-4-imagenet/checkpoints"
    checkpoints.mkdir()
    (checkpoints / "latest").write_text("epoch-1\n")
    bench.notes.unlink()
    assert bench.run("reproduce_table4.sh").returncode == 0
    again = bench.started()
    assert [(o["--conv"], o["--groups"]) for _, o, _ in again] == [("flgc", "2"), ("flgc", "4"), ("flgc", "8")]
    assert all(arguments[arguments.index("--resume") + 1] == "auto" for _, _, arguments in again)


def test_a_failure_is_told_with_its_last_line(bench: Bench) -> None:
    done = bench.run("reproduce_table4.sh", FAILS="sc")
    assert "mobilenet_v2-sc-1-imagenet failed: it does not fit" in done.stderr


def test_smallest_keeps_rows_and_shrinks_their_input(bench: Bench) -> None:
    assert bench.run("reproduce_table2.sh", SMALLEST="1").returncode == 0
    for _, options, _ in bench.started():
        assert options["--model"] in ("wrn-28-4", "wrn-28-6", "wrn-28-8")
        assert (options["--dataset"], options["--limit-steps"], options["--num-classes"]) == ("synthetic", "1", "10")


def test_the_small_reproduction_is_its_whole_grid(bench: Bench) -> None:
    (bench.folder / "data").mkdir()
    done = bench.run("reproduce_small.sh")
    assert done.returncode == 0, done.stderr
    started = [
        (o["--conv"], o["--groups"], o["--seed"], o.get("--coarse-kernel-size"), o.get("--coarse-init"))
        for _, o, _ in bench.started()
    ]
    convolutions = ("gc", "gc-2l", "gc-2l-proto", "shuffle", "flgc")
    variants = [("sc", "1", None, None)]
    variants += [(conv, groups, None, None) for conv in convolutions for groups in ("2", "4", "8", "16")]
    variants += [("gc-2l", "8", "1", None), ("gc-2l", "8", None, "scaled"), ("gc-2l", "8", None, "he")]
    expected = [(conv, groups, seed, *rest) for seed in "012" for conv, groups, *rest in variants]
    assert sorted(map(str, started)) == sorted(map(str, expected))
