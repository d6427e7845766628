"""The data sets, with the augmentation of the paper's experiments.

A training item is augmented with torch's global CPU generator, as torchvision's transforms do it;
:class:`~tlgc_mp.data.loaders.TrainingBatches` sets that generator for each sample it reads, and restores it. Test
items are never random.
"""

import fcntl
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Protocol, TypeAlias

import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets import CIFAR10

from tlgc_mp.data.catalog import check_dataset, refusing_unreadable, split_folders
from tlgc_mp.data.folders import Images, class_folders, find_images
from tlgc_mp.data.pictures import read_image
from tlgc_mp.data.preparation import Preparation
from tlgc_mp.data.streams import stream
from tlgc_mp.errors import is_count, must_be

Sample: TypeAlias = tuple[Tensor, int]
Transform: TypeAlias = Callable[[Image.Image], Tensor]
# Mean and standard deviation of each channel of the training images, pixels scaled to 0..1.
Statistics: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]

_CIFAR10_STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_CIFAR100_STATISTICS = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
_IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_DIGITS_STATISTICS = ((0.3053,) * 3, (0.3760,) * 3)

_DIGITS_TEST_LENGTH = 360
_LARGEST_SMALL_IMAGE = 64
_KEPT_BYTES = 1 << 30  # of decoded small images, of one split, a process
_IMAGE_OBJECT_BYTES = 1024


