"""A run that was stopped and resumed gives the figures of one that was not; what cannot be resumed is refused."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.forked import figures
from tests.ranks import run_ranks
from tests.training.runs import EPOCHS, OPTIONS, STEPS, metrics, train, train_until
from tlgc_mp.cli.main import main

WholeRun = Callable[[int], Path]
FIGURES = ("epoch", "step", "samples", "learning_rate", "train_loss", "test_loss", "test_error_percent")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> WholeRun:
    """The folder of a run that nothing stopped, of two ranks, P of them tensor-parallel; it is run once for each P."""
    folder = tmp_path_factory.mktemp("whole")

    @functools.cache
    def run(tensor_parallel: int) -> Path:
        output_dir = folder / str(tensor_parallel)
        outcomes = run_ranks(2, train, str(output_dir), "--tp", str(tensor_parallel))
        assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].stderr
        return output_dir

    return run


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("tensor_parallel", "asked", "step", "tag"),
    [
        (2, 1, STEPS - 1, "epoch-1"),  # between training and evaluation
        (2, 1, -1, "epoch-1"),  # in the middle of the first evaluation
        (2, 0, STEPS + 3, "epoch-2-step-4"),
        (1, 1, STEPS + 3, "epoch-2-step-4"),
    ],
)
def test_stopped_and_resumed_as_if_never_stopped(
    tmp_path: Path, whole_run: WholeRun, tensor_parallel: int, asked: int, step: int, tag: str
) -> None:
    output_dir, split = str(tmp_path / "run"), ("--tp", str(tensor_parallel))

    stopped = run_ranks(2, train_until, (asked, step), output_dir, *split)
    assert [outcome.status for outcome in stopped] == [128 + signal.SIGTERM] * 2, stopped[0].stderr
    checkpoint = tmp_path / "run" / "checkpoints" / tag
    assert checkpoint.is_dir()
    assert (checkpoint.parent / "latest").read_text() == f"{tag}\n"
    assert [outcome.stderr.splitlines() for outcome in stopped] == [
        [f"tlgc-mp: stopped by SIGTERM; --resume goes on from {checkpoint}"],
        [],
    ]
    assert len(metrics(tmp_path / "run")) == (0 if tag == "epoch-1" else 1)

    resumed = run_ranks(2, train, output_dir, *split, "--resume")
    assert [outcome.status for outcome in resumed] == [0, 0], resumed[0].stderr
    lines, expected = metrics(tmp_path / "run"), metrics(whole_run(tensor_parallel))
    assert len(lines) == len(expected) == EPOCHS
    for line, other in zip(lines, expected, strict=True):
        for key in FIGURES:
            assert line[key] == other[key], key


@pytest.mark.timeout(240)
@pytest.mark.parametrize("flags", [("--save-every-steps", "3"), ("--save-every", "0.00001")])
def test_saved_between_epochs_and_resumed_as_if_never_stopped(
    tmp_path: Path, whole_run: WholeRun, flags: tuple[str, str]
) -> None:
    run = tmp_path / "run"
    saving = run_ranks(2, train, str(run), "--tp", "2", "--keep", "99", *flags)
    assert [outcome.status for outcome in saving] == [0, 0], saving[0].stderr
    assert figures(metrics(run)) == figures(metrics(whole_run(2)))
    saved = {path.name for path in (run / "checkpoints").iterdir() if path.is_dir()}
    between = {int(tag.rpartition("-")[2]) for tag in saved if tag.startswith("epoch-2-step-")}
    assert {"epoch-1", "epoch-2"} <= saved and len(saved) - 2 >= 2 and all(0 < each < STEPS for each in between)
    if flags[0] == "--save-every-steps":
        assert saved == {f"epoch-{epoch}{step}" for epoch in (1, 2) for step in ("", "-step-3", "-step-6")}
    waited = [line for line in saving[0].stdout.splitlines() if line.startswith("saving ")]
    assert len(waited) == 1 and f"waited for {len(saved)} checkpoint(s)" in waited[0]

    resumed = run_ranks(2, train, str(run), "--tp", "2", "--resume", f"{run}/checkpoints/epoch-2-step-{max(between)}")
    assert [outcome.status for outcome in resumed] == [0, 0], resumed[0].stderr
    assert figures(metrics(run)) == figures(metrics(whole_run(2)))


@pytest.mark.timeout(240)
@pytest.mark.parametrize("stage", [0, 3])
def test_four_ranks_with_all_there_is_to_remember(tmp_path: Path, stage: int) -> None:
    """2 x 2 ranks, bf16 autocast, two micro-batches a step, clipping, Adam with DeepSpeed's warm-up of the rate."""
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {
                "zero_optimization": {"stage": stage},
                "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
                "gradient_accumulation_steps": 2,
                "gradient_clipping": 1.0,
                "optimizer": {"type": "Adam", "params": {"lr": 0.001, "torch_adam": True}},
                "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_max_lr": 0.001}},
            }
        )
    )
    options = ("--tp", "2", "--deepspeed_config", str(config))
    whole = run_ranks(4, train, str(tmp_path / "whole"), *options)
    assert [outcome.status for outcome in whole] == [0] * 4, whole[0].stderr
    stopped = run_ranks(4, train_until, (3, STEPS + 3), str(tmp_path / "run"), *options)
    assert [outcome.status for outcome in stopped] == [128 + signal.SIGTERM] * 4, stopped[0].stderr
    resumed = run_ranks(4, train, str(tmp_path / "run"), *options, "--resume")
    assert [outcome.status for outcome in resumed] == [0] * 4, resumed[0].stderr
    lines, expected = metrics(tmp_path / "run"), metrics(tmp_path / "whole")
    assert [[line[key] for key in FIGURES] for line in lines] == [[line[key] for key in FIGURES] for line in expected]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("ranks", [2, 1])
