"""Every DeepSpeed configuration that comes with the project trains."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.training.runs import metrics, train

FOLDER = Path(__file__).parents[2] / "ds_configs"
CONFIGS = sorted(path.name for path in FOLDER.glob("*.json"))


def test_there_are_configurations() -> None:
    assert CONFIGS


@pytest.mark.timeout(150)
@pytest.mark.parametrize(("config", "world"), [*((config, 2) for config in CONFIGS), ("tp2_zero2.json", 4)])
def test_configuration_trains(tmp_path: Path, config: str, world: int) -> None:
    options = ("--epochs", "1", "--deepspeed_config", str(FOLDER / config))
    outcomes = run_ranks(world, train, str(tmp_path / "run"), *options)

    assert [outcome.status for outcome in outcomes] == [0] * world, outcomes[0].stderr
    assert f"2 tensor-parallel x {world // 2} data-parallel" in outcomes[0].stdout
    (line,) = metrics(tmp_path / "run")
    assert math.isfinite(line["train_loss"]) and math.isfinite(line["test_loss"])
    assert line["train_loss"] < 4.0  # ln 10 = 2.3 is what a model that knows nothing has
    described = json.loads((tmp_path / "run" / "checkpoints" / "epoch-1" / "checkpoint.json").read_text())
    assert described["zero_stage"] == json.loads((FOLDER / config).read_text())["zero_optimization"]["stage"]
