"""The public trainer: one device's own loop is its oracle; it stops, resumes and is subclassed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import tlgc_mp
from tests.ranks import run_ranks
from tlgc_mp.checkpoint.offline import export_checkpoint
from tlgc_mp.data import EvaluationBatches, TrainingBatches
from tlgc_mp.errors import UsageError
from tlgc_mp.parallel.sharding import gather_state_dict

SEED, RATE, EPOCHS, BATCH, CLASSES = 3, 0.1, 2, 12, 5
STEPS = 4
"""Of an epoch: 50 images in batches of 12."""


class Images:
    """Random images in float64, and random labels."""

    def __init__(self, length: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(length, 3, 8, 8, generator=generator, dtype=torch.float64)
        self.labels = torch.randint(CLASSES, (length,), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]


TRAIN, TEST = Images(50, SEED), Images(17, SEED + 1)


def _network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(SEED)
    layers = [nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 4 * 4, CLASSES)).double()


def _trainer(
    folder: str, tensor_parallel: int, accumulation: int = 1, kind: type[tlgc_mp.Trainer] = tlgc_mp.Trainer, **more: Any
) -> tlgc_mp.Trainer:
    config: dict[str, Any] = {
        **{"train_batch_size": BATCH, "gradient_accumulation_steps": accumulation},
        "tensor_parallel": {"autotp_size": tensor_parallel},
    }
    engine, *_ = tlgc_mp.initialize(
        model=_network(more.pop("dropout", 0.0)).to(more.pop("dtype", torch.float64)),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=RATE, momentum=0.9),
        config=config,
    )
    group = engine.data_parallel_group
    share = {"rank": dist.get_rank(group), "replicas": dist.get_world_size(group)}
    batches = TrainingBatches(TRAIN, batch_size=engine.train_micro_batch_size_per_gpu(), seed=SEED, **share)
    tests = EvaluationBatches(TEST, batch_size=4, **share)
    return kind(engine, batches, tests, **{"epochs": EPOCHS, "folder": folder, "seed": SEED, **more})


def _weights(trainer: tlgc_mp.Trainer) -> dict[str, Tensor]:
    return gather_state_dict(trainer.engine.module)


def _train(folder: str, tensor_parallel: int, accumulation: int, dtype: torch.dtype) -> dict[str, Tensor]:
    trainer = _trainer(folder, tensor_parallel, accumulation, log_interval=2, dtype=dtype)
    assert not trainer.resume()
    before = torch.get_rng_state()
    trainer.train()
    assert torch.equal(torch.get_rng_state(), before), "training has moved torch's random state"
    return _weights(trainer)


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _epochs(folder: Path) -> list[dict[str, Any]]:
    return [line for line in _lines(folder) if "loss" not in line]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("world", "tensor_parallel", "accumulation", "dtype", "tolerance"),
    [(1, 1, 3, torch.float64, 1e-9), (2, 2, 1, torch.float64, 1e-9), (2, 1, 2, torch.float32, 1e-5)],
)
def test_as_on_one_device(
    tmp_path: Path, world: int, tensor_parallel: int, accumulation: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Losses of steps and epochs, figures and weights, against a loop written out by hand. DeepSpeed sums no gradients
    in float64 over replicas."""
    model = _network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    batches = TrainingBatches(TRAIN, batch_size=BATCH, seed=SEED, rank=0, replicas=1)
    losses, figures = [], []
    for epoch in range(EPOCHS):
        for images, labels in batches.epoch(epoch):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        logits, truth = model(TEST.images), torch.tensor(TEST.labels)
        figures.append(
            (F.cross_entropy(logits, truth).item(), 100 * (logits.argmax(1) != truth).double().mean().item())
        )

    states = run_ranks(world, _train, str(tmp_path), tensor_parallel, accumulation, dtype)
    for line, epoch in zip(_epochs(tmp_path), range(EPOCHS), strict=True):
        assert line["train_loss"] == pytest.approx(
            sum(losses[epoch * STEPS : (epoch + 1) * STEPS]) / STEPS, rel=tolerance
        )
        assert (line["test_loss"], line["test_error_percent"]) == pytest.approx(figures[epoch], rel=tolerance)
    reported = [line for line in _lines(tmp_path) if "loss" in line]
    expected = [(first + second) / 2 for first, second in zip(losses[::2], losses[1::2], strict=True)]
    assert [line["loss"] for line in reported] == pytest.approx(expected, rel=tolerance)
    assert all("tflops_per_rank" not in line and line["images_per_second"] > 0 for line in reported)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(states[0][name].double(), value, rtol=tolerance, atol=tolerance, msg=name)
    best = min(range(EPOCHS), key=lambda epoch: figures[epoch][1])
    assert (tmp_path / "checkpoints/best").read_text().strip() == f"epoch-{best + 1}"


class Stopped(Exception):
    pass


