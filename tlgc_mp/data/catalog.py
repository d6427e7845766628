"""Which data sets there are, and what can be known of one before any of it is loaded."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tlgc_mp.data.folders import IMAGE_SUFFIXES, class_folders, may_hold_images
from tlgc_mp.errors import UsageError, check_installed, one_of, shown

DATASETS: tuple[str, ...] = ("digits", "cifar10", "cifar100", "imagenet", "imagefolder", "synthetic")

_CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}

_IMAGENET_CLASSES = 1000

_NEEDED_FOLDER = {
    "cifar10": "a folder that holds cifar-10-batches-py/, or to download it into",
    "cifar100": "a folder that holds cifar-100-python/, or to download it into",
    "imagenet": "the folder that holds train/<wnid>/ and val/<wnid>/",
    "imagefolder": "the folder that holds train/<class>/ and test/<class>/ (or val/<class>/)",
}


def check_dataset(name: str, data_dir: str | None, val_split: str | None = None) -> None:
    """Refuse, without loading anything, a data set that cannot be loaded.

    ``digits`` and ``synthetic`` need no ``data_dir``. ``cifar10`` and ``cifar100`` need one, which may be
    missing or empty: they are then downloaded into it. ``imagenet`` and ``imagefolder`` need one that holds
    a folder for each split, and in each split a folder of images for each class. ``val_split`` is as
    :func:`split_folders` wants it.

    Raises:
        UsageError: ``name`` is unknown, or ``data_dir`` is missing or does not hold what ``name`` needs, or
            ``val_split`` is given where the set has no folders.
    """
    if name == "digits":
        check_installed("sklearn", "train", "--dataset digits")
    if name not in DATASETS:
        raise UsageError(f"--dataset must be {one_of(DATASETS)}, got {name!r}")
    if val_split is not None and name not in ("imagenet", "imagefolder"):
        raise UsageError(
            f"--val-split must be left out with --dataset {name}, which has one test set, got {val_split!r}"
        )
    if val_split is not None and not isinstance(val_split, str):
        raise UsageError(f"--val-split must be the name of a folder in --data-dir, got {shown(val_split)}")
    if name not in _NEEDED_FOLDER:
        return
    if data_dir is None:
        raise UsageError(f"--data-dir must be given with --dataset {name}, got none; use {_NEEDED_FOLDER[name]}")
    if not isinstance(data_dir, str | os.PathLike):
        raise UsageError(f"--data-dir must be a path, got {shown(data_dir)}; use {_NEEDED_FOLDER[name]}")
    with refusing_unreadable(name, data_dir):
        if name in _CIFAR_FOLDERS:
            _check_download_folder(name, Path(data_dir))
        else:
            _check_image_folders(name, Path(data_dir), val_split)


@contextlib.contextmanager
def refusing_unreadable(name: str, data_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Raises :class:`UsageError` for what the system refuses below ``data_dir``."""
    try:
        yield
    except UsageError:
        raise
    except PermissionError as error:
        raise UsageError(f"--data-dir {data_dir}: no permission to read {error.filename}; make it readable") from error
    except (OSError, ValueError) as error:  # a name too long, a disk that fails, no path at all
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"--data-dir {shown(str(data_dir))} cannot be read: {reason}; use {_NEEDED_FOLDER[name]}"
        ) from error


def split_folders(name: str, data_dir: Path, val_split: str | None = None) -> tuple[Path, Path]:
    """The training and the test folder of ``imagenet`` or ``imagefolder``.

    The latter is ``val_split`` where it is given; else ``val/`` of ``imagenet``, and of ``imagefolder`` ``test/``, or
    ``val/`` where ``test/`` is not there or has no class of the training folder's, as unlabelled images have none.

    Raises:
        UsageError: one of the two is not there.
    """
    test_names = ("val",) if name == "imagenet" else ("test", "val")
    if val_split is not None:
        test_names = (val_split,)
    splits = []
    for candidates in (("train",), test_names):
        found = [data_dir / candidate for candidate in candidates if candidate and (data_dir / candidate).is_dir()]
        if not found:
            hint = "" if candidates == ("train",) else "; --val-split NAME names another folder to test on"
            raise UsageError(
                f"--data-dir {data_dir} holds no {' or '.join(f'{candidate}/' for candidate in candidates)}; "
                f"--dataset {name} needs {_NEEDED_FOLDER[name]}{hint}"
            )
        splits.append(found)
    train, tests = splits[0][0], splits[1]
    if len(tests) > 1:
        classes = set(class_folders(train))
        tests = [test for test in tests if classes & set(class_folders(test))] or tests
    return train, tests[0]


def _check_download_folder(name: str, data_dir: Path) -> None:
    if (data_dir / _CIFAR_FOLDERS[name]).is_dir():
        return
    # The first of the folder and its parents that exists is where new files or folders would be made.
    existing = next(path for path in (data_dir.absolute(), *data_dir.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UsageError(
            f"--data-dir must be a folder, got {data_dir}, where {existing} is a file; use {_NEEDED_FOLDER[name]}"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(
            f"--data-dir {data_dir} holds no {_CIFAR_FOLDERS[name]}/ and {existing} cannot be written to; "
            f"use {_NEEDED_FOLDER[name]}"
        )


def _check_image_folders(name: str, data_dir: Path, val_split: str | None) -> None:
    if not data_dir.is_dir():
        problem = "is not a folder" if data_dir.exists() else "does not exist"
        raise UsageError(f"--data-dir {data_dir} {problem}; --dataset {name} needs {_NEEDED_FOLDER[name]}")
    train, test = split_folders(name, data_dir, val_split)
    train_classes, test_classes = _classes(train), _classes(test)
    if len(train_classes) == 1 and name == "imagefolder":
        (only_class,) = train_classes
        raise UsageError(
            f"--data-dir {data_dir}: {train.name}/ must hold two class folders or more, got {only_class} alone; put "
            f"the images of each class in {train.name}/<class>/"
        )
    for only, here, there in (
        (train_classes - test_classes, train, test),
        (test_classes - train_classes, test, train),
    ):
        if only:
            raise UsageError(
                f"--data-dir {data_dir}: class {min(only)} is in {here.name}/ but not in {there.name}/; "
                "give both the same class folders, or test on another folder with --val-split NAME"
            )
    if name == "imagenet" and len(train_classes) != _IMAGENET_CLASSES:
        raise UsageError(
            f"--data-dir {data_dir} holds {len(train_classes)} class folders, ImageNet has {_IMAGENET_CLASSES}; "
            "complete it, or use --dataset imagefolder"
        )


def _classes(split: Path) -> set[str]:
    """The names of the class folders of one split, each of which holds an image."""
    classes = class_folders(split)
    if not classes:
        raise UsageError(f"--data-dir {split.parent}: {split} holds no class folders; put images in {split}/<class>/")
    for name in classes:
        if not may_hold_images(split / name):
            raise UsageError(
                f"--data-dir {split.parent}: class folder {split / name} holds no image "
                f"({', '.join(IMAGE_SUFFIXES)}); add images or remove the folder"
            )
    return set(classes)
