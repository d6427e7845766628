"""Which tests are fast, and what ``scripts/test.sh --fast`` runs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tlgc_mp
from tests.bench import test_launch
from tests.conftest import _takes_long
from tests.models import test_compiled
from tests.parallel import common, test_engine_parity, test_operator_speed
from tests.training import test_bad_input
from tlgc_mp.cli.main import main

ROOT = Path(__file__).parents[1]


def _by_a_helper() -> None:
    common.run_ranks_once(2, print)


def _in_a_table() -> Any:
    return _TABLE["a"][0]()


def _in_an_import() -> None:
    from tests.ranks import run_ranks

    run_ranks(2, print)


class _Started:
    def __init__(self) -> None:
        self.process = subprocess.Popen(["true"])


def _in_a_class() -> None:
    _Started()


def _engine() -> None:
    tlgc_mp.initialize(model=torch.nn.Linear(1, 1), config={})


def _in_small() -> None:
    main(["bench", "scaling", "--quick"])


def _refused() -> None:
    with pytest.raises(SystemExit):
        main(["bench", "scaling", "--width", "none"])


def _one_layer() -> None:
    torch.nn.Conv2d(2, 2, 1)(torch.ones(1, 2, 3, 3))


_TABLE = {"a": [_by_a_helper]}


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (_by_a_helper, "start processes"),
        (_in_a_table, "start processes"),
        (_in_an_import, "start processes"),
        (_in_a_class, "start processes"),
        (_in_small, "measure"),
        (test_launch.test_a_rank_that_hangs_is_ended, "measure"),
        (test_compiled.test_models_for_imagenet, "compile or export"),
        (test_engine_parity.test_bf16_autocast, "start an engine"),
        (_engine, "start an engine"),
        (test_operator_speed.test_gradients_take_little, "judge by the clock"),
        (_refused, None),
        (_one_layer, None),
        (test_bad_input.test_mistake_in_the_arguments, None),
    ],
)
def test_what_takes_long_is_found(function: Callable[..., Any], reason: str | None) -> None:
    assert _takes_long(function) == reason


def _marked(request: pytest.FixtureRequest) -> bool:
    return request.node.get_closest_marker("fast") is not None


@pytest.fixture
def started() -> None:
    _Started()


@pytest.mark.parametrize("case", [1, 2])
def test_the_first_case_is_fast(case: int, request: pytest.FixtureRequest) -> None:
    assert _marked(request) == (case == 1)


def test_a_fixture_counts(started: None, request: pytest.FixtureRequest) -> None:
    assert not _marked(request)


@pytest.mark.parametrize(
    ("option", "words"),
    [(["--fast"], ["-m", "fast"]), (["--slow"], ["-m", "slow or not slow"]), ([], [])],
)
def test_the_script(option: list[str], words: list[str], tmp_path: Path) -> None:
    """With a stand-in for each tool, which notes how it is called, a word a line."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/test.sh", tmp_path / "scripts")
    (tmp_path / "scripts/environment.sh").write_text(f"root={tmp_path}\nprepare_environment() {{ :; }}\n")
    for tool in ("python", "ruff", "mypy"):
        (tmp_path / tool).write_text('#!/bin/sh\nprintf "%s\\n" "${0##*/}" "$@" >>"$NOTES"\n')
        (tmp_path / tool).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NOTES": str(tmp_path / "notes")}
    subprocess.run([tmp_path / "scripts/test.sh", *option, "tests/a b"], env=environment, check=True, timeout=60)
    checks = ["ruff", "check", ".", "ruff", "format", "--check", ".", "mypy"]
    tests = ["python", "-m", "pytest", *words, "tests/a b"]
    assert (tmp_path / "notes").read_text().splitlines() == [*checks, *tests]


@pytest.mark.parametrize("lane", ["fast", "not slow"])
def test_what_is_left_out_is_counted(lane: str, tmp_path: Path) -> None:
    """At the end of the fast tests, and of no others."""
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests/conftest.py", tmp_path / "tests")
    (tmp_path / "tests/test_some.py").write_text(
        "import subprocess\nimport pytest\n"
        "@pytest.mark.parametrize('case', range(3))\ndef test_cases(case): pass\n"
        "def test_process(): subprocess.run(['true'])\n"
    )
    command = ["python", "-m", "pytest", "-p", "no:cacheprovider", "-m", lane, "-q", "tests"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    counts = "left out: 2 that are further cases of a fast one, 1 that start processes"
    assert (counts in done.stdout) == (lane == "fast")
    assert ("1 passed, 3 deselected" if lane == "fast" else "4 passed") in done.stdout
