"""The model of a training run, checked against the images that it is to train on."""

from __future__ import annotations

import torch
from torch import nn

from tlgc_mp.models import create_model, libraries
from tlgc_mp.models.names import library_model
from tlgc_mp.training.settings import TrainSettings


def check_library(settings: TrainSettings) -> None:
    """Raises :class:`~tlgc_mp.errors.UsageError` for a model that its library does not have, or that a run cannot
    train; to be called before the data set is read."""
    if library_model(settings.model) is not None:
        libraries.check_trainable(settings.model)


def model_of(settings: TrainSettings, num_classes: int, image_size: int) -> nn.Module:
    """The model of a run: on the meta device where its weights are drawn by each rank, else whole on the CPU.

    Raises:
        UsageError: it does not take images of ``image_size`` x ``image_size`` pixels, or cannot be built.
    """
    if library_model(settings.model) is not None:
        libraries.check_images(settings.model, image_size, settings.micro_batch)
    torch.manual_seed(settings.seed)
    return create_model(
        settings.model,
        conv=settings.conv,
        groups=settings.groups,
        num_classes=num_classes,
        coarse_everywhere=settings.coarse_everywhere,
        coarse_kernel_size=settings.coarse_kernel_size,
        coarse_init=settings.coarse_init,
        device="meta",
    )
