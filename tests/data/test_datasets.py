"""What each data set holds, and how its images are augmented."""

import pickle
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

from tlgc_mp.data import load_datasets
from tlgc_mp.errors import UsageError

CIFAR10_MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
CIFAR10_STD = torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1)
CLASSES = {"train/cat": 2, "train/dog": 1, "test/cat": 1, "test/dog": 1}


def crops(image: Tensor, padding: int) -> list[Tensor]:
    """All windows of the image's size in the image padded with zeros."""
    size = image.shape[-1]
    padded = functional.pad(image, [padding] * 4)
    return [
        padded[:, top : top + size, left : left + size]
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
    ]


def matches(image: Tensor, candidates: list[Tensor]) -> list[int]:
    return [i for i, candidate in enumerate(candidates) if torch.allclose(image, candidate, atol=1e-5)]


def pixels_of(path: Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255


# Digits


def sixteenths(image: Tensor) -> tuple[float, ...]:
    """The gray values 0..16 that a normalized digit was made from."""
    return tuple(((image[0] * 0.3760 + 0.3053) * 16).round().flatten().tolist())


def test_digits_are_split_once_and_for_all() -> None:
    first, second = (load_datasets("digits", None, seed=seed) for seed in (0, 1))
    assert (len(first.train), len(first.test), first.num_classes, first.image_size) == (1437, 360, 10, 8)
    for index in range(360):
        assert torch.equal(first.test[index][0], second.test[index][0])
        assert first.test[index][1] == second.test[index][1]
    # Stratified: each digit has its share, 20 percent, of the test set.
    share = np.bincount([first.test[i][1] for i in range(360)]) / np.bincount(load_digits().target)
    assert np.abs(share - 0.2).max() < 0.005


def test_digits_are_normalized_gray_images_of_the_original() -> None:
    datasets = load_datasets("digits", None, seed=0)
    original = load_digits()
    known = {(tuple(row), label) for row, label in zip(original.data, original.target, strict=True)}
    everything = []
    for index in range(360):
        image, label = datasets.test[index]
        assert image.shape == (3, 8, 8) and image.dtype == torch.float32 and type(label) is int
        assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
        assert (sixteenths(image), label) in known
        everything.append(image)
    assert abs(torch.stack(everything).mean()) < 0.05 and abs(torch.stack(everything).std() - 1) < 0.05


def test_digits_are_shifted_in_training_only() -> None:
    datasets = load_datasets("digits", None, seed=0)
    torch.manual_seed(0)
    assert all(torch.equal(datasets.test[3][0], datasets.test[3][0]) for _ in range(20))
    drawn = {sixteenths(datasets.train[5][0]) for _ in range(200)}
    originals = torch.from_numpy(load_digits().images)
    assert any(drawn == {tuple(crop.flatten().tolist()) for crop in crops(image[None], 1)} for image in originals)


# CIFAR


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The official layout with 3 training and 2 test images, whose checksums are not looked at."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    values = np.random.default_rng(0)
    for name, labels in (("data_batch_1", [3, 1, 4]), ("test_batch", [1, 5])):
        data = values.integers(0, 256, (len(labels), 3 * 32 * 32), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": labels}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    cls = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cls, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(cls, "test_list", [["test_batch", None]])
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": None})
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", _no_network)
    return tmp_path


def _no_network(*args: object, **kwargs: object) -> None:
    raise URLError("no network\nhere")


def test_cifar10_test_images_are_normalized_and_nothing_else(cifar10: Path) -> None:
    datasets = load_datasets("cifar10", str(cifar10), seed=0)
    assert (len(datasets.train), len(datasets.test), datasets.num_classes, datasets.image_size) == (3, 2, 10, 32)
    raw = pickle.loads((cifar10 / "cifar-10-batches-py" / "test_batch").read_bytes())["data"]
    expected = (torch.from_numpy(raw).view(2, 3, 32, 32) / 255 - CIFAR10_MEAN) / CIFAR10_STD
    for index, label in enumerate([1, 5]):
        image, drawn_label = datasets.test[index]
        torch.testing.assert_close(image, expected[index])
        assert drawn_label == label


def test_cifar10_training_images_are_padded_by_4_cropped_and_flipped(cifar10: Path) -> None:
    datasets = load_datasets("cifar10", str(cifar10), seed=0)
    raw = pickle.loads((cifar10 / "cifar-10-batches-py" / "data_batch_1").read_bytes())["data"]
    windows = crops(torch.from_numpy(raw[0]).view(3, 32, 32) / 255, 4)
    candidates = [(w - CIFAR10_MEAN) / CIFAR10_STD for w in windows + [w.flip(-1) for w in windows]]
    torch.manual_seed(0)
    drawn = [matches(datasets.train[0][0], candidates) for _ in range(60)]
    assert all(len(found) == 1 for found in drawn)
    assert {found[0] >= 81 for found in drawn} == {False, True}
    rows = {found[0] % 81 // 9 for found in drawn}
    columns = {found[0] % 9 for found in drawn}
    assert rows == columns == set(range(9))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_failed_download_says_what_to_put_where(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", _no_network)
    with pytest.raises(UsageError) as caught:
        load_datasets(name, str(tmp_path / "new"), seed=0)
    message = str(caught.value)
    assert "\n" not in message and "no network here" in message
    archive, folder = {
        "cifar10": ("cifar-10-python.tar.gz", "cifar-10-batches-py"),
        "cifar100": ("cifar-100-python.tar.gz", "cifar-100-python"),
    }[name]
    assert (
        f"for it, got '{tmp_path / 'new'}', where it cannot be" in message and archive in message and folder in message
    )


def test_files_already_there_are_not_downloaded(cifar10: Path) -> None:
    load_datasets("cifar10", str(cifar10), seed=0)  # a download would raise
    assert [path.name for path in cifar10.iterdir()] == ["cifar-10-batches-py"]


# Image folders


def test_small_images_keep_their_size_and_get_the_cifar_augmentation(make_folders) -> None:
    root = make_folders(CLASSES, size=(16, 16))
    datasets = load_datasets("imagefolder", str(root), seed=0)
    assert (len(datasets.train), len(datasets.test), datasets.num_classes, datasets.image_size) == (3, 2, 2, 16)
    assert [datasets.train[i][1] for i in range(3)] == [0, 0, 1]

    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(datasets.test[0][0], (pixels_of(root / "test" / "cat" / "0.png") - mean) / std)

    windows = crops(pixels_of(root / "train" / "cat" / "0.png"), 2)
    candidates = [(w - mean) / std for w in windows + [w.flip(-1) for w in windows]]
    torch.manual_seed(0)
    drawn = [matches(datasets.train[0][0], candidates) for _ in range(40)]
    assert all(len(found) == 1 for found in drawn) and len({found[0] for found in drawn}) > 10


@pytest.mark.parametrize(
    ("shape", "asked", "side"),
    [((70, 40), None, 40), ((64, 64), None, 64), ((90, 65), None, 224), ((16, 16), 32, 32), ((16, 16), 96, 96)],
)
def test_image_size(shape: tuple[int, int], asked: int | None, side: int, make_folders) -> None:
    datasets = load_datasets("imagefolder", str(make_folders(CLASSES, size=shape)), seed=0, image_size=asked)
    assert datasets.image_size == side
    assert datasets.train[0][0].shape == datasets.test[0][0].shape == (3, side, side)


def test_small_images_are_read_once_within_a_limit(make_folders, monkeypatch: pytest.MonkeyPatch) -> None:
    held = 4 * 20 * 30 + 1024  # resized to 20 x 30, four bytes a pixel, and what an image object takes
    monkeypatch.setattr("tlgc_mp.data.datasets._KEPT_BYTES", 2 * held)
    root = make_folders({"train/cat": 3, "train/dog": 1, "test/cat": 2, "test/dog": 1}, size=(40, 60))
    datasets = load_datasets("imagefolder", str(root), seed=0, image_size=20)
    before = [datasets.test[i][0] for i in range(2)]
    for i in range(3):
        datasets.train[i]
    for path in root.rglob("*.png"):
        path.unlink()
    assert all(torch.equal(datasets.test[i][0], before[i]) for i in range(2))
    assert datasets.train[0][0].shape == datasets.train[1][0].shape == (3, 20, 20)
    with pytest.raises(UsageError, match=r"2\.png"):  # past the limit: read each time
        datasets.train[2]


def test_imagenet_is_always_cropped_to_224(make_folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlgc_mp.data.catalog._IMAGENET_CLASSES", 2)
    root = make_folders({"train/n01": 1, "train/n02": 1, "val/n01": 1, "val/n02": 1})
    datasets = load_datasets("imagenet", str(root), seed=0)
    assert (datasets.num_classes, datasets.image_size) == (2, 224)
    assert datasets.train[0][0].shape == datasets.test[0][0].shape == (3, 224, 224)
    assert torch.equal(datasets.test[0][0], datasets.test[0][0])
    assert not torch.equal(datasets.train[0][0], datasets.train[0][0])


@pytest.mark.parametrize("damage", [b"not an image", None])
def test_damaged_image_is_named(damage: bytes | None, make_folders) -> None:
    root = make_folders(CLASSES)
    path = root / "train" / "cat" / "1.png"
    path.write_bytes(path.read_bytes()[:200] if damage is None else damage)
    datasets = load_datasets("imagefolder", str(root), seed=0)
    with pytest.raises(UsageError) as caught:
        datasets.train[1]
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


# Synthetic


def test_synthetic_items_follow_from_the_seed_the_split_and_the_index() -> None:
    first, again, other = (load_datasets("synthetic", None, seed=seed) for seed in (0, 0, 1))
    assert (len(first.train), len(first.test), first.num_classes, first.image_size) == (1024, 256, 10, 32)
    image, label = first.train[7]
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32 and label == 7
    state = torch.get_rng_state()
    assert torch.equal(image, again.train[7][0]) and torch.equal(image, first.train[7][0])
    assert torch.equal(state, torch.get_rng_state())
    for different in (other.train[7][0], first.test[7][0], first.train[17][0]):
        assert not torch.allclose(image, different)


def test_synthetic_classes_can_be_learned_from_one_split_for_the_other() -> None:
    datasets = load_datasets("synthetic", None, seed=0, image_size=16, num_classes=4, synthetic_length=400)
    assert (len(datasets.train), len(datasets.test), datasets.num_classes) == (400, 100, 4)
    images = torch.stack([datasets.train[i][0] for i in range(400)])
    labels = torch.tensor([datasets.train[i][1] for i in range(400)])
    means = torch.stack([images[labels == k].mean(0) for k in range(4)]).flatten(1)
    test_images = torch.stack([datasets.test[i][0] for i in range(100)]).flatten(1)
    test_labels = torch.tensor([datasets.test[i][1] for i in range(100)])
    assert (torch.cdist(test_images, means).argmin(1) == test_labels).float().mean() > 0.95


# Arguments


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("image_size", 16, "image_size must be 8 with --dataset digits, or left out, got 16"),
        ("num_classes", 100, "num_classes must be 10 with --dataset digits, or left out, got 100"),
        ("image_size", 0, "image_size must be 1 or more, got 0"),
        ("num_classes", -1, "num_classes must be 1 or more, got -1"),
        ("synthetic_length", 0, "synthetic_length must be 1 or more, got 0"),
    ],
)
def test_argument_that_does_not_fit(argument: str, value: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_datasets("digits", None, seed=0, **{argument: value})


def test_loading_checks_the_data_set_first() -> None:
    with pytest.raises(
        UsageError,
        match="--dataset must be one of digits, cifar10, cifar100, imagenet, imagefolder, synthetic, got 'mnist'",
    ):
        load_datasets("mnist", None, seed=0)
