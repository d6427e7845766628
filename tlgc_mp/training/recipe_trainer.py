"""The trainer of ``tlgc-mp train``: a recipe, for an image classifier."""

from __future__ import annotations

import os
from typing import cast

from torch import Tensor

from tlgc_mp.checkpoint.folder import Progress, Run
from tlgc_mp.checkpoint.weights import load_weights
from tlgc_mp.data import Datasets, EvaluationBatches, TrainingBatches
from tlgc_mp.engine.config import section
from tlgc_mp.engine.protocols import Engine
from tlgc_mp.errors import UsageError
from tlgc_mp.json_types import JsonObject
from tlgc_mp.training import optimization
from tlgc_mp.training.changes import changes, place
from tlgc_mp.training.evaluation import to_device, wide
from tlgc_mp.training.headline import respread
from tlgc_mp.training.meter import step_flops
from tlgc_mp.training.profiling import StepProfiler
from tlgc_mp.training.runs import PROFILE
from tlgc_mp.training.settings import TrainSettings
from tlgc_mp.training.trainer import Trainer


class RecipeTrainer(Trainer):
    """Trains as the settings of a run have it; its checkpoints say what the run is.

    Args:
        settings: of the run.
        engine: of :func:`tlgc_mp.initialize`.
        data: what it trains on.
        batches, tests: of that, for this replica.
    """

    def __init__(
        self,
        settings: TrainSettings,
        engine: Engine,
        data: Datasets,
        batches: TrainingBatches,
        tests: EvaluationBatches,
    ) -> None:
        super().__init__(
            engine,
            batches,
            tests,
            epochs=settings.epochs,
            folder=settings.output_dir,
            seed=settings.seed,
            limit_steps=settings.limit_steps,
            log_interval=settings.log_interval,
            keep=settings.keep,
            save_seconds=None if settings.save_every is None else 60.0 * settings.save_every,
            save_steps=settings.save_every_steps,
            background_save=not settings.blocking_save,
            ema=settings.method.ema,
            flops=step_flops(settings, data.num_classes, data.image_size),
        )
        self.settings, self.preparation = settings, data.preparation
        self.loss = optimization.Loss(settings, data.num_classes)
        folder = os.path.join(self.folder, PROFILE)
        self.profiler = StepProfiler(settings.profile, folder, settings.topology.rank)

    def begin(self) -> None:
        """Resumes from the checkpoint that the settings name, with what was asked to be otherwise, or takes the weights
        that they name. Collective."""
        settings = self.settings
        if settings.resume_from is not None:
            self.resume(os.path.join(*settings.resume_from))
            if spread := respread(settings):
                self.say(spread)
            self._change()
        elif settings.init_from is not None:
            try:
                left = load_weights(self.engine, settings.init_from)
            except UsageError as error:
                raise UsageError(f"--init-from: {error}") from None
            less = f", but for {', '.join(left)}" if left else ""
            self.say(f"Beginning with the weights in {settings.init_from}{less}")

    def _change(self) -> None:
        """Goes on with the rate, the schedule and the batch of the settings, where they are not those of the run."""
        saved, progress = cast(Run, self._resumed["run"]), cast(Progress, self._resumed["progress"])
        if not (changed := changes(self.settings, saved)):
            return
        self.step = place(self.settings, saved, progress, self.steps)
        self.loss_sum *= self.step / max(1, progress["step"])
        optimization.change(self.engine, self.settings, self.steps, self.epoch * self.steps + self.step)
        rate = self.engine.basic_optimizer.param_groups[0]["lr"]
        self.say(f"Changed from here on: {', '.join(changed)}; the rate is {rate:.4g}, by the schedule as it is now")

    def train_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = to_device(*batch, self.engine.module, self.engine.device)
        images, labels = self.loss.mixed(images, labels, self.micro_batch)
        return self.loss(wide(self.engine(images)), labels)

    def after_step(self) -> None:
        self.profiler.step()

    def state_dict(self) -> JsonObject:
        return {
            "run": cast(JsonObject, self.settings.description()),
            "progress": super().state_dict(),
            "num_classes": len(self.preparation.classes),
            "images": self.preparation.entry(),
        }

    def load_state_dict(self, state: JsonObject) -> None:
        self._resumed = state
        super().load_state_dict(
            {**section(state, "progress"), "steps": self.steps}
        )  # of another length: _change minds it
