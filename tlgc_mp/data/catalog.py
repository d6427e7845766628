"""Which data sets there are, and what can be known of one before any of it is loaded."""

import os
from pathlib import Path

from tlgc_mp.errors import UsageError, one_of, shown

DATASETS: tuple[str, ...] = ("digits", "cifar10", "cifar100", "imagenet", "imagefolder", "synthetic")

_CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}

_IMAGENET_CLASSES = 1000

# What torchvision's ImageFolder takes for an image; it passes over every other file.
_IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

_NEEDED_FOLDER = {
    "cifar10": "a folder that holds cifar-10-batches-py/, or to download it into",
    "cifar100": "a folder that holds cifar-100-python/, or to download it into",
    "imagenet": "the folder that holds train/<wnid>/ and val/<wnid>/",
    "imagefolder": "the folder that holds train/<class>/ and test/<class>/ (or val/<class>/)",
}


def check_dataset(name: str, data_dir: str | None) -> None:
    """Refuse, without loading anything, a data set that cannot be loaded.

    ``digits`` and ``synthetic`` need no ``data_dir``. ``cifar10`` and ``cifar100`` need one, which may be
    missing or empty: they are then downloaded into it. ``imagenet`` and ``imagefolder`` need one that holds
    a folder for each split, and in each split a folder of images for each class.

    Raises:
        UsageError: ``name`` is unknown, or ``data_dir`` is missing or does not hold what ``name`` needs.
    """
    if name not in DATASETS:
        raise UsageError(f"--dataset {name} is unknown; use {one_of(DATASETS)}")
    if name not in _NEEDED_FOLDER:
        return
    if data_dir is None:
        raise UsageError(f"--data-dir is missing; --dataset {name} needs {_NEEDED_FOLDER[name]}")
    if not isinstance(data_dir, str | os.PathLike):
        raise UsageError(f"--data-dir {shown(data_dir)} is no path; use {_NEEDED_FOLDER[name]}")
    try:
        if name in _CIFAR_FOLDERS:
            _check_download_folder(name, Path(data_dir))
        else:
            _check_image_folders(name, Path(data_dir))
    except PermissionError as error:
        raise UsageError(f"--data-dir {data_dir}: no permission to read {error.filename}; make it readable") from error
    except (OSError, ValueError) as error:  # a name too long, a disk that fails, no path at all
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"--data-dir {shown(str(data_dir))} cannot be read: {reason}; use {_NEEDED_FOLDER[name]}"
        ) from error


def split_folders(name: str, data_dir: Path) -> tuple[Path, Path]:
    """The training and the test folder of ``imagenet`` or ``imagefolder``; ``test/`` is preferred to ``val/``.

    Raises:
        UsageError: one of the two is not there.
    """
    test_names = ("val",) if name == "imagenet" else ("test", "val")
    splits = []
    for candidates in (("train",), test_names):
        found = [data_dir / candidate for candidate in candidates if (data_dir / candidate).is_dir()]
        if not found:
            raise UsageError(
                f"--data-dir {data_dir} holds no {' or '.join(f'{candidate}/' for candidate in candidates)}; "
                f"--dataset {name} needs {_NEEDED_FOLDER[name]}"
            )
        splits.append(found[0])
    return splits[0], splits[1]


def _check_download_folder(name: str, data_dir: Path) -> None:
    if (data_dir / _CIFAR_FOLDERS[name]).is_dir():
        return
    # The first of the folder and its parents that exists is where new files or folders would be made.
    existing = next(path for path in (data_dir.absolute(), *data_dir.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UsageError(f"--data-dir {data_dir}: {existing} is not a folder; use {_NEEDED_FOLDER[name]}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(
            f"--data-dir {data_dir} holds no {_CIFAR_FOLDERS[name]}/ and {existing} cannot be written to; "
            f"use {_NEEDED_FOLDER[name]}"
        )


def _check_image_folders(name: str, data_dir: Path) -> None:
    if not data_dir.is_dir():
        problem = "is not a folder" if data_dir.exists() else "does not exist"
        raise UsageError(f"--data-dir {data_dir} {problem}; --dataset {name} needs {_NEEDED_FOLDER[name]}")
    train, test = split_folders(name, data_dir)
    train_classes, test_classes = _classes(train), _classes(test)
    for only, here, there in (
        (train_classes - test_classes, train, test),
        (test_classes - train_classes, test, train),
    ):
        if only:
            raise UsageError(
                f"--data-dir {data_dir}: class {min(only)} is in {here.name}/ but not in {there.name}/; "
                "give both the same class folders"
            )
    if name == "imagenet" and len(train_classes) != _IMAGENET_CLASSES:
        raise UsageError(
            f"--data-dir {data_dir} holds {len(train_classes)} class folders, ImageNet has {_IMAGENET_CLASSES}; "
            "complete it, or use --dataset imagefolder"
        )


def _classes(split: Path) -> set[str]:
    """The names of the class folders of one split, each of which holds an image."""
    with os.scandir(split) as entries:
        classes = {entry.name for entry in entries if entry.is_dir()}
    if not classes:
        raise UsageError(f"--data-dir {split.parent}: {split} holds no class folders; put images in {split}/<class>/")
    for name in sorted(classes):
        if not _holds_image(split / name):
            raise UsageError(
                f"--data-dir {split.parent}: class folder {split / name} holds no image "
                f"({', '.join(_IMAGE_EXTENSIONS)}); add images or remove the folder"
            )
    return classes


def _holds_image(folder: Path) -> bool:
    return any(
        file.lower().endswith(_IMAGE_EXTENSIONS) for _, _, files in os.walk(folder, followlinks=True) for file in files
    )