def test_dropout_goes_on_as_if_never_stopped(tmp_path: Path, ranks: int) -> None:
    """MobileNetV2 drops a fifth of the classifier's inputs."""
    options = ("--model", "mobilenet_v2", "--epochs", "1", "--batch-size", "256", "--tp", "2")
    whole = run_ranks(2, train, str(tmp_path / "whole"), *options)
    assert [outcome.status for outcome in whole] == [0, 0], whole[0].stderr
    run_ranks(2, train_until, (0, 2), str(tmp_path / "run"), *options)
    resumed = run_ranks(ranks, train, str(tmp_path / "run"), *options, "--tp", str(ranks), "--resume")
    assert [outcome.status for outcome in resumed] == [0] * ranks, resumed[0].stderr
    (line,), (expected,) = metrics(tmp_path / "run"), metrics(tmp_path / "whole")
    assert line["train_loss"] == pytest.approx(expected["train_loss"], rel=0 if ranks == 2 else 1e-5, abs=0)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("saved_by", "resumed_by", "spread"),
    [
        # (P, D)
        ((2, 1), (1, 1), "1 tensor-parallel x 1 data-parallel at ZeRO 1"),
        ((1, 2), (2, 1), "2 tensor-parallel x 1 data-parallel at ZeRO 1"),
    ],
)
def test_goes_on_at_another_shape(
    tmp_path: Path, whole_run: WholeRun, saved_by: tuple[int, int], resumed_by: tuple[int, int], spread: str
) -> None:
    output_dir = str(tmp_path / "run")
    stopped = run_ranks(2, train_until, (0, STEPS + 3), output_dir, "--tp", str(saved_by[0]))
    assert [outcome.status for outcome in stopped] == [128 + signal.SIGTERM] * 2, stopped[0].stderr

    world = resumed_by[0] * resumed_by[1]
    resumed = run_ranks(world, train, output_dir, "--tp", str(resumed_by[0]), "--resume")

    assert [outcome.status for outcome in resumed] == [0] * world, resumed[0].stderr
    before = f"{saved_by[0]} tensor-parallel x {saved_by[1]} data-parallel at ZeRO 1"
    assert f"It was saved as {before}, and goes on as {spread}" in resumed[0].stdout.splitlines()
    lines, expected = metrics(tmp_path / "run"), metrics(whole_run(saved_by[0]))
    assert len(lines) == len(expected) == EPOCHS
    for line, other in zip(lines, expected, strict=True):
        for key in ("epoch", "step", "samples", "learning_rate"):
            assert line[key] == other[key], key
        assert line["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)


@pytest.mark.timeout(120)
def test_a_smaller_micro_batch_is_told(tmp_path: Path, whole_run: WholeRun) -> None:
    output_dir = tmp_path / "run"
    shutil.copytree(whole_run(2), output_dir)
    resumed = run_ranks(2, train, str(output_dir), "--tp", "1", "--resume", f"{output_dir}/checkpoints/epoch-1")
    assert [outcome.status for outcome in resumed] == [0, 0], resumed[0].stderr
    assert "BatchNorm now sees 64 images at once, where it saw 128" in resumed[0].stdout


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("options", "difference"),
    [
        (["--model", "wrn-10-2"], "model='wrn-10-2', got 'wrn-10-1'"),
        (["--conv", "gc"], "conv='gc', got 'gc-2l'"),
        (["--groups", "8"], "groups=8, got 4"),
        (["--seed", "1"], "seed=1, got 0"),
    ],
)
def test_checkpoint_of_another_run_is_refused(
    whole_run: WholeRun,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    difference: str,
) -> None:
    output_dir = whole_run(2)
    before = (output_dir / "metrics.jsonl").read_bytes()
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)

    assert main([*OPTIONS, "--output-dir", str(output_dir), *options, "--resume"]) == 2

    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert err.startswith(f"tlgc-mp: error: --resume must be of a run with {difference} in ")
    assert (output_dir / "metrics.jsonl").read_bytes() == before


