"""The training loop: the same under every launcher, on one rank or many."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any, NoReturn, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from tlgc_mp.checkpoint import CheckpointSaver
from tlgc_mp.checkpoint.folder import CHECKPOINTS
from tlgc_mp.cli import options
from tlgc_mp.data import Datasets, EvaluationBatches, TrainingBatches, load_datasets
from tlgc_mp.data.preparation import Preparation
from tlgc_mp.data.streams import stream_seed
from tlgc_mp.engine import checkpoint_activations, initialize
from tlgc_mp.engine.start import start_distributed
from tlgc_mp.errors import UsageError
from tlgc_mp.host import usable_cores
from tlgc_mp.parallel.plan import parameter_counts
from tlgc_mp.parallel.sharding import effective_parameters
from tlgc_mp.parallel.topology import Launch
from tlgc_mp.resilience.claim import claimed
from tlgc_mp.resilience.interrupt import StopRequest
from tlgc_mp.resilience.watchdog import Watchdog
from tlgc_mp.training import optimization, resuming
from tlgc_mp.training.averaging import Average
from tlgc_mp.training.changes import check_data
from tlgc_mp.training.evaluation import (
    EVALUATION_BATCH,
    average_running_statistics,
    evaluate,
    progress_bar,
    reduced,
    to_device,
)
from tlgc_mp.training.finite import check_finite, check_weights
from tlgc_mp.training.headline import headline
from tlgc_mp.training.meter import Meter, in_a_line, step_flops
from tlgc_mp.training.metrics import Metrics, peak_memory_bytes, print_summary
from tlgc_mp.training.model import check_library, model_of
from tlgc_mp.training.profiling import StepProfiler
from tlgc_mp.training.runs import PROFILE
from tlgc_mp.training.schedule import SaveSchedule
from tlgc_mp.training.settings import TrainSettings

LOSS_CHECK_STEPS = 50
"""Steps between two looks at the loss on an accelerator, each of which waits for it; on a CPU every step is one."""

MONITORS = ("tensorboard", "csv_monitor", "wandb", "comet")
"""Sections of a DeepSpeed configuration that have the engine report."""

FIRST_PROGRESS: dict[str, Any] = {"epoch": 0, "step": 0, "seconds": 0.0, "train_seconds": 0.0, "data_seconds": 0.0}

Batch: TypeAlias = tuple[Tensor, Tensor]


def train(settings: TrainSettings, launch: Launch, watchdog: Watchdog) -> None:
    """Trains a model as ``settings`` say, evaluating and saving it every epoch; rank 0 reports.

    Args:
        settings: equal on every rank but for the rank in their topology.
        launch: this rank's place on its node.
        watchdog: entered; it watches from here on until the run ends.

    Raises:
        UsageError: something that only shows now is the user's to mend, a damaged image, say.
        Interrupted: a signal asked the run to stop; a checkpoint was saved.
    """
    _use_cores(launch)
    speaks = settings.topology.rank == 0
    check_library(settings)
    _say(speaks, f"Reading {settings.dataset} ...")
    data = load_datasets(
        settings.dataset,
        settings.data_dir,
        seed=settings.seed,
        image_size=settings.image_size,
        num_classes=settings.num_classes,
        val_split=settings.val_split,
    )
    settings = replace(settings, fingerprint=data.fingerprint)
    check_data(settings)
    for note in data.notes:
        _say(speaks, note)
    share = {
        "rank": settings.topology.dp_rank,
        "replicas": settings.topology.data_parallel,
        "num_workers": settings.workers,
    }
    batches = TrainingBatches(data.train, batch_size=settings.micro_batch, seed=settings.seed, **share)
    tests = EvaluationBatches(data.test, batch_size=EVALUATION_BATCH, **share)
    steps = len(batches) // settings.accumulation
    if settings.limit_steps is not None:
        steps = min(steps, settings.limit_steps)
    if steps == 0:
        raise UsageError(
            f"the training set of {len(data.train)} images gives {len(batches)} micro-batches, fewer than the "
            f"{settings.accumulation} of one step; lower the batch size or gradient_accumulation_steps"
        )

    model = model_of(settings, data.num_classes, data.image_size)
    with watchdog.meeting():
        start_distributed()
    watchdog.start()
    if settings.dry_run:
        for monitor in MONITORS:
            settings.config.pop(monitor, None)  # each would begin to write
    with contextlib.nullcontext() if settings.dry_run else claimed(settings.output_dir, settings.resume_from):
        if speaks and not settings.dry_run:
            options.write(settings.options, settings.output_dir)
        _train(settings, watchdog, data, batches, tests, steps, model)


def _train(
    settings: TrainSettings,
    watchdog: Watchdog,
    data: Datasets,
    batches: TrainingBatches,
    tests: EvaluationBatches,
    steps: int,
    model: torch.nn.Module,
) -> None:
    """Trains ``model`` in epochs of ``steps`` steps; torch.distributed is up, and the output folder this run's."""
    speaks = settings.topology.rank == 0
    if settings.activation_checkpointing:
        checkpoint_activations(model)
    counts = parameter_counts(model, settings.topology.tensor_parallel)
    _say(speaks, headline(settings, counts, data, steps))
    engine, _, _, _ = initialize(
        model=model,
        optimizer=None if "optimizer" in settings.config else optimization.make_optimizer(settings),
        lr_scheduler=None if "scheduler" in settings.config else optimization.make_scheduler(settings, steps),
        config=settings.config,
        seed=settings.seed,
        sample_inputs=torch.empty(settings.micro_batch, 3, data.image_size, data.image_size, device="meta"),
    )
    loss_sum = torch.zeros((), dtype=torch.float64, device=engine.device)
    meter = Meter(settings, step_flops(settings, data.num_classes, data.image_size), steps, engine.device)
    if settings.resume_from is None:
        for line in resuming.begin(settings, engine):
            _say(speaks, line)
        progress = {**FIRST_PROGRESS, "learning_rate": float(engine.optimizer.param_groups[0]["lr"])}
    else:
        progress, lines = resuming.resume(settings, engine, steps, loss_sum, meter)
        for line in lines:
            _say(speaks, line)
    if settings.dry_run:
        watchdog.workers.may_end()
        _say(speaks, "Nothing is trained or written (--dry-run)")
        return
    run = _Run(settings, engine, batches, tests, steps, progress, loss_sum, meter, data.preparation)
    with StopRequest(agreed=watchdog.workers.may_end) as stop, run.profiler:
        saved = run.train(stop)
    watchdog.workers.may_end()
    peak = torch.tensor(peak_memory_bytes(), dtype=torch.int64)
    peak = reduced(peak.to(engine.device), dist.ReduceOp.MAX)
    effective = effective_parameters(engine.module) if settings.conv == "flgc" else None
    if speaks:
        figures = {
            "parameters": counts["total"],
            "parameters_per_rank": counts["per_rank"],
            "effective_parameters": effective,
            "peak_memory_bytes": int(peak),
        }
        run.metrics.write_result(data.num_classes, figures)
        best, last = run.metrics.best(), run.metrics.lines[-1]
        error = f"{last['test_error_percent']:.2f} % after epoch {last['epoch']}"
        print_summary(
            [
                ("test error", f"{error} (best {best['test_error_percent']:.2f} %, epoch {best['epoch']})"),
                ("time", f"{last['seconds']:.1f} s of training and evaluation"),
                ("parameters", f"{counts['total']:,} in all, {counts['per_rank']:,} a rank"),
                ("peak memory", f"{int(peak) / 2**20:,.0f} MiB, the largest of {settings.topology.world} rank(s)"),
                ("checkpoint", saved),
                ("saving", f"{run.save_seconds:.1f} s in which training waited for {run.saves} checkpoint(s)"),
                *([("profile", run.profiler.path)] if run.profiler.written else []),
                ("metrics", f"{run.metrics.path}, and for TensorBoard in {settings.output_dir}"),
            ]
        )


