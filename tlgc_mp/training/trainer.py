"""Training in epochs: steps, evaluation, checkpoints and figures. ``tlgc-mp train`` runs a subclass of it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from typing import Any, NoReturn, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tlgc_mp.checkpoint import CheckpointSaver, load_checkpoint
from tlgc_mp.checkpoint.folder import CHECKPOINTS, Progress, find_checkpoint, mark_best
from tlgc_mp.checkpoint.loader import all_or_none
from tlgc_mp.data import EvaluationBatches
from tlgc_mp.data.streams import stream_seed
from tlgc_mp.engine.protocols import Engine
from tlgc_mp.errors import UsageError, shown
from tlgc_mp.host import as_path
from tlgc_mp.json_types import JsonObject
from tlgc_mp.training.averaging import Average
from tlgc_mp.training.changes import RESUME_AUTO, find_resumed
from tlgc_mp.training.console import progress_bar, say
from tlgc_mp.training.evaluation import average_running_statistics, evaluate, reduced, to_device, wide
from tlgc_mp.training.finite import check_finite, check_weights
from tlgc_mp.training.meter import Meter, in_a_line
from tlgc_mp.training.metrics import Metrics, in_words
from tlgc_mp.training.protocols import Batches, Guard, check_arguments, steps_of
from tlgc_mp.training.runs import check_free
from tlgc_mp.training.schedule import SaveSchedule

LOSS_CHECK_STEPS = 50
"""Steps between two looks at the loss on an accelerator, each of which waits for it; on a CPU every step is one."""


class Trainer:
    """Trains an engine in epochs. Every rank makes one, and calls the same methods in the same order.

    Each epoch ends with a checkpoint and an evaluation. Rank 0 reports on standard output, in ``metrics.jsonl``, and to
    the monitors of the DeepSpeed configuration, or else to TensorBoard and CSV files in ``folder``. A resumed training
    computes the same numbers as one that was never stopped: batches and random draws follow from the seed and the step.

    Override :meth:`train_step` for another loss, :meth:`evaluate` for other figures, :meth:`state_dict` and
    :meth:`load_state_dict` to keep more in checkpoints, and :meth:`after_step` to act after each step.

    Args:
        engine: of :func:`tlgc_mp.initialize`.
        batches: this replica's micro-batches, such as :class:`tlgc_mp.data.TrainingBatches`.
        tests: this replica's batches for :meth:`evaluate`; ``None`` to train without evaluation.
        epochs: passes over ``batches``, in all.
        folder: for checkpoints and figures; all ranks must see it.
        seed: of random draws in :meth:`train_step`, such as those of dropout.
        limit_steps: steps after which an epoch ends, and batches after which its evaluation does, where they are not
            over before.
        log_interval: steps between two reports.
        keep: the newest checkpoints that stay; the best stays too.
        save_seconds, save_steps: when to save within an epoch; ``None`` for not at all.
        background_save: whether a checkpoint is written while training goes on.
        ema: the decay of the moving average of the weights that is evaluated; ``None`` for none.
        flops: floating-point operations of a step over all ranks, where TFLOP/s are to be reported.

    Attributes:
        judged_by: the figure of :meth:`evaluate` whose smallest value marks the best checkpoint.
        epoch, step: where the training is: complete epochs, and the steps of the one under way.
        steps: of an epoch.
        micro_batch: the number of the micro-batch under way, over all replicas; what it draws follows from that.

    Raises:
        UsageError: an argument cannot work, or an epoch has no step.
    """

    judged_by = "error_percent"

    def __init__(
        self,
        engine: Engine,
        batches: Batches,
        tests: EvaluationBatches | None = None,
        *,
        epochs: int,
        folder: str | os.PathLike[str],
        seed: int = 0,
        limit_steps: int | None = None,
        log_interval: int = 50,
        keep: int = 3,
        save_seconds: float | None = None,
        save_steps: int | None = None,
        background_save: bool = True,
        ema: float | None = None,
        flops: float | None = None,
    ) -> None:
        counts = {"epochs": epochs, "log_interval": log_interval, "limit_steps": limit_steps, "save_steps": save_steps}
        check_arguments(batches, seed=seed, save_seconds=save_seconds, ema=ema, **counts)
        self.folder = as_path("folder", folder)
        self.saver = CheckpointSaver(
            engine, os.path.join(self.folder, CHECKPOINTS), keep=keep, background=background_save
        )
        self.engine, self.batches, self.tests = engine, batches, tests
        self.epochs, self.seed, self.limit_steps, self.log_interval = epochs, seed, limit_steps, log_interval
        self.accumulation = int(engine.gradient_accumulation_steps())
        self.steps = steps_of(batches, self.accumulation, limit_steps)
        self.replicas = int(engine.dp_world_size)
        self.replica = int(dist.get_rank(engine.data_parallel_group)) if self.replicas > 1 else 0
        self.speaks = dist.get_rank() == 0
        self.epoch = self.step = self.micro_batch = 0
        self.train_seconds = self.data_seconds = 0.0
        self.rate = float(engine.optimizer.param_groups[0]["lr"])  # of the latest step
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=engine.device)  # of this replica, in this epoch
        self.meter = Meter(
            epochs=epochs,
            steps=self.steps,
            batch_size=int(engine.train_batch_size()),
            flops=flops,
            device=engine.device,
        )
        self.average = Average(engine, ema)
        self.schedule = SaveSchedule(save_seconds, save_steps)
        self.saves, self.save_seconds = 0, 0.0
        self._guard: Guard | None = None
        self._resumed_from: str | None = None
        self._seconds = 0.0  # before this start
        self._began: float | None = None

    # What a subclass may override.

    def train_step(self, batch: Any) -> Tensor:
        """The loss of one micro-batch, the mean over its samples: the cross-entropy of (images, labels).

        Call ``self.engine``, not its module. The trainer runs backward and steps the optimizer.
        """
        images, labels = batch
        images, labels = to_device(images, labels, self.engine.module, self.engine.device)
        return F.cross_entropy(wide(self.engine(images)), labels)

    def after_step(self) -> None:
        """Called after each step of the optimizer; does nothing."""

    def evaluate(self) -> dict[str, float]:
        """The figures after an epoch, the same on every rank: ``loss`` and ``error_percent`` of a classifier.

        The engine is in evaluation mode, gradients are off, and the weights are the moving average where there is one.
        Take the batches from :meth:`test_batches`, and sum over the ranks: each replica evaluates a part.
        """
        if self.tests is None:
            return {}
        found = evaluate(self.engine, self.test_batches(), self.engine.device)
        return {"loss": found["loss"], "error_percent": found["error_percent"]}

    def state_dict(self) -> JsonObject:
        """The position in the training, as JSON can hold it; checkpoints keep it beside the engine's state."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "steps": self.steps,
            "seconds": self.seconds,
            "train_seconds": self.train_seconds,
            "data_seconds": self.data_seconds,
            "learning_rate": self.rate,
        }

    def load_state_dict(self, state: JsonObject) -> None:
        """Restores what :meth:`state_dict` returned.

        Raises:
            UsageError: no trainer has saved it, or its epochs have another length.
        """
        if missing := [key for key in Trainer.state_dict(self) if key not in state]:
            raise UsageError(f"the checkpoint must be one that a Trainer saved, got one without {missing[0]!r}")
        progress = cast(Progress, state)
        if progress["steps"] != self.steps:
            raise UsageError(
                f"the checkpoint must be of epochs of {self.steps} steps, got {shown(progress['steps'])}; train on the "
                "same data, with the same batch size"
            )
        self.epoch, self.step = progress["epoch"], progress["step"]
        self.train_seconds, self.data_seconds = progress["train_seconds"], progress["data_seconds"]
        self.rate, self._seconds = progress["learning_rate"], progress["seconds"]

    # What a program calls.

    def resume(self, path: str | None = None) -> bool:
        """Resumes from a checkpoint; call it before :meth:`train`. Collective.

        Args:
            path: a checkpoint, or the folder of a training; ``None`` for its own folder.

        Returns:
            Whether there was a checkpoint. Without one in its own folder, training starts from the beginning.

        Raises:
            UsageError: there is no checkpoint in ``path``, or it does not fit.
        """
        if path is None:
            found = all_or_none(lambda: [find_resumed(RESUME_AUTO, self.folder) if self.speaks else None])
            dist.broadcast_object_list(found)  # ranks may see a shared folder at different times
        else:
            found = all_or_none(lambda: [find_checkpoint(path)])
        if found[0] is None:
            return False
        place = os.path.join(*found[0])
        state = load_checkpoint(self.engine, place, self._replica_state())
        self.load_state_dict(state)
        self._resumed_from = place
        self.say(f"Resuming in epoch {self.epoch + 1}, after step {self.step}, from {place}")
        return True

    def train(self, guard: Guard | None = None) -> str:
        """Trains to the last epoch. Collective.

        Args:
            guard: what may stop it early.

        Returns:
            The path of the last checkpoint.

        Raises:
            UsageError: the folder holds another training, or a sample cannot be read.
            NonFiniteError: the loss or a weight is NaN or infinite; nothing of it is saved.
            SaveError: a checkpoint could not be written.
        """
        self._guard = guard
        self._began = time.monotonic() - self._seconds
        if self._resumed_from is None:
            all_or_none(self._check_folder)
        if self.speaks:
            os.makedirs(self.folder, exist_ok=True)
        _ = self.metrics  # drops the lines that are about to be written again
        device = self.engine.device
        kind, own = ("cuda", []) if device.type == "cpu" else (device.type, [device])
        with torch.random.fork_rng(own, device_type=kind):
            while self.epoch < self.epochs:
                self._train_epoch()
        self.saver.wait()
        return self.newest

    @cached_property
    def metrics(self) -> Metrics:
        """The figures reported so far; created when the training begins."""
        return Metrics(self.engine, self.folder, self.epoch + 1, resumed=self._resumed_from is not None)

    @property
    def seconds(self) -> float:
        """Of training and evaluation, those before a resume too."""
        return self._seconds if self._began is None else time.monotonic() - self._began

    @property
    def newest(self) -> str:
        """The path of the newest checkpoint; empty before the first."""
        return self.saver.path or self._resumed_from or ""

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The (images, labels, weights) of the evaluation that are this replica's; those of weight 0 do not count."""
        tests = self.tests or ()
        count = len(tests) if self.limit_steps is None else min(self.limit_steps, len(tests))
        for batch in progress_bar(islice(tests, count), count, "evaluation", "batch", self.speaks):
            if self._guard is not None and self._guard.asked(self.engine.device):
                self._leave(self._guard)
            yield batch

    def say(self, text: str) -> None:
        """Prints a line on rank 0, above the progress bar."""
        say(text, self.speaks)

    # The epochs.

    def _train_epoch(self) -> None:
        """What is left of an epoch, and its evaluation."""
        if self.step < self.steps:
            self._take_steps()
            average_running_statistics(self.engine.module, self.engine.data_parallel_group)
            self._save()
        loss = reduced(self.loss_sum) / dist.get_world_size()  # the ranks of one replica hold the same
        tested = {f"test_{key}": value for key, value in self._evaluated().items()}
        figures = {
            "train_loss": float(loss) / self.steps,
            **tested,
            "learning_rate": self.rate,
            "seconds": round(self.seconds, 3),
            "train_seconds": round(self.train_seconds, 3),
            "data_seconds": round(self.data_seconds, 3),
        }
        self.metrics.write(self.epoch + 1, figures)
        said = "  ".join([f"loss {figures['train_loss']:.4f}", *(in_words(*figure) for figure in tested.items())])
        self.say(f"{self._place()}  {said}  {figures['seconds']:.1f} s")
        if self.speaks and self.metrics.best(f"test_{self.judged_by}").get("epoch") == self.epoch + 1:
            self._mark_best()
        self.epoch, self.step = self.epoch + 1, 0
        self.loss_sum.zero_()

    def _take_steps(self) -> None:
        """The steps that are left of an epoch."""
        self.engine.train()
        first = self.step
        stream = self.batches.epoch(self.epoch, first * self.accumulation)
        with progress_bar(None, self.steps, self._place(), "step", self.speaks, first) as bar:
            while self.step < self.steps:
                total = self.epoch * self.steps + self.step
                if self._guard is not None and self._guard.before_step(total):
                    self._save()
                    self._leave(self._guard)
                if self.step > first and self.schedule.due(self.step, total, self.saver.busy):
                    self._save()
                self.saver.check()
                self._take_step(stream, total)
                bar.update()
                self.after_step()
                if self.engine.global_steps % self.log_interval == 0:
                    self._log()

    def _take_step(self, stream: Iterator[Any], total: int) -> None:
        """One step of the optimizer, the one after ``total`` of them."""
        began = time.perf_counter()
        self.rate = float(self.engine.optimizer.param_groups[0]["lr"])
        for number, batch in enumerate(islice(self._timed(stream), self.accumulation)):
            # A resumed run draws the same, with more or fewer replicas too, and replicas draw differently.
            self.micro_batch = (total * self.accumulation + number) * self.replicas + self.replica
            torch.manual_seed(stream_seed(self.seed, "micro-batch", self.micro_batch))
            loss = self.train_step(batch)
            self.engine.backward(loss)
            self.engine.step()
            share = loss.detach() / self.accumulation
            self.loss_sum += share
            self.meter.add_loss(share)
        self.average.step()
        self.step += 1
        if self.loss_sum.device.type == "cpu" or self.step % LOSS_CHECK_STEPS == 0:
            check_finite(float(self.loss_sum), self.epoch, self.step)
        seconds = time.perf_counter() - began
        self.train_seconds += seconds
        self.meter.add_step(seconds)

    def _timed(self, stream: Iterator[Any]) -> Iterator[Any]:
        """The batches of ``stream``; the time in which this rank waits for them is added up."""
        while True:
            began = time.perf_counter()
            batch = next(stream, None)
            self.data_seconds += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def _evaluated(self) -> dict[str, float]:
        began = time.perf_counter()
        self.engine.eval()
        with torch.no_grad(), self.average.in_place():
            found = self.evaluate()
        self.meter.evaluation_seconds = time.perf_counter() - began
        return found

    def _log(self) -> None:
        """Reports the steps since the last time."""
        figures = self.meter.read(self.epoch, self.step, self.rate)
        check_finite(figures["loss"], self.epoch, self.step)
        self.metrics.write(self.epoch + 1, figures)
        self.say(f"{self._place()}  step {self.step:>{len(str(self.steps))}}/{self.steps}  {in_a_line(figures)}")

    def _place(self) -> str:
        return f"epoch {self.epoch + 1:>{len(str(self.epochs))}}/{self.epochs}"

    def _save(self) -> None:
        began = time.perf_counter()
        check_finite(float(self.loss_sum), self.epoch, self.step)
        check_weights(self.engine.module, self.epoch, self.step)
        tag = f"epoch-{self.epoch + 1}" + (f"-step-{self.step}" if self.step < self.steps else "")
        self.saver.save(tag, self.state_dict(), self._replica_state())
        self.schedule.saved()
        self.saves += 1
        self.save_seconds += time.perf_counter() - began

    def _mark_best(self) -> None:
        """Marks the checkpoint of this epoch: that of a run that was stopped in its evaluation was saved before."""
        if self.saver.path:
            self.saver.mark_best()
        elif self._resumed_from is not None:
            folder, tag = os.path.split(self._resumed_from)
            if os.path.realpath(folder) == os.path.realpath(self.saver.folder):
                mark_best(folder, tag)

    def _replica_state(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint that are each replica's own."""
        return {"loss_sum": self.loss_sum, "interval": self.meter.interval}

    def _leave(self, guard: Guard) -> NoReturn:
        """Leaves when the checkpoint under way is on the disk."""
        self.saver.wait()
        guard.leave(self.newest)

    def _check_folder(self) -> list[None]:
        if self.speaks:
            check_free(self.folder, "folder", "call resume()")
        return []
