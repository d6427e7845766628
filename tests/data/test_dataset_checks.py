"""Each data set that cannot be loaded is refused at once, by the argument that is wrong."""

import os
import re
from pathlib import Path

import pytest

from tlgc_mp.data import DATASETS, check_dataset
from tlgc_mp.data.catalog import split_folders
from tlgc_mp.errors import UsageError

GOOD = {"train/cat": 1, "train/dog": 1, "test/cat": 1, "test/dog": 1}


def refusal(name: str, data_dir: Path | None) -> str:
    with pytest.raises(UsageError) as caught:
        check_dataset(name, None if data_dir is None else str(data_dir))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_unknown_name_lists_the_names() -> None:
    message = refusal("mnist", None)
    assert message.startswith("--dataset must be one of")
    assert all(name in message for name in DATASETS)


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_sets_without_files_need_no_folder(name: str) -> None:
    check_dataset(name, None)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "imagenet", "imagefolder"])
def test_missing_folder_argument(name: str) -> None:
    assert re.match(rf"--data-dir must be given with --dataset {name}, got none; use ", refusal(name, None))


@pytest.mark.parametrize("name", ["imagenet", "imagefolder"])
def test_folder_that_is_not_there(name: str, tmp_path: Path) -> None:
    assert f"must be a folder, got '{tmp_path / 'absent'}', which does not exist; use" in refusal(
        name, tmp_path / "absent"
    )
    (tmp_path / "file").touch()
    assert f"must be a folder, got '{tmp_path / 'file'}', which is a file; use" in refusal(name, tmp_path / "file")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_folder_may_still_have_to_be_made(name: str, tmp_path: Path) -> None:
    check_dataset(name, str(tmp_path))
    check_dataset(name, str(tmp_path / "absent" / "deep"))
    assert not (tmp_path / "absent").exists()


def test_cifar_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    assert f"where {tmp_path / 'file'} is a file" in refusal("cifar10", tmp_path / "file")
    assert f"where {tmp_path / 'file'} is a file" in refusal("cifar10", tmp_path / "file" / "below")

    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert f"or can be written to, got '{tmp_path / 'absent'}', where {tmp_path} cannot; use" in refusal(
        "cifar10", tmp_path / "absent"
    )
    (tmp_path / "cifar-10-batches-py").mkdir()
    check_dataset("cifar10", str(tmp_path))


@pytest.mark.parametrize("test_split", ["test", "val"])
def test_good_image_folders(test_split: str, make_folders) -> None:
    root = make_folders({"train/cat": 2, "train/dog/puppies": 1, f"{test_split}/cat": 1, f"{test_split}/dog": 1})
    (root / "train" / "cat" / ".hidden").touch()
    check_dataset("imagefolder", str(root))
    assert split_folders("imagefolder", root) == (root / "train", root / test_split)


def test_test_is_preferred_to_val(make_folders) -> None:
    root = make_folders({**GOOD, "val/cat": 1})
    check_dataset("imagefolder", str(root))
    assert split_folders("imagefolder", root)[1] == root / "test"


def test_missing_split(make_folders) -> None:
    root = make_folders({"train/cat": 1})
    assert "that holds test/ or val/, got" in refusal("imagefolder", root)
    assert "that holds val/, got" in refusal("imagenet", root)


def test_missing_train(make_folders) -> None:
    assert "that holds train/, got" in refusal("imagefolder", make_folders({"test/cat": 1}))


def test_split_without_class_folders(make_folders) -> None:
    root = make_folders({"train": 3, "test/cat": 1})
    assert f"{root / 'train'} holds no class folders" in refusal("imagefolder", root)


def test_class_folder_without_an_image(make_folders) -> None:
    root = make_folders({**GOOD, "test/dog": 0})
    (root / "test" / "dog" / "notes.txt").touch()
    assert f"{root / 'test' / 'dog'} holds no image" in refusal("imagefolder", root)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("train/eel", "class eel is in train/ but not in test/"),
        ("test/eel", "class eel is in test/ but not in train/"),
    ],
)
def test_splits_with_different_classes(extra: str, message: str, make_folders) -> None:
    assert message in refusal("imagefolder", make_folders({**GOOD, extra: 1}))


def test_a_single_class_is_none(make_folders) -> None:
    """As where the class folders lie one level deeper: any network would be right in all of them."""
    root = make_folders({"train/images/cat": 1, "train/images/dog": 1, "test/images/cat": 1, "test/images/dog": 1})
    said = f"--data-dir must be a folder of two classes or more, got '{root}', where train/ holds images alone; put"
    assert refusal("imagefolder", root).startswith(said)


def test_imagenet_has_a_thousand_classes(make_folders) -> None:
    root = make_folders({"train/n01": 1, "train/n02": 1, "val/n01": 1, "val/n02": 1})
    assert f"a folder of 1000 classes for ImageNet, got '{root}', which holds 2; complete" in refusal("imagenet", root)


def test_folder_without_permission(make_folders, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folders(GOOD)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    assert f"got '{root}', where {root / 'train'} is not; change its permissions" in refusal("imagefolder", root)
