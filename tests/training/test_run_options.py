"""The options of a run in a file: one that a user writes, and the one that a run leaves for the next start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launch.forked import figures
from tests.ranks import run_ranks
from tests.training.runs import OPTIONS, STEPS, metrics, step_metrics, tlgc_mp, train, train_until
from tlgc_mp.cli.main import _parser, main
from tlgc_mp.cli.options import parse
from tlgc_mp.errors import UsageError

SMALL = ["train", "--model", "wrn-10-1", "--dataset", "synthetic"]


@pytest.mark.timeout(240)
def test_a_run_knows_its_options(tmp_path: Path) -> None:
    """All of them: model, data, recipe, DeepSpeed configuration."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"gradient_accumulation_steps": 2, "zero_optimization": {"stage": 2}}))
    flags = ("--conv", "gc", "--groups", "2", "--seed", "3", "--tp", "2", "--learning-rate", "0.05", "--keep", "9")
    flags = (*flags, "--deepspeed_config", str(config))
    whole = run_ranks(2, train, str(tmp_path / "whole"), *flags)
    assert [outcome.status for outcome in whole] == [0, 0], whole[0].stderr
    run_ranks(2, train_until, (0, STEPS + 3), str(tmp_path / "run"), *flags)
    config.unlink()
    resumed = run_ranks(2, tlgc_mp, "train", "--resume", "--output-dir", str(tmp_path / "run"))
    assert [outcome.status for outcome in resumed] == [0, 0], resumed[0].stderr
    assert figures(metrics(tmp_path / "run")) == figures(metrics(tmp_path / "whole"))
    results = [json.loads((tmp_path / run / "result.json").read_text()) for run in ("run", "whole")]
    for result in results:
        assert (result["conv"], result["zero_stage"], result["accumulation"]) == ("gc", 2, 2)


@pytest.mark.timeout(240)
def test_a_finished_run_goes_on_to_more_epochs(tmp_path: Path) -> None:
    outcomes = run_ranks(2, train, str(tmp_path))
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].stderr
    before = metrics(tmp_path)
    words = ("train", "--resume", "--output-dir", str(tmp_path), "--epochs", "4")
    resumed = run_ranks(2, tlgc_mp, *words)
    assert [outcome.status for outcome in resumed] == [0, 0], resumed[0].stderr
    assert "Changed from here on: epochs 2 -> 4; the rate is 0.01, " in resumed[0].stdout
    lines = metrics(tmp_path)
    assert figures(lines[:2]) == figures(before)
    assert [(line["epoch"], line["step"]) for line in lines] == [(epoch, STEPS * epoch) for epoch in (1, 2, 3, 4)]
    # The rate falls after 10, 19 and 26 of 32 steps: 0.3, 0.6 and 0.8 of them.
    assert [line["learning_rate"] for line in lines[2:]] == pytest.approx([0.001, 0.0001])
    assert lines[3]["train_loss"] < lines[0]["train_loss"]


@pytest.mark.timeout(240)
def test_the_rate_changes_where_it_is_asked_for(tmp_path: Path) -> None:
    """After 3 steps of the second epoch; it falls after 10 and 13 of the 16."""
    flags = ("--log-interval", "1")
    run_ranks(1, train_until, (0, STEPS + 2), str(tmp_path), *flags)
    words = ("train", "--resume", "--output-dir", str(tmp_path), "--learning-rate", "0.05")
    (outcome,) = run_ranks(1, tlgc_mp, *words)
    assert outcome.status == 0, outcome.stderr
    rates = {line["step"]: line["learning_rate"] for line in step_metrics(tmp_path)}
    stopped = next(step for step in rates if step > 6 and rates[step] < 0.00999)
    assert stopped > STEPS + 2
    expected = [0.1] * 5 + [0.01] * 5 + [0.001] * 3 + [0.0001] * 3
    expected[stopped - 1 :] = [rate / 2 for rate in expected[stopped - 1 :]]
    assert list(rates.values()) == pytest.approx(expected)


@pytest.mark.timeout(240)
def test_the_batch_changes_where_it_is_asked_for(tmp_path: Path) -> None:
    """In the middle of an epoch: the images behind it are as many batches of the new size."""
    run_ranks(1, train_until, (0, STEPS + 2), str(tmp_path))
    (tag,) = [path.name for path in (tmp_path / "checkpoints").iterdir() if "-step-" in path.name]
    done = int(tag.rpartition("-")[2])
    (outcome,) = run_ranks(1, tlgc_mp, "train", "--resume", "--output-dir", str(tmp_path), "--batch-size", "64")
    assert outcome.status == 0, outcome.stderr
    line = metrics(tmp_path)[-1]
    assert line["samples"] == 2 * 1024
    assert line["step"] == STEPS + done + 2 * (STEPS - done)
    assert 0 < line["train_loss"] < metrics(tmp_path)[0]["train_loss"]


