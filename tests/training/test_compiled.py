"""``train --compile``: the figures of a run without, exact resume, and what is refused."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from unittest import mock

import pytest

from tests.launch.forked import figures
from tests.ranks import run_ranks
from tests.training.runs import OPTIONS, Outcome, metrics, train
from tlgc_mp.cli.main import main


def _without_inductor(output_dir: str, *options: str, signal_at: tuple[int, int] | None = None) -> Outcome:
    """Inductor takes minutes for what this takes seconds for."""
    with mock.patch.dict(os.environ, CXX="no-such-compiler"):
        return train(output_dir, *options, signal_at=signal_at)


def _stopped(signal_at: tuple[int, int], output_dir: str, *options: str) -> Outcome:
    return _without_inductor(output_dir, *options, signal_at=signal_at)


@pytest.mark.timeout(400)
def test_stopped_and_resumed_as_if_never_stopped(tmp_path: Path) -> None:
    options = ("--tp", "2", "--epochs", "1")
    eager = run_ranks(2, train, str(tmp_path / "eager"), *options)
    whole = run_ranks(2, _without_inductor, str(tmp_path / "whole"), *options, "--compile")
    assert [outcome.status for outcome in (*eager, *whole)] == [0] * 4, whole[0].stderr
    assert "compiles the model (aot_eager)" in whole[0].stdout and "compiles" not in eager[0].stdout
    stopped = run_ranks(2, _stopped, (0, 4), str(tmp_path / "run"), *options, "--compile")
    assert [outcome.status for outcome in stopped] == [128 + signal.SIGTERM] * 2, stopped[0].stderr
    resumed = run_ranks(2, _without_inductor, str(tmp_path / "run"), *options, "--resume")
    assert [outcome.status for outcome in resumed] == [0, 0], resumed[0].stderr
    assert "compiles the model" in resumed[0].stdout
    assert figures(metrics(tmp_path / "run")) == figures(metrics(tmp_path / "whole"))
    (line,), (expected,) = metrics(tmp_path / "whole"), metrics(tmp_path / "eager")
    assert line["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--activation-checkpointing"], "--compile must be left out with --activation-checkpointing"),
        (
            ["--model", "torchvision:resnet18", "--tp", "2"],
            "--compile must be left out with --model=torchvision:resnet18",
        ),
    ],
)
def test_refused_where_there_is_no_graph(
    flags: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert main([*OPTIONS, "--output-dir", "nowhere", "--compile", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tlgc-mp: error: {said}"), line
