"""The model of a training run, checked against the images that it is to train on."""

from __future__ import annotations

import torch
from torch import nn

from tlgc_mp.errors import UsageError
from tlgc_mp.models import create_model, libraries
from tlgc_mp.models.factory import create_meta_model
from tlgc_mp.models.names import library_model
from tlgc_mp.training.options import model_arguments
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
    arguments = model_arguments(settings, num_classes)
    if library_model(settings.model) is not None:
        libraries.check_images(settings.model, image_size, max(settings.micro_batch, libraries.BATCH))
    if settings.micro_batch == 1:
        _check_single_images(create_meta_model(settings.model, **arguments), image_size, settings)
    torch.manual_seed(settings.seed)
    return create_model(settings.model, **arguments, device="meta")


def _check_single_images(model: nn.Module, image_size: int, settings: TrainSettings) -> None:
    """Raises :class:`~tlgc_mp.errors.UsageError` where a batch of one image leaves BatchNorm one value a channel."""
    try:
        libraries.output_on_meta(model, 1, image_size, image_size)
    except ValueError as error:  # batches of two have gone through
        replicas, accumulation = settings.topology.data_parallel, settings.accumulation
        raise UsageError(
            f"the batch of each replica must be 2 images or more, got 1 ({replicas * accumulation} in {replicas} "
            f"replicas x {accumulation} accumulation steps): of one image of {image_size} x {image_size} pixels, "
            f"{settings.model} has BatchNorm take the statistics of a single value; use --batch-size "
            f"{2 * replicas * accumulation} or more"
        ) from error
