"""The quickstart's job, shortened, gives the same figures under every launcher, told once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.launch.jobs import ROOT, started

TWO_RANKS = ("deepspeed", "mpirun", "torchrun")
OPTIONS = [
    *("--model", "wrn-10-1", "--groups", "4", "--dataset", "digits", "--epochs", "2"),
    *("--deepspeed_config", str(ROOT / "ds_configs" / "zero1.json")),
    # At the recipe's rate one gradient that rounding turns on or off at a ReLU's kink moves the loss by half a percent.
    *("--learning-rate", "0.0005"),
]


@dataclass
class Outcome:
    status: int
    stdout: str
    stderr: str
    lines: list[dict[str, Any]]
    left: dict[int, list[str]]


Runs = Callable[[str], Outcome]


@pytest.fixture(scope="module")
def outcome_under(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """How the job ended under a launcher; it is run once for each."""
    folder = tmp_path_factory.mktemp("launchers")

    @functools.cache
    def run(launcher: str) -> Outcome:
        with started(launcher, OPTIONS, folder / launcher) as job:
            status = job.wait(150)
            return Outcome(status, job.stdout, job.stderr, job.lines(), job.left())

    return run


@pytest.mark.timeout(200)
@pytest.mark.parametrize("launcher", ["plain", *TWO_RANKS])
def test_trains_and_rank_0_alone_tells(outcome_under: Runs, launcher: str) -> None:
    outcome = outcome_under(launcher)

    assert outcome.status == 0, outcome.stdout + outcome.stderr
    ranks = 1 if launcher == "plain" else 2
    told = outcome.stdout.splitlines()
    starts = ["Loading torch", "wrn-10-1,", "epoch 1/2  loss ", "epoch 2/2  loss ", "epoch 2/2  step  6/44  loss "]
    for start in (*starts, "test error ", "parameters ", "checkpoint "):
        assert sum(line.startswith(start) for line in told) == 1, f"{start!r} is not told once:\n{outcome.stdout}"
    assert f"on {ranks} rank(s): {ranks} tensor-parallel x 1 data-parallel" in outcome.stdout
    assert "Traceback" not in outcome.stderr
    assert "terminate called" not in outcome.stderr
    assert [line["epoch"] for line in outcome.lines] == [1, 2]
    assert outcome.lines[1]["train_loss"] < outcome.lines[0]["train_loss"]
    assert not outcome.left


@pytest.mark.timeout(200)
@pytest.mark.parametrize("launcher", TWO_RANKS[1:])
def test_launchers_give_the_same_figures(outcome_under: Runs, launcher: str) -> None:
    assert _figures(outcome_under(launcher)) == _figures(outcome_under(TWO_RANKS[0]))


@pytest.mark.timeout(200)
def test_two_ranks_give_the_figures_of_one_process(outcome_under: Runs) -> None:
    """P ranks compute what one does, but sum in another order."""
    one, two = (outcome_under(launcher).lines for launcher in ("plain", TWO_RANKS[0]))
    assert [line["train_loss"] for line in two] == pytest.approx([line["train_loss"] for line in one], rel=1e-4)


def _figures(outcome: Outcome) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if not key.endswith("seconds")} for line in outcome.lines]