@pytest.mark.timeout(120)
def test_a_run_cut_off_before_its_first_checkpoint_stood_begins_again(whole_run: WholeRun, tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints/epoch-1.partial").mkdir(parents=True)
    (tmp_path / "run/metrics.jsonl").write_text('{"epoch": 1}\n{"epo')
    outcomes = run_ranks(2, train, str(tmp_path / "run"))
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes
    assert figures(metrics(tmp_path / "run")) == figures(metrics(whole_run(2)))


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("damage", [_cut, _flip, os.unlink], ids=["cut", "flipped", "missing"])
@pytest.mark.parametrize(
    "name",
    [
        "shard-00-00.safetensors",  # of rank 0
        "shard-01-00.safetensors",  # of rank 1, which does not speak
        "scheduler.pt",
    ],
)
def test_damaged_checkpoint_is_refused(
    tmp_path: Path, whole_run: WholeRun, name: str, damage: Callable[[Path], None]
) -> None:
    output_dir = tmp_path / "run"
    shutil.copytree(whole_run(2), output_dir)
    damage(output_dir / "checkpoints" / f"epoch-{EPOCHS}" / name)

    outcomes = run_ranks(2, train, str(output_dir), "--tp", "2", "--resume", timeout=50)

    assert [outcome.status for outcome in outcomes] == [2, 2], outcomes[0].stderr + outcomes[1].stderr
    errors = [line for line in outcomes[0].stderr.splitlines() if line.startswith("tlgc-mp: error:")]
    assert len(errors) == 1, outcomes[0].stderr
    assert str(output_dir / "checkpoints" / f"epoch-{EPOCHS}" / name) in errors[0]
    assert f"{str(output_dir / 'checkpoints' / 'epoch-1')!r}: go on from that" in errors[0]
    assert outcomes[1].stderr == ""

    resumed = run_ranks(2, train, str(output_dir), "--tp", "2", "--resume", str(output_dir / "checkpoints" / "epoch-1"))
    assert [outcome.status for outcome in resumed] == [0, 0], resumed[0].stderr
    lines, expected = metrics(output_dir), metrics(whole_run(2))
    assert [[line[key] for key in FIGURES] for line in lines] == [[line[key] for key in FIGURES] for line in expected]
    assert (output_dir / "checkpoints" / "latest").read_text() == f"epoch-{EPOCHS}.2\n"
