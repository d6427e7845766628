"""The figures of a run: the same in every place, written by rank 0, each test image counted once."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.ranks import run_ranks
from tests.training.runs import EPOCHS, STEPS, metrics, step_metrics, train
from tlgc_mp.models import create_model
from tlgc_mp.nn import FullyLearnableGroupConv2d
from tlgc_mp.paper.rows import read_rows
from tlgc_mp.parallel.plan import parameter_counts

FIGURES = (
    "train_loss",
    "test_loss",
    "test_error_percent",
    "learning_rate",
    "seconds",
    "train_seconds",
    "data_seconds",
)
SEED = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run of two ranks, each with an output folder of its own, 0 and 1; checkpoints and the lock are in one."""
    folder = tmp_path_factory.mktemp("metrics")
    (folder / "checkpoints").mkdir()
    for rank in ("0", "1"):
        (folder / rank).mkdir()
        for shared in ("checkpoints", "lock"):
            (folder / rank / shared).symlink_to(folder / shared)
    outcomes = run_ranks(2, train, f"{folder}/{{rank}}")
    assert [outcome.status for outcome in outcomes] == [0, 0]
    assert outcomes[1].stdout == outcomes[1].stderr == ""
    return folder


@pytest.mark.timeout(120)
def test_a_json_line_an_epoch(folder: Path) -> None:
    lines = metrics(folder / "0")
    assert [line["epoch"] for line in lines] == list(range(1, EPOCHS + 1))
    assert [line["step"] for line in lines] == [STEPS * epoch for epoch in range(1, EPOCHS + 1)]
    assert [line["samples"] for line in lines] == [128 * line["step"] for line in lines]
    for line in lines:
        assert set(line) == {"epoch", "step", "samples", *FIGURES}
        assert all(math.isfinite(line[figure]) for figure in FIGURES)
        assert line["test_error_percent"] * 256 / 100 == round(line["test_error_percent"] * 256 / 100)
        assert line["seconds"] > line["train_seconds"] > line["data_seconds"] > 0
    for clock in ("seconds", "train_seconds", "data_seconds"):
        assert lines[-1][clock] > lines[0][clock]


@pytest.mark.timeout(120)
def test_a_finished_run_leaves_its_row(folder: Path) -> None:
    result = json.loads((folder / "0/result.json").read_text())
    lines = metrics(folder / "0")
    assert result["epoch_lines"] == lines
    assert result["test_error_percent"] == lines[-1]["test_error_percent"]
    assert (result["model"], result["conv"], result["groups"], result["num_classes"]) == ("wrn-10-1", "gc-2l", 4, 10)
    counts = parameter_counts(create_model("wrn-10-1", groups=4, device="meta"), 2)
    assert (result["parameters"], result["parameters_per_rank"]) == (counts["total"], counts["per_rank"])
    assert result["effective_parameters"] is None
    assert read_rows([str(folder / "0")]) == [result]
    assert not (folder / "1/result.json").exists()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("stage", [0, 3])
