"""Evaluation over a test set, of a run's engine or of a network alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tlgc_mp.engine.protocols import Engine
from tlgc_mp.errors import UsageError

EVALUATION_BATCH = 250
TOP = 5
"""Of how many guesses one must be right, where not the first."""


class Totals(TypedDict):
    """Of a test set; the top-5 error only of more than five classes."""

    images: int
    loss: float
    error_percent: float
    top5_error_percent: float | None


class Figures(Totals):
    """With the accuracy of each class, in their order; ``None`` of one without images."""

    class_accuracy_percent: list[float | None]


class Scores:
    """How a network does on labelled images, added up batch by batch."""

    def __init__(self) -> None:
        self._classes = 0
        self._totals = torch.empty(0)  # of losses, of labels not among the likeliest, of images; and two of each class

    def add(self, logits: Tensor, labels: Tensor, weights: Tensor) -> None:
        """Counts images of weight 1, and not those of weight 0."""
        if not self._classes:
            self._classes = logits.shape[1]
            self._totals = torch.zeros(3 + 2 * self._classes, dtype=torch.float64, device=logits.device)
        weights = weights.double()
        losses = F.cross_entropy(logits, labels, reduction="none").double()
        ranked = logits.topk(min(TOP, self._classes)).indices  # B x TOP
        first, among = ranked[:, 0] == labels, (ranked == labels[:, None]).any(1)
        self._totals[:3] += torch.stack([(losses * weights).sum(), ((~among) * weights).sum(), weights.sum()])
        for start, counted in ((3, first * weights), (3 + self._classes, weights)):
            self._totals[start : start + self._classes].index_add_(0, labels, counted)

    def read(self) -> Figures:
        """The figures of all that was added. Collective where torch.distributed is up.

        Raises:
            UsageError: nothing was added.
        """
        if not self._classes:
            raise UsageError("the test set must hold an image or more, got none")
        totals = reduced(self._totals) if dist.is_initialized() else self._totals
        loss, missed, images = totals[:3].tolist()
        right, held = totals[3:].view(2, self._classes).tolist()
        return {
            "images": int(images),
            "loss": loss / images,
            "error_percent": 100.0 * (images - sum(right)) / images,
            "top5_error_percent": 100.0 * missed / images if self._classes > TOP else None,
            "class_accuracy_percent": [100.0 * r / h if h else None for r, h in zip(right, held, strict=True)],
        }


@torch.no_grad()
def evaluate(
    network: torch.nn.Module | Engine, batches: Iterable[tuple[Tensor, Tensor, Tensor]], device: torch.device
) -> Figures:
    """The figures of :class:`Scores` over a test set, each image counted once. Collective.

    Args:
        network: an engine or a module on ``device``, which is left in evaluation mode.
        batches: (images, labels, weights), as :class:`tlgc_mp.data.EvaluationBatches` yields them.
    """
    network.eval()
    scores = Scores()
    for images, labels, weights in batches:
        images, labels = to_device(images, labels, network, device)
        scores.add(wide(network(images)), labels, weights.to(device))
    return scores.read()


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


def reduced(tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """``tensor`` reduced over all ranks of the world, as a new one."""
    tensor = tensor.clone()
    dist.all_reduce(tensor, op)
    return tensor


def to_device(
    images: Tensor, labels: Tensor, network: torch.nn.Module | Engine, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A batch on ``device``; images in the type of the weights, which DeepSpeed's bf16 and fp16 change."""
    dtype = next(network.parameters()).dtype
    images = images.to(device, dtype, memory_format=torch.channels_last, non_blocking=True)
    return images, labels.to(device, non_blocking=True)


def wide(logits: Tensor) -> Tensor:
    """``logits`` as a loss takes them: float32 where they are half as wide."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
