"""What a run begins with, or goes on from: other weights, or a checkpoint and what was asked to change there."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from tlgc_mp.checkpoint import load_checkpoint
from tlgc_mp.checkpoint.folder import saved_run
from tlgc_mp.checkpoint.weights import load_weights
from tlgc_mp.errors import UsageError
from tlgc_mp.training import optimization
from tlgc_mp.training.changes import changes, place
from tlgc_mp.training.headline import respread
from tlgc_mp.training.meter import Meter
from tlgc_mp.training.settings import TrainSettings


def begin(settings: TrainSettings, engine: Any) -> list[str]:
    """Gives ``engine`` the weights that a new run is to begin with; returns what to say of it. Collective."""
    if settings.init_from is None:
        return []
    try:
        left = load_weights(engine, settings.init_from)
    except UsageError as error:
        raise UsageError(f"--init-from: {error}") from None
    return [f"Beginning with the weights in {settings.init_from}" + (f", but for {', '.join(left)}" if left else "")]


def resume(
    settings: TrainSettings, engine: Any, steps: int, loss_sum: Tensor, meter: Meter
) -> tuple[dict[str, Any], list[str]]:
    """Loads the checkpoint into ``engine``, ``loss_sum`` and ``meter``. Collective.

    Args:
        steps: of an epoch, now.

    Returns:
        (where the run is, what to say of it)
    """
    assert settings.resume_from is not None
    path = os.path.join(*settings.resume_from)
    progress = load_checkpoint(engine, path, {"loss_sum": loss_sum, "interval": meter.interval})["progress"]
    lines = [f"Resuming in epoch {progress['epoch'] + 1}, after step {progress['step']}, from {path}"]
    if spread := respread(settings):
        lines.append(spread)
    saved = saved_run(*settings.resume_from)
    if changed := changes(settings, saved):
        step = place(settings, saved, progress, steps)
        loss_sum *= step / max(1, progress["step"])
        progress = {**progress, "step": step}
        optimization.change(engine, settings, steps, progress["epoch"] * steps + step)
        rate = engine.basic_optimizer.param_groups[0]["lr"]
        lines.append(
            f"Changed from here on: {', '.join(changed)}; the rate is {rate:.4g}, by the schedule as it is now"
        )
    return progress, lines