class StopAt:
    """Stops before a step, or in the first evaluation: all that a trainer asks of who may stop it."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def before_step(self, step: int) -> bool:
        return step == self.step

    def asked(self, device: torch.device) -> bool:
        return self.step is None

    def leave(self, saved: str) -> NoReturn:
        raise Stopped(saved)


class Counting(tlgc_mp.Trainer):
    """A loss, a figure and a state of its own."""

    judged_by = "largest"
    seen = 0

    def train_step(self, batch: Any) -> Tensor:
        images, labels = batch
        return F.multi_margin_loss(self.engine(images), labels)

    def after_step(self) -> None:
        self.seen += 1

    def evaluate(self) -> dict[str, float]:
        assert not torch.is_grad_enabled() and not self.engine.module.training
        largest = [self.engine(images).abs().amax() for images, _, _ in self.test_batches()]
        largest = torch.stack(largest).amax()
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return {"largest": float(largest)}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.seen = state["seen"]


def _stopped(folder: str, step: int | None) -> str:
    trainer = _trainer(folder, 2, kind=Counting, dropout=0.5)
    try:
        trainer.train(StopAt(step))
    except Stopped as stopped:
        return str(stopped)
    raise AssertionError("nobody stopped it")


def _whole(folder: str) -> tuple[int, dict[str, Tensor]]:
    trainer = _trainer(folder, 2, kind=Counting, dropout=0.5, log_interval=1)
    trainer.resume()
    trainer.train()
    return trainer.seen, _weights(trainer)  # type: ignore[attr-defined]


@pytest.mark.timeout(200)
@pytest.mark.parametrize(("step", "tag"), [(2, "epoch-1-step-2"), (STEPS + 1, "epoch-2-step-1"), (None, "epoch-1")])
def test_resumed_as_if_never_stopped(tmp_path: Path, step: int | None, tag: str) -> None:
    """Random draws of dropout, and what a subclass keeps, are the same too."""
    (seen, expected), _ = run_ranks(2, _whole, str(tmp_path / "whole"))
    assert run_ranks(2, _stopped, str(tmp_path / "run"), step) == [str(tmp_path / "run/checkpoints" / tag)] * 2
    (resumed, weights), _ = run_ranks(2, _whole, str(tmp_path / "run"))
    assert seen == resumed == EPOCHS * STEPS
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name
    for figure in ("train_loss", "test_largest", "step"):
        assert [line[figure] for line in _epochs(tmp_path / "run")] == [
            line[figure] for line in _epochs(tmp_path / "whole")
        ]
    best = min(_epochs(tmp_path / "run"), key=lambda line: line["test_largest"])["epoch"]
    assert (tmp_path / "run/checkpoints/best").read_text().strip() == f"epoch-{best}"
    assert export_checkpoint(str(tmp_path / "run"), str(tmp_path / "weights.safetensors")) is None


class _Batches:
    def __len__(self) -> int:
        return 1

    def epoch(self, epoch: int, start: int = 0) -> Any:
        return iter(())


class Nested(tlgc_mp.Trainer):
    """Keeps its state under another name, as other code may."""

    def state_dict(self) -> dict[str, Any]:
        return {"progress": super().state_dict()}


def _resume_another(folder: str) -> None:
    saved = _trainer(f"{folder}-nested", 2, kind=Nested, epochs=1).train()
    _trainer(folder, 2).resume(saved)


def _refusals(folder: str) -> list[str]:
    said = []
    for attempt in (
        lambda: _trainer(folder, 2, epochs=None),
        lambda: _trainer(folder, 2, log_interval=1.5),
        lambda: _trainer(folder, 2, save_steps=0),
        lambda: _trainer(folder, 2, save_seconds=-1),
        lambda: _trainer(folder, 2, seed="x"),
        lambda: _trainer(folder, 2, ema=1),
        lambda: _trainer(folder, 2, keep=0),
        lambda: _trainer(folder, 2, accumulation=6, epochs=1, limit_steps=1).train(),
        lambda: _trainer(folder, 2).train(),
        lambda: _trainer(folder, 2).resume(),
        lambda: _trainer(folder, 2).resume(f"{folder}/nowhere"),
        lambda: _resume_another(folder),
        lambda: tlgc_mp.Trainer("engine", [], epochs=1, folder=folder),  # type: ignore[arg-type]
        lambda: tlgc_mp.Trainer("engine", _Batches(), epochs=1, folder=folder),
        lambda: tlgc_mp.Trainer("engine", _Batches(), epochs=1, folder=""),
    ):
        try:
            attempt()
            said.append("taken")
        except UsageError as error:
            said.append(str(error))
    return said


@pytest.mark.timeout(120)
def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    parts = [
        "epochs must be 1 or more, got null; give an int",
        "log_interval must be 1 or more, got 1.5; give an int",
        "save_steps must be 1 or more, got 0; give an int",
        "save_seconds must be a positive number, got -1; use e.g. 600",
        'seed must be an int, got "x"; use e.g. 0',
        "ema must be more than 0 and less than 1, got 1; use e.g. 0.999",
        "keep must be 1 or more, got 0",
        "taken",
        f"folder must be a folder without a run, got {folder!r}, which holds one; call resume() to resume it",
        "the checkpoint must be of epochs of 4 steps, got 1; train on the same data, with the same batch size",
        f"checkpoint must be one, or a folder that holds one, got '{folder}/nowhere'",
        "the checkpoint must be one that a Trainer saved, got one without 'epoch'",
        "batches must have a length and a method epoch, got list; give tlgc_mp.data.TrainingBatches",
        "engine must be the one that tlgc_mp.initialize returns, got str",
        "folder must be a path, got ''",
    ]
    for said in run_ranks(2, _refusals, folder):
        assert [part for part, text in zip(parts, said, strict=True) if not text.startswith(part)] == [], said


def test_it_needs_nothing_of_what_guards_a_run() -> None:
    program = "import sys, tlgc_mp; tlgc_mp.Trainer; print([name for name in sys.modules if 'resilience' in name])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.splitlines()[-1] == "[]"
