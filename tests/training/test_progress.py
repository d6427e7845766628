"""What a run tells of itself while it runs, in every place alike."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.training.runs import OPTIONS, STEPS, metrics, step_metrics, train, train_until
from tlgc_mp.bench.scaling.flops import layer_flops
from tlgc_mp.cli.main import _parser, main
from tlgc_mp.models.factory import create_meta_model
from tlgc_mp.parallel.topology import Launch
from tlgc_mp.training.meter import Meter, as_time, step_flops
from tlgc_mp.training.settings import TrainSettings, resolve

FIGURES = ("loss", "learning_rate", "images_per_second", "tflops_per_rank", "remaining_seconds")
RATES = {4: 0.1, 8: 0.01, 12: 0.001, 16: 0.0001}
"""Of the steps of two epochs: the rate falls after 5, 10 and 13."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run of two ranks, and what it printed."""
    folder = tmp_path_factory.mktemp("progress") / "run"
    outcomes = run_ranks(2, train, str(folder), "--tp", "2", "--log-interval", "4")
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].stderr
    assert outcomes[1].stdout == outcomes[1].stderr == ""
    return folder, outcomes[0].stdout


@pytest.mark.timeout(120)
def test_a_line_every_so_many_steps(run: tuple[Path, str]) -> None:
    lines = step_metrics(run[0])
    assert {line["step"]: line["learning_rate"] for line in lines} == pytest.approx(RATES)
    assert [line["samples"] for line in lines] == [128 * line["step"] for line in lines]
    for line in lines:
        assert set(line) == {"epoch", "step", "samples", *FIGURES}
    for epoch in metrics(run[0]):
        losses = [line["loss"] for line in lines if line["epoch"] == epoch["epoch"]]
        assert sum(losses) / 2 == pytest.approx(epoch["train_loss"], rel=1e-12)


@pytest.mark.timeout(120)
def test_the_same_is_printed(run: tuple[Path, str]) -> None:
    """Where standard output is no terminal, too."""
    printed = re.findall(
        r"^epoch (\d)/2  step (\d)/8  loss (\S+)  rate (\S+)  (\S+) images/s  (\S+) TFLOP/s a rank  (.+) left$",
        run[1],
        re.MULTILINE,
    )
    lines = step_metrics(run[0])
    assert [(int(epoch), int(step)) for epoch, step, *_ in printed] == [(1, 4), (1, 8), (2, 4), (2, 8)]
    for (_, _, loss, rate, images, *_), line in zip(printed, lines, strict=True):
        assert (float(loss), float(rate)) == (round(line["loss"], 4), pytest.approx(line["learning_rate"]))
        assert float(images.replace(",", "")) == line["images_per_second"]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _in_a_terminal(output_dir: str) -> str:
    terminal = _Terminal()
    with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
        assert main([*OPTIONS, "--output-dir", output_dir, "--epochs", "1", "--log-interval", "4"]) == 0
    return terminal.getvalue()


@pytest.mark.timeout(120)
def test_a_terminal_has_bars(run: tuple[Path, str], tmp_path: Path) -> None:
    """Of the steps and of the evaluation, each of which goes when a line comes; a pipe has neither."""
    (seen,) = run_ranks(1, _in_a_terminal, str(tmp_path / "run"))
    for bar, count in (("epoch 1/1:", "0/8 [00:00<?, ?step/s]"), ("evaluation:", "0/2 [00:00<?, ?batch/s]")):
        (first,) = [text for text in re.split("[\r\n]+", seen) if text.startswith(f"{bar}   0%|")]
        assert first.endswith(count)
    lines = re.findall(r"^(?:.*\r)?(epoch 1/1  .*)$", seen, re.MULTILINE)
    assert [line.partition("loss")[0] for line in lines] == [
        "epoch 1/1  step 4/8  ",
        "epoch 1/1  step 8/8  ",
        "epoch 1/1  ",
    ]
    assert "\r" not in run[1] and "evaluation:" not in run[1]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("figure", FIGURES)
def test_tensorboard_and_csv_hold_the_same(run: tuple[Path, str], figure: str) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    expected = [(line["step"], line[figure]) for line in step_metrics(run[0])]
    events = EventAccumulator(str(run[0] / "tensorboard"))
    events.Reload()
    read = [(event.step, event.value) for event in events.Scalars(f"Train/{figure}")]
    assert read == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]  # float32
    with open(run[0] / "csv" / f"Train_{figure}.csv", newline="") as file:
        _, *rows = csv.reader(file)
    assert [(int(step), float(value)) for step, value in rows] == expected


@pytest.mark.timeout(120)
def test_the_rate_is_the_one_that_was_used(tmp_path: Path) -> None:
    """It falls between epochs here, after 3, 6 and 8; what comes next is not what was."""
    (outcome,) = run_ranks(1, train, str(tmp_path), "--epochs", "10", "--limit-steps", "1", "--log-interval", "1")
    assert outcome.status == 0, outcome.stderr
    expected = pytest.approx([0.1] * 3 + [0.01] * 3 + [0.001] * 2 + [0.0001] * 2)
    assert [line["learning_rate"] for line in metrics(tmp_path)] == expected
    assert [line["learning_rate"] for line in step_metrics(tmp_path)] == expected
    for line in metrics(tmp_path):  # one batch of 250 of the 256 images
        assert line["test_error_percent"] * 250 / 100 == pytest.approx(round(line["test_error_percent"] * 2.5))