class _Run:
    """A run that has been set up: the epochs from ``progress`` on."""

    def __init__(
        self,
        settings: TrainSettings,
        engine: Any,
        batches: TrainingBatches,
        tests: EvaluationBatches,
        steps: int,
        progress: dict[str, Any],
        loss_sum: Tensor,
        meter: Meter,
        images: Preparation,
    ) -> None:
        self.settings, self.engine, self.batches, self.tests = settings, engine, batches, tests
        self.steps = steps
        self.progress = progress
        self.loss_sum = loss_sum  # of this replica, over the steps of the epoch under way
        self.meter = meter
        self.loss = optimization.Loss(settings, len(images.classes))
        folder = os.path.join(settings.output_dir, PROFILE)
        self.profiler = StepProfiler(settings.profile_steps, folder, settings.topology.rank)
        self.average = Average(engine, settings.recipe.ema)
        self.images = images
        folder = os.path.join(settings.output_dir, CHECKPOINTS)
        self.saver = CheckpointSaver(engine, folder, keep=settings.keep, background=settings.background_save)
        self.train_seconds, self.data_seconds = progress["train_seconds"], progress["data_seconds"]
        self.rate = progress["learning_rate"]  # of the latest step
        self.schedule = SaveSchedule(settings.save_seconds, settings.save_steps)
        self.saves, self.save_seconds = 0, 0.0
        self.metrics = Metrics(engine, settings, first_epoch=progress["epoch"] + 1)
        self.speaks = settings.topology.rank == 0

    def train(self, stop: StopRequest) -> str:
        """Trains to the last epoch; returns the path of the last checkpoint."""
        for epoch in range(self.progress["epoch"], self.settings.epochs):
            began = time.monotonic() - self.progress["seconds"]
            if self.progress["step"] < self.steps:
                self._train_epoch(epoch, stop, began)
                average_running_statistics(self.engine.module, self.engine.data_parallel_group)
                self._save(f"epoch-{epoch + 1}", epoch, self.steps, began)
            loss = reduced(self.loss_sum) / self.settings.topology.world  # the ranks of one replica hold the same
            test_loss, test_error = self._evaluate(stop)
            figures = {
                "train_loss": float(loss) / self.steps,
                "test_loss": test_loss,
                "test_error_percent": test_error,
                "learning_rate": self.rate,
                "seconds": round(time.monotonic() - began, 3),
                "train_seconds": round(self.train_seconds, 3),
                "data_seconds": round(self.data_seconds, 3),
            }
            self.metrics.write(epoch + 1, figures)
            _say(
                self.speaks,
                f"{self._place(epoch)}  loss {figures['train_loss']:.4f}  test loss {test_loss:.4f}  "
                f"test error {test_error:.2f} %  {figures['seconds']:.1f} s",
            )
            if self.speaks and self.metrics.best()["epoch"] == epoch + 1:
                self.saver.mark_best()
            self.progress = {**self.progress, "epoch": epoch + 1, "step": 0, "seconds": figures["seconds"]}
            self.loss_sum.zero_()
        self.saver.wait()
        return self._newest()

    def _train_epoch(self, epoch: int, stop: StopRequest, began: float) -> None:
        """Runs what is left of an epoch."""
        engine, first, loss_sum = self.engine, self.progress["step"], self.loss_sum
        engine.train()
        on_cpu = loss_sum.device.type == "cpu"
        accumulation = self.settings.accumulation
        stream = self.batches.epoch(epoch, start=first * accumulation)
        with progress_bar(None, self.steps, self._place(epoch), "step", self.speaks, first) as bar:
            for step in range(first, self.steps):
                if stop.before_step(epoch * self.steps + step):
                    self._save(f"epoch-{epoch + 1}-step-{step}", epoch, step, began)
                    self._leave(stop)
                if step > first and self.schedule.due(step, epoch * self.steps + step, self.saver.busy):
                    self._save(f"epoch-{epoch + 1}-step-{step}", epoch, step, began)
                self.saver.check()
                step_began = time.perf_counter()
                self.rate = float(engine.optimizer.param_groups[0]["lr"])
                before = loss_sum.clone()
                for number, (images, labels) in enumerate(islice(self._timed(stream), accumulation)):
                    draws = self._number((epoch * self.steps + step) * accumulation + number)
                    torch.manual_seed(stream_seed(self.settings.seed, "micro-batch", draws))
                    images, labels = self.loss.mixed(*to_device(images, labels, engine.module, engine.device), draws)
                    loss = self.loss(engine(images).float(), labels)
                    engine.backward(loss)
                    engine.step()
                    loss_sum += loss.detach() / accumulation
                self.average.step()
                if on_cpu or step % LOSS_CHECK_STEPS == LOSS_CHECK_STEPS - 1:
                    check_finite(float(loss_sum), epoch, step + 1)
                step_seconds = time.perf_counter() - step_began
                self.train_seconds += step_seconds
                self.meter.add(loss_sum - before, step_seconds)
                bar.update()
                self.profiler.step()
                if engine.global_steps % self.settings.log_interval == 0:
                    self._log(epoch, step + 1)

    def _log(self, epoch: int, epoch_step: int) -> None:
        """Reports the steps since the last time."""
        figures = self.meter.read(epoch, epoch_step, self.rate)
        check_finite(figures["loss"], epoch, epoch_step)
        self.metrics.write(epoch + 1, figures)
        place = f"{self._place(epoch)}  step {epoch_step:>{len(str(self.steps))}}/{self.steps}"
        _say(self.speaks, f"{place}  {in_a_line(figures)}")

    def _place(self, epoch: int) -> str:
        return f"epoch {epoch + 1:>{len(str(self.settings.epochs))}}/{self.settings.epochs}"

    def _evaluate(self, stop: StopRequest) -> tuple[float, float]:
        def leave_if_asked() -> None:
            if stop.asked(self.engine.device):
                self._leave(stop)

        began = time.perf_counter()
        with self.average.in_place():
            found = evaluate(
                self.engine,
                self.tests,
                classes=len(self.images.classes),
                device=self.engine.device,
                between=leave_if_asked,
                limit=self.settings.limit_steps,
                speaks=self.speaks,
            )
        self.meter.evaluation_seconds = time.perf_counter() - began
        return found["loss"], found["error_percent"]

    def _timed(self, stream: Iterator[Batch]) -> Iterator[Batch]:
        """The batches of ``stream``; the time in which this rank waits for them is added up."""
        while True:
            began = time.perf_counter()
            batch = next(stream, None)
            self.data_seconds += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def _number(self, micro_batch: int) -> int:
        """That of a micro-batch over all replicas, from which what it draws by itself follows: so a resumed run draws
        the same, with more or fewer replicas too, and replicas draw differently."""
        topology = self.settings.topology
        return micro_batch * topology.data_parallel + topology.dp_rank

    def _newest(self) -> str:
        """The path of the checkpoint that stands for where this run is."""
        return self.saver.path or os.path.join(*(self.settings.resume_from or ("",)))

    def _leave(self, stop: StopRequest) -> NoReturn:
        """Leaves when the checkpoint under way is on the disk."""
        self.saver.wait()
        stop.leave(self._newest())

    def _save(self, tag: str, epoch: int, step: int, began: float) -> None:
        save_began = time.perf_counter()
        check_finite(float(self.loss_sum), epoch, step)
        check_weights(self.engine.module, epoch, step)
        progress = {
            "epoch": epoch,
            "step": step,
            "steps": self.steps,
            "seconds": time.monotonic() - began,
            "train_seconds": self.train_seconds,
            "data_seconds": self.data_seconds,
            "learning_rate": self.rate,
        }
        client_state = {
            **{"run": self.settings.description(), "progress": progress},
            **{"num_classes": len(self.images.classes), "images": self.images.entry()},
        }
        self.saver.save(tag, client_state, {"loss_sum": self.loss_sum, "interval": self.meter.interval})
        self.schedule.saved()
        self.saves += 1
        self.save_seconds += time.perf_counter() - save_began


def _use_cores(launch: Launch) -> None:
    """Shares a node's cores among its ranks, unless the launcher has set OMP_NUM_THREADS."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, usable_cores() // launch.local_world))


def _say(speaks: bool, text: str) -> None:
    if speaks:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
