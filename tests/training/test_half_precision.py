"""Runs whose weights DeepSpeed keeps in bf16 or fp16: they train as in fp32 to the type's precision, and resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.training.runs import metrics, train
from tlgc_mp.engine.config import dtype_of
from tlgc_mp.json_types import JsonObject


def _run(folder: Path, ranks: int, config: dict[str, object], *options: str) -> list[float]:
    """The training losses of a run, an epoch each."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    flags = ("--deepspeed_config", str(folder / "config.json"), "--limit-steps", "4", "--tp", str(ranks), *options)
    outcomes = run_ranks(ranks, train, str(folder / "run"), *flags)
    assert [outcome.status for outcome in outcomes] == [0] * ranks, outcomes[0].stderr
    return [line["train_loss"] for line in metrics(folder / "run")]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("kind", "stage", "ranks", "within"),
    [("bf16", 3, 1, 4e-3), ("bf16", 1, 2, 4e-3), ("fp16", 2, 1, 4e-4), ("fp16", 1, 2, 4e-4)],
)
def test_losses_are_those_of_fp32(kind: str, stage: int, ranks: int, within: float, tmp_path: Path) -> None:
    half = {"enabled": True, **({"initial_scale_power": 8} if kind == "fp16" else {})}  # no step overflows
    config: dict[str, object] = {"zero_optimization": {"stage": stage}}
    exact = _run(tmp_path / "fp32", 1, config)
    losses = _run(tmp_path / kind, ranks, {**config, kind: half})
    assert losses == pytest.approx(exact, rel=within) and losses != exact
    assert exact[0] - exact[1] > 20 * abs(losses[0] - exact[0]), "little was learned"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_a_resumed_run_goes_on_as_it_was(kind: str, tmp_path: Path) -> None:
    # At first fp16 overflows and halves its scale, which a checkpoint has to hold.
    config: dict[str, object] = {"zero_optimization": {"stage": 1}, kind: {"enabled": True}}
    straight = _run(tmp_path / "straight", 1, config)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "config.json").write_text(json.dumps(config))
    flags = ("--deepspeed_config", str(tmp_path / "again" / "config.json"), "--limit-steps", "4", "--tp", "1")
    stopped = run_ranks(1, _stopped, str(tmp_path / "again" / "run"), *flags)[0]
    assert stopped == 128 + 15
    assert _run(tmp_path / "again", 1, config, "--resume") == straight


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"bf16": {"enabled": True}}, "got FP16_UnfusedOptimizer at ZeRO 0; in bf16 or fp16 use ZeRO 1, 2 or 3"),
        ({"fp16": {"enabled": True}}, "got FP16_UnfusedOptimizer at ZeRO 0; in bf16 or fp16 use ZeRO 1, 2 or 3"),
        (
            {
                **{"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
                "zero_optimization": {"stage": 1},
            },
            "got BF16_Optimizer at ZeRO 1; in bf16 or fp16 use ZeRO 1, 2 or 3, and leave out data_types.grad_accum",
        ),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "deepspeed_config must be one that DeepSpeed accepts"),
        ({"amp": {"enabled": True}}, "deepspeed_config must be one that DeepSpeed accepts"),
        (
            {"tensorboard": {"enabled": True, "output_path": "/dev/null"}},
            "must be one that DeepSpeed accepts, got an error: [Errno 20] Not a directory: '/dev/null/",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_first_step(
    config: dict[str, object], said: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (outcome,) = run_ranks(
        1, train, str(tmp_path / "run"), "--deepspeed_config", str(tmp_path / "config.json"), "--log-interval", "1"
    )
    (line,) = outcome.stderr.splitlines()
    assert outcome.status == 2 and line.startswith("tlgc-mp: error: ") and said in line, outcome.stderr
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "float32"),
        ({"bfloat16": {"enabled": True}}, "bfloat16"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": False}}, "float16"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "float32 with autocast to float16"),
        ({"bf16": {"enabled": True}, "torch_autocast": {"enabled": True}}, "bfloat16 with autocast to bfloat16"),
    ],
)
def test_the_type_is_said(config: JsonObject, said: str) -> None:
    assert dtype_of(config) == said


def _stopped(output_dir: str, *options: str) -> int:
    return train(output_dir, *options, signal_at=(0, 5)).status