@pytest.mark.timeout(240)
@pytest.mark.parametrize("step", [STEPS + 1, 6])  # between two reports
def test_a_resumed_run_reports_the_same_losses(run: tuple[Path, str], tmp_path: Path, step: int) -> None:
    options = ("--tp", "2", "--log-interval", "4")
    run_ranks(2, train_until, (0, step), str(tmp_path), *options)
    resumed = run_ranks(2, train, str(tmp_path), *options, "--resume")
    assert [outcome.status for outcome in resumed] == [0, 0], resumed[0].stderr
    kept = ("epoch", "step", "samples", "loss", "learning_rate")
    assert [[line[key] for key in kept] for line in step_metrics(tmp_path)] == [
        [line[key] for key in kept] for line in step_metrics(run[0])
    ]


def _settings(*flags: str, world: int = 1) -> TrainSettings:
    options = ["train", "--dataset", "synthetic", "--groups", "4", "--batch-size", "8", "--output-dir", "nowhere"]
    return resolve(_parser().parse_args([*options, *flags]), Launch(world, 0, 0, world))


@pytest.mark.parametrize(("model", "conv"), [("wrn-10-2", "sc"), ("wrn-16-1", "gc")])
def test_the_arithmetic_is_that_of_the_layers(model: str, conv: str) -> None:
    settings = _settings("--model", model, "--conv", conv, "--groups", "1" if conv == "sc" else "4")
    layers = layer_flops(model, conv, settings.groups, 8)
    gradient_of_images = next(iter(layers.values())) // 2  # which the rule of thumb counts, and nobody asks for
    assert step_flops(settings, 10, 32) == sum(layers.values()) + gradient_of_images


@pytest.mark.timeout(60)
def test_each_kind_of_model_is_counted() -> None:
    for model in ("torchvision:resnet18", "mobilenet_v2"):
        assert step_flops(_settings("--model", model), 10, 64) > 0
    assert create_meta_model("wrn-10-1").training  # and nothing is left switched


def _read_meter() -> dict[str, float]:
    import torch

    meter = Meter(epochs=3, steps=10, batch_size=8, flops=3e12, device=torch.device("cpu"))
    meter.evaluation_seconds = 7.0
    for loss, seconds in ((2.0, 0.5), (1.0, 1.5)):
        for part in (0.25, 0.75):  # of a step of two micro-batches
            meter.add_loss(torch.tensor(part * loss, dtype=torch.float64))
        meter.add_step(seconds)
    return meter.read(1, 4, 0.25)


@pytest.mark.timeout(60)
def test_speed_and_remaining_time() -> None:
    """Of two steps of 8 images and 3 TFLOP over two ranks in 2 s, with 6 + 10 steps and two evaluations to come."""
    expected = {"loss": 1.5, "learning_rate": 0.25, "images_per_second": 8.0, "tflops_per_rank": 1.5}
    assert run_ranks(2, _read_meter) == [{**expected, "remaining_seconds": 16 * 1.0 + 2 * 7.0}] * 2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.6, "1 min 00 s"), (61, "1 min 01 s"), (7260, "2 h 01 min"), (97200, "1 d 03 h")],
)
def test_times_for_people(seconds: float, text: str) -> None:
    assert as_time(seconds) == text


def _with_wandb(folder: str) -> list[dict[str, Any]]:
    """The history that W&B has written in its offline mode."""
    import os

    os.environ.update(WANDB_MODE="offline", WANDB_DIR=folder, WANDB_SILENT="true")
    config = Path(folder) / "config.json"
    config.write_text(json.dumps({"wandb": {"enabled": True, "project": "test"}}))
    outcome = train(f"{folder}/run", "--log-interval", "4", "--deepspeed_config", str(config))
    assert outcome.status == 0, outcome.stderr
    import wandb

    wandb.finish()
    last = metrics(Path(folder) / "run")[-1]["step"]
    deadline = time.monotonic() + 60.0
    while True:  # the process of W&B's that writes the file may still be about it
        history = _history(folder)
        if any(row["_step"] == last for row in history):
            return history
        assert time.monotonic() < deadline, history
        time.sleep(0.2)


def _history(folder: str) -> list[dict[str, Any]]:
    """The rows that the file of the one run in ``folder`` holds now."""
    from wandb.proto import wandb_internal_pb2

    (path,) = Path(folder).glob("wandb/offline-run-*/*.wandb")
    history = []
    for content in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            history.append(items)
    return history


def _records(content: bytes) -> Iterator[bytes]:
    """Those of a log as LevelDB has it, after a header of 7 bytes: blocks of 32 KiB, of pieces with a sum of 4 bytes,
    a length of 2 and a kind: whole, first, middle or last."""
    at, block, record = 7, 1 << 15, b""
    while at + 7 <= len(content):
        if block - at % block < 7:
            at += block - at % block
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        if at + 7 + length > len(content):
            return
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


@pytest.mark.timeout(180)
def test_wandb_holds_the_same(tmp_path: Path) -> None:
    (history,) = run_ranks(1, _with_wandb, str(tmp_path))
    written = {row["_step"]: row for row in history}
    for kind, lines in (("Train", step_metrics(tmp_path / "run")), ("Epoch", metrics(tmp_path / "run"))):
        assert len(lines) > 1
        for line in lines:
            for key in line.keys() - {"epoch", "step", "samples"}:
                assert written[line["step"]][f"{kind}/{key}"] == line[key]
