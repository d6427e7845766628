"""Trying a run: what it says of itself, what it would do, and where its time goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.training.runs import STEPS, metrics, train


def _config(folder: Path) -> str:
    monitors = {key: {"enabled": True, "output_path": str(folder), "job_name": key} for key in ("tensorboard",)}
    settings = {
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": 2},
        "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
    }
    (folder / "config.json").write_text(json.dumps({**settings, **monitors}))
    return str(folder / "config.json")


@pytest.mark.timeout(120)
def test_a_dry_run_says_everything_and_writes_nothing(tmp_path: Path) -> None:
    config = _config(tmp_path)
    outcomes = run_ranks(
        4, train, str(tmp_path / "run"), "--tp", "2", "--dry-run", "--deepspeed_config", config, "--epochs", "1"
    )
    assert [outcome.status for outcome in outcomes] == [0] * 4, outcomes[0].stderr
    lines = outcomes[0].stdout.splitlines()
    assert (
        "1,024 images of 10 classes, 8 x 8 pixels, batch 128 (2 replicas x 2 micro-batches x 32), 8 steps an epoch, "
        f"1 epoch; cpu, float32 with autocast to bfloat16, ZeRO 2; output in {tmp_path / 'run'}"
    ) in lines
    assert lines[-1] == "Nothing is trained or written (--dry-run)"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert all(outcome.stdout == "" for outcome in outcomes[1:])


@pytest.mark.timeout(120)
def test_a_dry_run_refuses_what_a_run_would(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"zero_optimization": {"stage": 1, "reduce_bucket_size": "many"}}')
    flags = ("--dry-run", "--deepspeed_config", str(tmp_path / "config.json"))
    (outcome,) = run_ranks(1, train, str(tmp_path / "run"), *flags)
    assert outcome.status == 2
    assert "deepspeed_config must be one that DeepSpeed accepts, got an error: " in outcome.stderr


@pytest.mark.timeout(120)
def test_the_headline_of_one_device(tmp_path: Path) -> None:
    (outcome,) = run_ranks(1, train, str(tmp_path / "run"), "--dry-run", "--limit-steps", "1")
    assert outcome.status == 0, outcome.stderr
    assert "8 x 8 pixels, batch 128, 1 step an epoch, 2 epochs; cpu, float32, ZeRO 1; output in " in outcome.stdout


@pytest.mark.timeout(120)
def test_a_profile_of_some_steps(tmp_path: Path) -> None:
    """Of the third and fourth; the run is the same."""
    outcomes = run_ranks(2, train, str(tmp_path / "run"), "--tp", "2", "--profile", "2", "--epochs", "1")
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].stderr
    path = tmp_path / "run/profile/rank-0.json"
    assert ["profile", str(path)] in [line.split() for line in outcomes[0].stdout.splitlines()]
    for rank in (0, 1):
        events = json.loads((path.parent / f"rank-{rank}.json").read_text())["traceEvents"]
        names = [event.get("name", "") for event in events]
        assert {name for name in names if name.startswith("ProfilerStep")} == {"ProfilerStep#2", "ProfilerStep#3"}
        assert names.count("aten::cross_entropy_loss") == 2
    assert metrics(tmp_path / "run")[-1]["step"] == STEPS


@pytest.mark.timeout(120)
@pytest.mark.parametrize("steps", [2, 3])
def test_a_profile_of_a_run_that_is_over_before(steps: int, tmp_path: Path) -> None:
    flags = ("--profile", "2", "--epochs", "1", "--limit-steps", str(steps))
    (outcome,) = run_ranks(1, train, str(tmp_path / "run"), *flags)
    assert outcome.status == 0, outcome.stderr
    path = tmp_path / "run/profile/rank-0.json"
    assert path.exists() == (steps == 3)
    told = str(path) if steps == 3 else "none: there was no step after the first 2 of this start"
    assert f"profile      {told}\n" in outcome.stdout
