"""How a run gets on, every so many steps: the loss, the rate, how fast it goes and how long it will take."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tlgc_mp.models import libraries
from tlgc_mp.models.factory import create_meta_model
from tlgc_mp.training.evaluation import reduced
from tlgc_mp.training.options import model_arguments
from tlgc_mp.training.settings import TrainSettings


class Meter:
    """Adds up what the steps since the last look have taken.

    Args:
        epochs, steps: of the training, and of an epoch.
        batch_size: images a step, over all replicas.
        flops: of a training step, over all ranks; ``None`` where they are not known.
        device: of the losses.

    Attributes:
        interval: (the sum of this replica's losses, the steps) since the last look; a checkpoint holds it, so that a
            resumed run reports the same losses.
        evaluation_seconds: of the latest evaluation.
    """

    def __init__(self, *, epochs: int, steps: int, batch_size: int, flops: float | None, device: torch.device) -> None:
        self.interval = torch.zeros(2, dtype=torch.float64, device=device)
        self.evaluation_seconds = 0.0
        self._loss, self._count = self.interval.unbind()  # views
        self._epochs, self._steps, self._batch_size, self._flops = epochs, steps, batch_size, flops
        self._seconds, self._timed = 0.0, 0

    def add_loss(self, loss: Tensor) -> None:
        """Adds a part of a step's loss."""
        self._loss += loss

    def add_step(self, seconds: float) -> None:
        """Counts a step."""
        self._count += 1
        self._seconds += seconds
        self._timed += 1

    def read(self, epoch: int, epoch_step: int, rate: float) -> dict[str, float]:
        """The figures of the steps since the last look, after ``epoch_step`` steps of 0-based ``epoch``. Collective."""
        total, count = reduced(self.interval).tolist()
        step_seconds = self._seconds / self._timed
        epochs_left = self._epochs - epoch
        steps_left = epochs_left * self._steps - epoch_step
        figures = {
            "loss": total / count,  # the ranks of one replica hold the same
            "learning_rate": rate,
            "images_per_second": float(f"{self._batch_size / step_seconds:.4g}"),
        }
        if self._flops is not None:
            figures["tflops_per_rank"] = float(f"{self._flops / dist.get_world_size() / step_seconds / 1e12:.4g}")
        figures["remaining_seconds"] = round(steps_left * step_seconds + epochs_left * self.evaluation_seconds, 1)
        self.interval.zero_()
        self._seconds, self._timed = 0.0, 0
        return figures


def step_flops(settings: TrainSettings, num_classes: int, image_size: int) -> float:
    """Multiplications and additions of a training step over all ranks: of the whole model on one device, as torch
    counts them, with the backward pass at twice the forward one."""
    model = create_meta_model(settings.model, **model_arguments(settings, num_classes))
    with FlopCounterMode(display=False) as counter:
        libraries.output_on_meta(model, libraries.BATCH, image_size, image_size)
    return 3.0 * float(counter.get_total_flops()) / libraries.BATCH * settings.batch_size


def in_a_line(figures: dict[str, float]) -> str:
    """The figures of :meth:`Meter.read`, for people."""
    speed = f"{figures['images_per_second']:,.4g} images/s"
    if "tflops_per_rank" in figures:
        speed += f"  {figures['tflops_per_rank']:.3g} TFLOP/s a rank"
    return (
        f"loss {figures['loss']:.4f}  rate {figures['learning_rate']:.4g}  {speed}  "
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
