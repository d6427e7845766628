"""Which data sets there are, and what can be known of one before any of it is loaded."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tlgc_mp.data.folders import IMAGE_SUFFIXES, class_folders, may_hold_images
from tlgc_mp.errors import UsageError, check_installed, must_be, one_of, shown

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
        note, hint = f", where {error.filename} is not", "change its permissions"
        raise must_be("--data-dir", "a readable folder", str(data_dir), hint, note=note) from error
    except (OSError, ValueError) as error:  # a name too long, a disk that fails, no path at all
        note = f": {getattr(error, 'strerror', None) or error}"
        use = f"use {_NEEDED_FOLDER[name]}"
        raise must_be("--data-dir", "a readable folder", str(data_dir), use, note=note) from error


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
            hint = "" if candidates == ("train",) else ", or --val-split NAME to test on another folder"
            need = f"a folder that holds {' or '.join(f'{candidate}/' for candidate in candidates)}"
            raise must_be("--data-dir", need, str(data_dir), f"use {_NEEDED_FOLDER[name]}{hint}")
        splits.append(found)
    train, tests = splits[0][0], splits[1]
    if len(tests) > 1:
        classes = set(class_folders(train))
        tests = [test for test in tests if classes & set(class_folders(test))] or tests
    return train, tests[0]


def _check_download_folder(name: str, data_dir: Path) -> None:
    if (data_dir / _CIFAR_FOLDERS[name]).is_dir():
        return
    use = f"use {_NEEDED_FOLDER[name]}"
    # The first of the folder and its parents that exists is where new files or folders would be made.
    existing = next(path for path in (data_dir.absolute(), *data_dir.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise must_be("--data-dir", "a folder", str(data_dir), use, note=f", where {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        need = f"a folder that holds {_CIFAR_FOLDERS[name]}/ or can be written to"
        raise must_be("--data-dir", need, str(data_dir), use, note=f", where {existing} cannot")


def _check_image_folders(name: str, data_dir: Path, val_split: str | None) -> None:
    if not data_dir.is_dir():
        note = ", which is a file" if data_dir.exists() else ", which does not exist"
        raise must_be("--data-dir", "a folder", str(data_dir), f"use {_NEEDED_FOLDER[name]}", note=note)
    train, test = split_folders(name, data_dir, val_split)
    train_classes, test_classes = _classes(train), _classes(test)
    if len(train_classes) == 1 and name == "imagefolder":
        (only_class,) = train_classes
        note, hint = f", where {train.name}/ holds {only_class} alone", f"put each class in {train.name}/<class>/"
        raise must_be("--data-dir", "a folder of two classes or more", str(data_dir), hint, note=note)
    for only, here, there in (
        (train_classes - test_classes, train, test),
        (test_classes - train_classes, test, train),
    ):
        if only:
            note = f", where class {min(only)} is in {here.name}/ but not in {there.name}/"
            hint = "give both the same class folders, or test on another folder with --val-split NAME"
            raise must_be("--data-dir", "a folder that tests the classes it trains", str(data_dir), hint, note=note)
    if name == "imagenet" and len(train_classes) != _IMAGENET_CLASSES:
        note, hint = f", which holds {len(train_classes)}", "complete it, or use --dataset imagefolder"
        raise must_be(
            "--data-dir", f"a folder of {_IMAGENET_CLASSES} classes for ImageNet", str(data_dir), hint, note=note
        )


def _classes(split: Path) -> set[str]:
    """The names of the class folders of one split, each of which holds an image."""
    classes, need = class_folders(split), "a folder of images by class"
    if not classes:
        note = f", where {split} holds no class folders"
        raise must_be("--data-dir", need, str(split.parent), f"put images in {split}/<class>/", note=note)
    for name in classes:
        if not may_hold_images(split / name):
            note = f", where {split / name} holds no image ({', '.join(IMAGE_SUFFIXES)})"
            raise must_be("--data-dir", need, str(split.parent), "add images or remove the folder", note=note)
    return set(classes)