@pytest.mark.timeout(120)
def test_what_was_not_asked_for_by_name_is_no_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the run's file, as of a checkpoint that was copied alone, the defaults are another run's."""
    (outcome,) = run_ranks(1, train, str(tmp_path / "run"), "--epochs", "1", "--limit-steps", "1")
    assert outcome.status == 0, outcome.stderr
    (tmp_path / "run" / "run.yaml").unlink()
    words = [*SMALL, "--image-size", "8", "--resume", "--output-dir", str(tmp_path / "run")]
    assert main([*words, "--limit-steps", "1"]) == 2
    assert "; give the same, or another --output-dir, or ask for it by --epochs" in (capsys.readouterr().err)


def _parsed(*words: str, world: int = 1) -> Any:
    return parse(_parser(), words, world)


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                **{"model": "wrn-10-1", "learning-rate": 1e-3, "batch_size": 32, "activation_checkpointing": True},
                **{"limit_steps": None, "deepspeed_config": {"zero_optimization": {"stage": 3}}},
            }
        )
    )
    options = _parsed("train", "--batch-size", "64", "--config", str(path), "--no-activation-checkpointing")
    assert (options.model, options.learning_rate, options.batch_size) == ("wrn-10-1", 1e-3, 64)
    assert (options.activation_checkpointing, options.limit_steps) == (False, None)
    assert options.deepspeed_config == {"zero_optimization": {"stage": 3}}
    assert _parsed("train", "--config", str(path), "--deepspeed_config", "ds.json").deepspeed_config == "ds.json"


@pytest.mark.timeout(120)
def test_a_run_writes_the_file_that_begins_it_again(tmp_path: Path) -> None:
    flags = ["--conv", "sc", "--learning-rate", "1e-4", "--activation-checkpointing", "--limit-steps", "1"]
    (outcome,) = run_ranks(1, train, str(tmp_path / "run"), *flags)
    assert outcome.status == 0, outcome.stderr
    written = _parsed("train", "--config", str(tmp_path / "run/run.yaml"), "--output-dir", "other")
    given = _parsed(*OPTIONS, *flags, "--output-dir", "other")
    del written.config, given.config
    assert vars(written) == vars(given)
    other = _parsed("train", "--config", str(tmp_path / "run/run.yaml"), "--conv", "gc-2l")
    assert (other.conv, other.groups) == ("gc-2l", 4)


def test_a_run_that_goes_on_over_other_ranks(tmp_path: Path) -> None:
    """What P was is not held against it where it no longer divides the ranks."""
    (tmp_path / "run.yaml").write_text("model: wrn-10-1\ntp: 2\n")
    for world, expected in ((4, 2), (2, 2), (1, None), (3, None)):
        assert _parsed("train", "--resume", "--output-dir", str(tmp_path), world=world).tp == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("batch_size: many", "run.yaml': argument --batch-size: invalid int value: 'many'"),
        ("batch_size: [1, 2]", "run.yaml': batch_size must be a number, text, true or false, got [1, 2]"),
        ("resume: here", 'resume must be left out, got "here"; give it as a flag'),
        ("optimiser_speed: 2", "run.yaml': unrecognized arguments: --optimiser-speed=2"),
        ("- epochs", 'run.yaml\' must hold options, as `epochs: 2`, a line each, got ["epochs"]'),
        ("epochs: [", "--config must be a YAML file, got "),
        ("ema: false", "run.yaml': ema must be left out where it is not wanted, got false; remove the line"),
        ("batch_size: 1\nbatch-size: 2", "run.yaml' must have each option once, got batch_size 2 times; keep one"),
        ("bach_size: false", "run.yaml': unrecognized arguments: --no-bach-size"),
    ],
)
def test_a_file_that_cannot_work_is_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UsageError) as refused:
        _parsed("train", "--config", str(tmp_path / "run.yaml"))
    assert said in str(refused.value), refused.value


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--config must be .* got '/nowhere/run.yaml': it is no file"):
        _parsed("train", "--config", "/nowhere/run.yaml")