def test_learned_groups_are_counted_as_they_are_at_the_end(tmp_path: Path, stage: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    options = ("--conv", "flgc", "--groups", "4", "--limit-steps", "2", "--epochs", "1")
    (outcome,) = run_ranks(
        1, train, str(tmp_path / "run"), *options, "--deepspeed_config", str(tmp_path / "config.json")
    )
    assert outcome.status == 0, outcome.stderr
    result = json.loads((tmp_path / "run/result.json").read_text())
    torch.manual_seed(0)
    model = create_model("wrn-10-1", conv="flgc", groups=4)
    layers = [module for module in model.modules() if isinstance(module, FullyLearnableGroupConv2d)]
    others = result["parameters"] - sum(layer.balanced_parameters for layer in layers)
    initially = others + sum(layer.effective_parameters for layer in layers)
    assert result["effective_parameters"] == pytest.approx(initially, rel=0.02)  # two steps move few channels
    assert result["effective_parameters"] != result["parameters"]
    assert result["epoch_lines"][-1]["step"] == 2


@pytest.mark.timeout(120)
def test_the_coarse_level_is_as_asked_for(tmp_path: Path) -> None:
    options = ("--coarse-kernel-size", "1", "--coarse-init", "scaled", "--limit-steps", "1", "--epochs", "1")
    (outcome,) = run_ranks(1, train, str(tmp_path / "run"), *options)
    assert outcome.status == 0, outcome.stderr
    result = json.loads((tmp_path / "run/result.json").read_text())
    model = create_model("wrn-10-1", groups=4, coarse_kernel_size=1, device="meta")
    assert result["parameters"] == sum(param.numel() for param in model.parameters())
    assert (result["coarse_kernel_size"], result["coarse_init"]) == (1, "scaled")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("figure", FIGURES)
def test_tensorboard_and_csv_hold_the_same(folder: Path, figure: str) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    expected = [(line["step"], line[figure]) for line in metrics(folder / "0")]

    events = EventAccumulator(str(folder / "0" / "tensorboard"))
    events.Reload()
    read = [(event.step, event.value) for event in events.Scalars(f"Epoch/{figure}")]
    assert [step for step, _ in read] == [step for step, _ in expected]
    assert [value for _, value in read] == pytest.approx([value for _, value in expected], rel=1e-6)  # float32

    with open(folder / "0" / "csv" / f"Epoch_{figure}.csv", newline="") as file:
        _, *rows = csv.reader(file)
    assert [(int(step), float(value)) for step, value in rows] == expected


@pytest.mark.timeout(120)
def test_only_rank_0_writes(folder: Path) -> None:
    names = {path.name for path in (folder / "1").iterdir()}
    assert names <= {"checkpoints", "lock"}, "rank 1 wrote more than its part of the checkpoints"
    assert list((folder / "1").rglob("run.json")) == []


def _averaged_statistics(tensor_parallel: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A rank's running statistics before, drawn by rank, and after averaging."""
    from tlgc_mp.engine import initialize
    from tlgc_mp.models import create_model
    from tlgc_mp.training.evaluation import average_running_statistics

    rank = int(os.environ["RANK"])
    config = {"train_batch_size": 8, "tensor_parallel": {"autotp_size": tensor_parallel}}
    model = create_model("wrn-10-1", conv="gc-2l", groups=4, num_classes=10)
    engine, _, _, _ = initialize(
        model=model, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1), config=config, seed=SEED
    )
    generator = torch.Generator().manual_seed(SEED + rank)
    statistics = {
        name: buffer for name, buffer in engine.module.named_buffers() if name.rpartition(".")[2].startswith("running_")
    }
    for buffer in statistics.values():
        buffer.copy_(torch.rand(buffer.shape, generator=generator))
    before = {name: buffer.clone() for name, buffer in statistics.items()}
    average_running_statistics(engine.module, engine.data_parallel_group)
    return before, {name: buffer.clone() for name, buffer in statistics.items()}


@pytest.mark.timeout(150)
@pytest.mark.parametrize(("world", "tensor_parallel"), [(2, 1), (4, 2)])
def test_running_statistics_are_averaged_over_the_replicas(world: int, tensor_parallel: int) -> None:
    ranks = run_ranks(world, _averaged_statistics, tensor_parallel)
    assert len(ranks[0][0]) > 0
    for rank, (_, after) in enumerate(ranks):
        replicas = [ranks[other][0] for other in range(rank % tensor_parallel, world, tensor_parallel)]
        for name, value in after.items():
            expected = torch.stack([before[name].double() for before in replicas]).mean(0)
            torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0, msg=f"{name}, seed {SEED}")


def _evaluate() -> dict[str, Any]:
    """The figures of a model of random weights on the 360 test images of digits, as one of so many replicas."""
    from tlgc_mp.data import EvaluationBatches, load_datasets
    from tlgc_mp.training.evaluation import EVALUATION_BATCH, evaluate

    tests = EvaluationBatches(
        load_datasets("digits", None, seed=0).test,
        batch_size=EVALUATION_BATCH,
        rank=int(os.environ["RANK"]),
        replicas=int(os.environ["WORLD_SIZE"]),
    )
    return evaluate(_model(), tests, torch.device("cpu"))


def _model() -> torch.nn.Module:
    from tlgc_mp.models import create_model

    torch.manual_seed(SEED)
    return create_model("wrn-10-1", conv="gc-2l", groups=4, num_classes=10)


