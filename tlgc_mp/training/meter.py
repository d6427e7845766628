"""How a run gets on, every so many steps: the loss, the rate, how fast it goes and how long it will take."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tlgc_mp.models import libraries
from tlgc_mp.models.factory import create_meta_model
from tlgc_mp.training.evaluation import reduced
from tlgc_mp.training.model import model_arguments
from tlgc_mp.training.settings import TrainSettings


class Meter:
    """Adds up what the steps since the last look have taken.

    Attributes:
        interval: (the sum of this replica's losses, the steps) since the last look; a checkpoint holds it, so that a
            resumed run reports the same losses.

    Args:
        settings: of the run.
        flops: of a training step, over all ranks.
        steps: of an epoch.
        device: of the losses.
    """

    def __init__(self, settings: TrainSettings, flops: float, steps: int, device: torch.device) -> None:
        self.interval = torch.zeros(2, dtype=torch.float64, device=device)
        self._settings, self._flops, self._steps = settings, flops, steps
        self._seconds, self._timed = 0.0, 0
        self.evaluation_seconds = 0.0
        """Of the latest evaluation."""

    def add(self, loss: Tensor, seconds: float) -> None:
        """Counts a step."""
        self.interval += torch.stack([loss, torch.ones_like(loss)])
        self._seconds += seconds
        self._timed += 1

    def read(self, epoch: int, epoch_step: int, rate: float) -> dict[str, float]:
        """The figures of the steps since the last look, after ``epoch_step`` steps of 0-based ``epoch``. Collective."""
        total, count = reduced(self.interval).tolist()
        world = self._settings.topology.world
        step_seconds = self._seconds / self._timed
        epochs_left = self._settings.epochs - epoch
        steps_left = epochs_left * self._steps - epoch_step
        figures = {
            "loss": total / count,  # the ranks of one replica hold the same
            "learning_rate": rate,
            "images_per_second": float(f"{self._settings.batch_size / step_seconds:.4g}"),
            "tflops_per_rank": float(f"{self._flops / world / step_seconds / 1e12:.4g}"),
            "remaining_seconds": round(steps_left * step_seconds + epochs_left * self.evaluation_seconds, 1),
        }
        self.interval.zero_()
        self._seconds, self._timed = 0.0, 0
        return figures


def step_flops(settings: TrainSettings, num_classes: int, image_size: int) -> float:
    """Multiplications and additions of a training step over all ranks: of the whole model on one device, as torch
    counts them, with the backward pass at twice the forward one."""
    model = create_meta_model(settings.model, **model_arguments(settings, num_classes))
    with FlopCounterMode(display=False) as counter:
        libraries.output_on_meta(model, libraries.BATCH, image_size, image_size)
    return 3.0 * counter.get_total_flops() / libraries.BATCH * settings.batch_size


def in_a_line(figures: dict[str, float]) -> str:
    """The figures of :meth:`Meter.read`, for people."""
    return (
        f"loss {figures['loss']:.4f}  rate {figures['learning_rate']:.4g}  "
        f"{figures['images_per_second']:,.4g} images/s  {figures['tflops_per_rank']:.3g} TFLOP/s a rank  "
        f"{as_time(figures['remaining_seconds'])} left"
    )


def as_time(seconds: float) -> str:
    """A time to wait, in the two largest of its units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02d} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