class ImageDataset(Protocol):
    """A torch ``Dataset`` of known length whose items are an image, float32 3 x H x W, and its label."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


@dataclass(frozen=True)
class Datasets:
    """A training and a test set of square images.

    An item is ``(image, label)``: float32 3 x ``image_size`` x ``image_size``, normalized by channel, and an
    int in ``0..num_classes - 1``. ``preparation`` is what a test image has gone through. ``fingerprint`` tells
    folders of images from others: it is of names, classes and sizes. ``notes`` are lines for the user: which folder is
    tested on where there are two, and which files are left out.
    """

    train: ImageDataset
    test: ImageDataset
    preparation: Preparation
    fingerprint: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        return len(self.preparation.classes)

    @property
    def image_size(self) -> int:
        return self.preparation.image_size


def load_datasets(
    name: str,
    data_dir: str | None = None,
    *,
    seed: int = 0,
    image_size: int | None = None,
    num_classes: int | None = None,
    synthetic_length: int = 1024,
    val_split: str | None = None,
) -> Datasets:
    """Load the data set ``name``, one of :data:`~tlgc_mp.data.catalog.DATASETS`.

    Args:
        name: ``digits``: scikit-learn's 8 x 8 digits, 1437 to train on and 360 to test on, shifted by up to a pixel.
            ``cifar10``, ``cifar100``: pad 4, random crop, flip; downloaded if ``data_dir`` does not hold them.
            ``imagenet``: random resized crop to 224, flip. ``imagefolder``: as CIFAR if the images are small (at
            most 64 pixels), else as ImageNet. ``synthetic``: noise around a pattern for each class. Images in folders
            are turned as their EXIF orientation says, those of 16 bits or in floating point (0..1) keep their range,
            and what is transparent lies on white; hidden files and folders are not data.
        data_dir: as :func:`~tlgc_mp.data.catalog.check_dataset` wants it.
        seed: of the ``synthetic`` images; the other sets do not depend on it.
        image_size: side in pixels. Default: the set's own; for ``imagefolder`` the shorter side of the first
            training image if that is at most 64, else 224; for ``synthetic`` 32.
        num_classes: of ``synthetic``, default 10; for the other sets it must be their own.
        synthetic_length: training samples of ``synthetic``; a quarter as many test samples.
        val_split: the folder to test on, as :func:`~tlgc_mp.data.catalog.split_folders` takes it.

    Raises:
        UsageError: the set cannot be found, read or downloaded, or has another image size or class count.
    """
    check_dataset(name, data_dir, val_split)
    for argument, value in (
        ("image_size", image_size),
        ("num_classes", num_classes),
        ("synthetic_length", synthetic_length),
    ):
        if value is not None and not is_count(value):
            raise must_be(argument, "1 or more", value)
    if not isinstance(seed, int):
        raise must_be("seed", "an int", seed)

    if name == "digits":
        datasets = _digits()
    elif name == "synthetic":
        datasets = _synthetic(seed, image_size or 32, num_classes or 10, synthetic_length)
    else:
        assert data_dir is not None  # check_dataset has refused it
        if name == "cifar10":
            datasets = _cifar(name, torchvision.datasets.CIFAR10, Path(data_dir), _CIFAR10_STATISTICS)
        elif name == "cifar100":
            datasets = _cifar(name, torchvision.datasets.CIFAR100, Path(data_dir), _CIFAR100_STATISTICS)
        else:
            datasets = _image_folders(name, Path(data_dir), image_size, val_split)

    for argument, asked, actual in (
        ("image_size", image_size, datasets.image_size),
        ("num_classes", num_classes, datasets.num_classes),
    ):
        if asked not in (None, actual):
            raise must_be(argument, f"{actual} with --dataset {name}, or left out", asked)
    return datasets


class _Labelled(Dataset[Sample]):
    """Images N x 3 x H x W and labels N held in memory."""

    def __init__(self, images: Tensor, labels: list[int], transform: Callable[[Tensor], Tensor]) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return self.transform(self.images[index]), self.labels[index]


def _digits() -> Datasets:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(16).unsqueeze(1).repeat(1, 3, 1, 1)  # N x 3 x 8 x 8
    labels = digits.target.tolist()
    train, test = train_test_split(range(len(labels)), test_size=_DIGITS_TEST_LENGTH, stratify=labels, random_state=0)
    preparation = Preparation(tuple(map(str, range(10))), 8, 8, *_DIGITS_STATISTICS)
    normalize = preparation.to_tensor()[-1]
    # No flip: a mirrored digit is another sign.
    shift = transforms.Compose([transforms.RandomCrop(8, padding=1), normalize])
    return Datasets(
        train=_Labelled(images[train], [labels[i] for i in train], shift),
        test=_Labelled(images[test], [labels[i] for i in test], normalize),
        preparation=preparation,
    )


class _Synthetic(Dataset[Sample]):
    """Standard normal noise on a smooth pattern that depends on the class; item ``i`` is of class ``i % num_classes``.

    Item ``i`` depends on ``(seed, split, i)`` alone; the patterns depend on ``seed``, so that what is learned from
    one split holds for the other.
    """

    def __init__(self, seed: int, split: str, length: int, image_size: int, num_classes: int) -> None:
        self.seed, self.split, self.length, self.image_size = seed, split, length, image_size
        self.patterns = torch.randn(num_classes, 3, 4, 4, generator=stream(seed, "synthetic patterns"))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} is not in 0..{self.length - 1}")
        label = index % len(self.patterns)
        size = (self.image_size, self.image_size)
        pattern = functional.interpolate(self.patterns[label, None], size, mode="bilinear")[0]
        noise = torch.randn(3, *size, generator=stream(self.seed, "synthetic", self.split, index))
        return pattern + noise, label


def _synthetic(seed: int, image_size: int, num_classes: int, length: int) -> Datasets:
    return Datasets(
        train=_Synthetic(seed, "train", length, image_size, num_classes),
        test=_Synthetic(seed, "test", max(1, length // 4), image_size, num_classes),
        preparation=Preparation(
            tuple(map(str, range(num_classes))), image_size, image_size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        ),
    )


def _cifar(name: str, dataset: type[CIFAR10], data_dir: Path, statistics: Statistics) -> Datasets:
    def load(*, download: bool) -> Datasets:
        train, test = dataset(data_dir, train=True, download=download), dataset(data_dir, train=False)
        preparation = _small_images(train.classes, 32, statistics)
        train.transform, test.transform = _small_image_augmentation(preparation), preparation.transform()
        return Datasets(train, test, preparation)

    try:
        return load(download=False)
    except RuntimeError:  # torchvision's word for files that are missing or damaged
        pass
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        # One process of a node downloads; the others wait, and then find the files.
        with open(data_dir / f".{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return load(download=True)
    except (OSError, HTTPException, RuntimeError) as error:
        note = f", where it cannot be read or downloaded ({' '.join(str(error).split())})"
        hint = (
            f"put {dataset.filename}, from {dataset.url}, or the folder {dataset.base_folder} unpacked from it, there"
        )
        raise must_be("--data-dir", f"a folder of {name}, or one for it", str(data_dir), hint, note=note) from error


class _Folders(Dataset[Sample]):
    """Image files, read by ``loader`` when they are asked for."""

    def __init__(self, images: Images, loader: Callable[[str], Image.Image], transform: Transform) -> None:
        self.classes, self.samples = images.classes, images.samples
        self.loader, self.transform = loader, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        path, label = self.samples[index]
        return self.transform(self.loader(path)), label


def _image_folders(name: str, data_dir: Path, image_size: int | None, val_split: str | None) -> Datasets:
    with refusing_unreadable(name, data_dir):
        folders = split_folders(name, data_dir, val_split)
        classes = class_folders(folders[0])  # the test folder has the same
        train, test = (find_images(folder, classes) for folder in folders)
    if image_size is None:
        shorter_side = min(read_image(train.samples[0][0]).size)
        image_size = shorter_side if name == "imagefolder" and shorter_side <= _LARGEST_SMALL_IMAGE else 224
    small = name == "imagefolder" and image_size <= _LARGEST_SMALL_IMAGE
    preparation = (_small_images if small else _large_images)(classes, image_size, _IMAGENET_STATISTICS)
    augmentation = (_small_image_augmentation if small else _large_image_augmentation)(preparation)
    train_set, test_set = (
        _Folders(images, _KeptImages(image_size) if small else read_image, transform)
        for images, transform in ((train, augmentation), (test, preparation.transform()))
    )
    notes = [_passed_over(folder, images) for folder, images in zip(folders, (train, test), strict=True)]
    if name == "imagefolder" and val_split is None and all((data_dir / other).is_dir() for other in ("test", "val")):
        notes.append(f"Testing on {folders[1]}; --val-split NAME takes another folder")
    fingerprint = hashlib.sha256("\0".join([train.digest, test.digest, *classes]).encode(errors="surrogateescape"))
    return Datasets(
        train_set, test_set, preparation, fingerprint.hexdigest()[:16], tuple(note for note in notes if note)
    )


def _passed_over(folder: Path, images: Images) -> str:
    counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(images.passed_over.items()))
    return f"Files in {folder} that are left out: {counts}" if counts else ""


class _KeptImages:
    """Reads images whose shorter side becomes ``size``, and keeps them for the next epoch, within a limit.

    Decoding a small image costs more than all that is done with it. Each data worker keeps what it has read itself.
    """

    def __init__(self, size: int) -> None:
        self.resize = transforms.Resize(size)
        self.kept: dict[str, Image.Image] = {}
        self.bytes_left = _KEPT_BYTES

    def __call__(self, path: str) -> Image.Image:
        image = self.kept.get(path)
        if image is None:
            image = self.resize(read_image(path))
            held = 4 * image.width * image.height + _IMAGE_OBJECT_BYTES  # Pillow stores RGB in four bytes
            if held <= self.bytes_left:
                self.bytes_left -= held
                self.kept[path] = image
        return image


def _small_images(classes: Sequence[str], size: int, statistics: Statistics) -> Preparation:
    """Images whose shorter side is not ``size`` are resized to it."""
    return Preparation(tuple(classes), size, size, *statistics)


def _small_image_augmentation(preparation: Preparation) -> Transform:
    """The paper's for CIFAR."""
    size = preparation.image_size
    steps = [
        transforms.Resize(size),
        transforms.RandomCrop(size, padding=size // 8),  # the paper's 4 pixels at size 32
        transforms.RandomHorizontalFlip(),
    ]
    made: Transform = transforms.Compose([*steps, *preparation.to_tensor()])
    return made


def _large_images(classes: Sequence[str], size: int, statistics: Statistics) -> Preparation:
    """The centre crop: 224 of a shorter side of 256, or in proportion."""
    return Preparation(tuple(classes), size, round(size * 256 / 224), *statistics)


def _large_image_augmentation(preparation: Preparation) -> Transform:
    """The paper's for ImageNet."""
    steps = [transforms.RandomResizedCrop(preparation.image_size), transforms.RandomHorizontalFlip()]
    made: Transform = transforms.Compose([*steps, *preparation.to_tensor()])
    return made