@pytest.mark.timeout(120)
def test_each_image_counts_once_however_many_replicas() -> None:
    from tlgc_mp.data import load_datasets

    test = load_datasets("digits", None, seed=0).test
    images, labels = zip(*(test[index] for index in range(len(test))), strict=True)
    with torch.no_grad():
        logits = _model().eval()(torch.stack(images))
    truth = torch.tensor(labels)
    right = logits.argmax(1) == truth
    ranked = logits.argsort(1, descending=True).tolist()
    among = torch.tensor([label in row[:5] for row, label in zip(ranked, labels, strict=True)])
    for found in run_ranks(3, _evaluate):
        assert found["images"] == 360
        assert found["loss"] == pytest.approx(float(F.cross_entropy(logits.double(), truth)), rel=1e-5), f"seed {SEED}"
        assert found["error_percent"] == pytest.approx(100 - 100 * float(right.double().mean()), rel=1e-12)
        assert found["top5_error_percent"] == pytest.approx(100 - 100 * float(among.double().mean()), rel=1e-12)
        assert found["class_accuracy_percent"] == pytest.approx(
            [100 * float(right[truth == label].double().mean()) for label in range(10)], rel=1e-12
        )


def _told(output_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """KIND/FIGURE -> (step, value), from metrics.jsonl."""
    told: dict[str, list[tuple[int, float]]] = {}
    for kind, lines in (("Epoch", metrics(output_dir)), ("Train", step_metrics(output_dir))):
        for line in lines:
            for key in line.keys() - {"epoch", "step", "samples"}:
                told.setdefault(f"{kind}/{key}", []).append((line["step"], line[key]))
    return told


def _check_each_once(output_dir: Path, tensorboard: Path, csv_files: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told = _told(output_dir)
    assert len(told["Epoch/test_loss"]) == EPOCHS and len(told["Train/loss"]) == EPOCHS * STEPS // 4
    events = EventAccumulator(str(tensorboard))
    events.Reload()
    assert set(events.Tags()["scalars"]) == told.keys()
    for name, expected in told.items():
        steps = [event.step for event in events.Scalars(name)]
        assert steps == [step for step, _ in expected], name
        with open(csv_files / f"{name.replace('/', '_')}.csv", newline="") as file:
            header, *rows = csv.reader(file)
        assert header == ["step", name.partition("/")[2]]
        assert [(int(step), float(value)) for step, value in rows] == expected, name


@pytest.mark.timeout(240)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_each_step_once_after_a_resume(tmp_path: Path, elsewhere: bool) -> None:
    """From the first epoch's end, before its evaluation: that and steps of the second epoch were reported before."""
    run, flags = tmp_path / "run", ["--log-interval", "4", "--keep", "9"]
    places = (run / "tensorboard", run / "csv")
    if elsewhere:
        config = {
            key: {"enabled": True, "output_path": str(tmp_path), "job_name": f"{key}-files"}
            for key in ("tensorboard", "csv_monitor")
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        flags += ["--deepspeed_config", str(tmp_path / "config.json")]
        places = (tmp_path / "tensorboard-files", tmp_path / "csv_monitor-files")
    (outcome,) = run_ranks(1, train, str(run), *flags)
    assert outcome.status == 0, outcome.stderr
    _check_each_once(run, *places)
    (outcome,) = run_ranks(1, train, str(run), *flags, "--resume", str(run / "checkpoints" / "epoch-1"))
    assert outcome.status == 0, outcome.stderr
    _check_each_once(run, *places)


@pytest.mark.timeout(240)
def test_each_step_once_after_a_start_from_nothing(tmp_path: Path) -> None:
    """As `tlgc-mp launch` has it where no checkpoint stands yet."""
    for _ in range(2):
        (outcome,) = run_ranks(1, train, str(tmp_path), "--log-interval", "4")
        assert outcome.status == 0, outcome.stderr
        _check_each_once(tmp_path, tmp_path / "tensorboard", tmp_path / "csv")
        shutil.rmtree(tmp_path / "checkpoints")
        (tmp_path / "checkpoints").mkdir()
