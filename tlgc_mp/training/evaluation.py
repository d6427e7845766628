"""Evaluation over the test set, of a run's engine."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from tlgc_mp.data import EvaluationBatches

EVALUATION_BATCH = 250


@torch.no_grad()
def evaluate(
    engine: Any, batches: EvaluationBatches, *, between: Callable[[], None], limit: int | None = None, speaks: bool
) -> tuple[float, float]:
    """(mean loss, error in percent) over the test set, each image counted once. Collective.

    Args:
        between: called before each batch, on every rank.
        limit: batches after which it ends, where it is not over before.
        speaks: whether this rank shows a bar, where standard error is a terminal.
    """
    engine.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=engine.device)
    count = len(batches) if limit is None else min(limit, len(batches))
    for images, labels, weights in progress_bar(islice(batches, count), count, "evaluation", "batch", speaks):
        between()
        images, labels = to_device(images, labels, engine)
        weights = weights.to(engine.device)
        logits = engine(images).float()
        wrong = (logits.argmax(1) != labels).float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        totals += torch.stack([(losses * weights).sum(), (wrong * weights).sum(), weights.sum()])
    loss, errors, images_seen = reduced(totals).tolist()
    return loss / images_seen, 100.0 * errors / images_seen


@torch.no_grad()
def average_running_statistics(model: torch.nn.Module, group: dist.ProcessGroup) -> None:
    """Replaces BatchNorm's running statistics by their mean over the data-parallel group, in one collective.

    Every replica keeps statistics of its own part of each batch, and the engine does not join them. Being moving
    averages, they may be averaged at any step without changing what the later average will be.
    """
    replicas = dist.get_world_size(group)
    if replicas == 1:
        return
    buffers = [b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
    if not buffers:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    dist.all_reduce(flat, group=group)
    flat /= replicas
    for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))


def reduced(tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """``tensor`` reduced over all ranks of the world, as a new one."""
    tensor = tensor.clone()
    dist.all_reduce(tensor, op)
    return tensor


def to_device(images: Tensor, labels: Tensor, engine: Any) -> tuple[Tensor, Tensor]:
    """A batch on the engine's device; images in the type of the weights, which DeepSpeed's bf16 and fp16 change."""
    dtype = next(engine.module.parameters()).dtype
    images = images.to(engine.device, dtype, memory_format=torch.channels_last, non_blocking=True)
    return images, labels.to(engine.device, non_blocking=True)


def progress_bar(items: Any, total: int, description: str, unit: str, speaks: bool, initial: int = 0) -> Any:
    """A bar around ``items``, which goes when it is done; none where standard error is no terminal."""
    return tqdm(
        items,
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        leave=False,
        dynamic_ncols=True,
        disable=None if speaks else True,
    )
