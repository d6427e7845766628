"""What a trained network makes of images: how it does on a data set, and which classes it sees in pictures.

On one device, an accelerator where there is one. Needs no deepspeed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from tlgc_mp.checkpoint import offline
from tlgc_mp.checkpoint.folder import is_exported
from tlgc_mp.data import EvaluationBatches, load_datasets
from tlgc_mp.data.pictures import read_image
from tlgc_mp.data.preparation import Preparation
from tlgc_mp.errors import UsageError
from tlgc_mp.training.console import progress_bar
from tlgc_mp.training.evaluation import EVALUATION_BATCH, Totals, evaluate

_OF_TENSORS = ("digits", "synthetic")
"""Data sets that are no pictures, which nothing but their own network is made for."""
_BATCH = 64


class NamedFigures(Totals):
    """Of a network on a data set: the accuracy of each class by its name."""

    class_accuracy_percent: dict[str, float | None]


def load(path: str) -> tuple[torch.nn.Module, Preparation, torch.device]:
    """The network in an exported file, a run or one of its checkpoints, how its images are prepared, and its device.

    Raises:
        UsageError: it cannot be read, or does not say how images are prepared.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, images = (offline.load_exported if is_exported(path) else offline.load_saved)(path, device)
    classes = images.get("classes") if isinstance(images, dict) else None
    try:
        preparation = Preparation.from_entry(images, len(classes) if isinstance(classes, list) else 0)
    except UsageError as error:
        raise UsageError(f"{path!r}: {error}") from None
    return model.to(memory_format=torch.channels_last), preparation, device  # type: ignore[call-overload]


def score(
    path: str,
    dataset: str,
    data_dir: str | None,
    *,
    workers: int,
    image_size: int | None = None,
    num_classes: int | None = None,
    val_split: str | None = None,
    seed: int = 0,
) -> NamedFigures:
    """The figures of :class:`~tlgc_mp.training.evaluation.Scores` on a data set's test images, with the accuracy of
    each class by its name.

    Args:
        path: as for :func:`load`.
        dataset, data_dir, image_size, num_classes, val_split, seed: as :func:`~tlgc_mp.data.load_datasets` takes
            them. Images are prepared as the network wants them.

    Raises:
        UsageError: one of the two cannot be read, or they do not fit each other.
    """
    model, preparation, device = load(path)
    if dataset in ("imagefolder", "synthetic"):
        image_size = image_size or preparation.image_size
    data = load_datasets(
        dataset, data_dir, seed=seed, image_size=image_size, num_classes=num_classes, val_split=val_split
    )
    own = data.preparation
    if own.classes != preparation.classes:
        first = next((pair for pair in zip(own.classes, preparation.classes, strict=False) if len(set(pair)) > 1), None)
        unlike = f": {first[0]} where it has {first[1]}" if first else ""
        raise UsageError(
            f"--dataset must have the {len(preparation.classes)} classes of the network, got {dataset} with "
            f"{len(own.classes)}{unlike}"
        )
    if own != preparation:
        if dataset in _OF_TENSORS:
            raise UsageError(
                f"--dataset must be of pictures for this network, got {dataset}, which it was not made for"
            )
        data.test.transform = preparation.transform()  # type: ignore[attr-defined]
    batches = EvaluationBatches(data.test, batch_size=EVALUATION_BATCH, rank=0, replicas=1, num_workers=workers)
    found = evaluate(model, progress_bar(batches, len(batches), "evaluation", "batch"), device)
    return {
        "images": found["images"],
        "loss": found["loss"],
        "error_percent": found["error_percent"],
        "top5_error_percent": found["top5_error_percent"],
        "class_accuracy_percent": dict(zip(own.classes, found["class_accuracy_percent"], strict=True)),
    }


@torch.no_grad()
def label(path: str, pictures: Sequence[str], top: int) -> Iterator[tuple[str, list[tuple[str, float]]]]:
    """Each picture with its ``top`` likeliest classes and their probabilities.

    Args:
        path: as for :func:`load`.

    Raises:
        UsageError: one of the files cannot be read.
    """
    model, preparation, device = load(path)
    transform = preparation.transform()
    for start in range(0, len(pictures), _BATCH):
        some = pictures[start : start + _BATCH]
        images = torch.stack([transform(read_image(picture)) for picture in some])
        probabilities = model(images.to(device, memory_format=torch.channels_last)).softmax(1).cpu()
        values, numbers = probabilities.topk(min(top, len(preparation.classes)))
        for picture, row, chosen in zip(some, values.tolist(), numbers.tolist(), strict=True):
            yield picture, [(preparation.classes[n], value) for n, value in zip(chosen, row, strict=True)]
