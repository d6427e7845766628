"""Image folders as systems and tools leave them: what is data, what is left out, and what is named and refused."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.conftest import MakeFolders
from tests.ranks import run_ranks
from tests.training.runs import metrics, train
from tlgc_mp.data import load_datasets
from tlgc_mp.data.datasets import Datasets
from tlgc_mp.errors import UsageError

GOOD = {"train/cat": 2, "train/dog": 2, "test/cat": 1, "test/dog": 1}


def _load(root: Path, **arguments: str) -> Datasets:
    return load_datasets("imagefolder", str(root), seed=0, **arguments)  # type: ignore[arg-type]


def _paths(datasets: Datasets, root: Path) -> list[str]:
    return [os.path.relpath(path, root) for path, _ in datasets.train.samples]  # type: ignore[attr-defined]


def _refusal(root: Path, **arguments: str) -> str:
    with pytest.raises(UsageError) as refused:
        _load(root, **arguments)
    message = str(refused.value)
    assert message.startswith("--data-dir must be a folder ") and message.count("--data-dir") == 1
    return message.replace(str(root), "ROOT")


@pytest.mark.parametrize("suffix", ["jfif", "JPE", "avif", "jp2", "gif", "tga", "pbm"])
def test_suffixes_that_are_read(suffix: str, make_folders: MakeFolders) -> None:
    from PIL import Image

    root = make_folders(GOOD)
    kinds = {"jfif": "JPEG", "JPE": "JPEG", "jp2": "JPEG2000", "pbm": "PPM"}
    with Image.open(root / "train/dog/0.png") as image:
        image.save(root / f"train/dog/9.{suffix}", kinds.get(suffix, suffix.upper()))
    datasets = _load(root)
    assert _paths(datasets, root)[-1] == f"train/dog/9.{suffix}" and len(datasets.train) == 5
    assert datasets.train[4][0].shape == (3, 16, 16) and datasets.train[4][1] == 1


@pytest.mark.parametrize("suffix", ["heic", "svg", "DNG", "npy"])
def test_suffixes_that_are_named(suffix: str, make_folders: MakeFolders) -> None:
    root = make_folders(GOOD)
    for number in (1, 2):
        (root / f"train/dog/{number}.{suffix}").write_bytes(b"x")
    assert f"2 files are in a format that is not read, ROOT/train/dog/1.{suffix} first" in _refusal(root)


def _notebook(root: Path) -> None:
    for folder in ("train/cat/.ipynb_checkpoints", "train/.ipynb_checkpoints", "train/__MACOSX", "test/dog/@eaDir"):
        (root / folder).mkdir()
        shutil.copy(root / "train/cat/0.png", root / folder / "0-checkpoint.png")


def _links(root: Path) -> None:
    (root / "train/cat/again").symlink_to(root / "train/cat")
    (root / "train/cat/up").symlink_to(root / "train")
    (root / "train/cat/further").symlink_to("..")
    (root / "train/all").symlink_to(root)
    (root / "train/cat/itself").symlink_to("itself")


def _hidden(root: Path) -> None:
    (root / "train/cat/.DS_Store").write_bytes(b"x")
    (root / "train/cat/._.DS_Store").write_bytes(b"x")
    (root / "train/cat/.0.png").write_bytes(b"")


@pytest.mark.parametrize("change", [_notebook, _links, _hidden])
def test_what_is_no_data(change: Callable[[Path], None], make_folders: MakeFolders) -> None:
    root = make_folders(GOOD)
    change(root)
    datasets = _load(root)
    assert _paths(datasets, root) == ["train/cat/0.png", "train/cat/1.png", "train/dog/0.png", "train/dog/1.png"]
    assert (len(datasets.test), datasets.num_classes) == (2, 2)


def test_links_to_images_are_data(make_folders: MakeFolders, tmp_path: Path) -> None:
    root = make_folders({**GOOD, "elsewhere/deep": 3})
    (root / "train/cat/more").symlink_to(root / "elsewhere")
    (root / "train/cat/more too").symlink_to(root / "elsewhere/deep")
    (root / "train/dog/2.png").symlink_to(root / "elsewhere/deep/0.png")
    datasets = _load(root)
    assert [label for _, label in datasets.train.samples] == [0] * 5 + [1] * 3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("file", "made", "said"),
    [
        ("0.png", lambda path: path.write_bytes(b""), "1 file is empty, ROOT/train/cat/0.png first; replace or remove"),
        (
            "._0.png",
            lambda path: path.write_bytes(b"\0\5\x16\7"),
            "(AppleDouble), ROOT/train/cat/._0.png first; remove every file named ._*",
        ),
        ("8.png", lambda path: path.symlink_to("nowhere"), "1 file is a link to nothing, or cannot be looked at"),
        ("8.png", lambda path: os.mkfifo(path), "1 file is no plain file, ROOT/train/cat/8.png first; remove"),
    ],
)
def test_files_that_are_named_before_training(
    file: str, made: Callable[[Path], None], said: str, make_folders: MakeFolders
) -> None:
    root = make_folders(GOOD)
    made(root / "train/cat" / file)
    assert said in _refusal(root)


def test_a_class_of_hidden_images_is_empty(make_folders: MakeFolders) -> None:
    root = make_folders(GOOD)
    for number in range(2):
        (root / f"train/cat/{number}.png").rename(root / f"train/cat/.{number}.png")
    assert "got 'ROOT', where ROOT/train/cat holds no image" in _refusal(root)


def test_what_is_left_out_is_said(make_folders: MakeFolders) -> None:
    root = make_folders({**GOOD, "train": 1})
    for name in ("a.txt", "b.txt", "labels.csv", "README"):
        (root / "train/cat" / name).touch()
    said = "Files in ROOT/train that are left out: 1 .csv, 2 .txt, 1 outside the class folders, 1 without a suffix"
    assert [note.replace(str(root), "ROOT") for note in _load(root).notes] == [said]


# Which folder is tested on

TWO = {**GOOD, "val/cat": 3, "val/dog": 3}
UNLABELLED = {"train/cat": 2, "train/dog": 2, "val/cat": 1, "val/dog": 1}


@pytest.mark.parametrize(
    ("folders", "asked", "tested"),
    [
        (TWO, None, "test"),
        (TWO, "val", "val"),
        ({**UNLABELLED, "test": 3}, None, "val"),
        ({**UNLABELLED, "test/unknown": 3}, None, "val"),
        ({"train/cat": 2, "train/dog": 2, "valid/cat": 1, "valid/dog": 1, "test": 3}, "valid", "valid"),
    ],
)
def test_the_folder_to_test_on(
    folders: dict[str, int], asked: str | None, tested: str, make_folders: MakeFolders
) -> None:
    root = make_folders(folders)
    datasets = _load(root) if asked is None else _load(root, val_split=asked)
    paths = [os.path.relpath(path, root) for path, _ in datasets.test.samples]  # type: ignore[attr-defined]
    assert {path.partition("/")[0] for path in paths} == {tested}
    said = [note for note in datasets.notes if note.startswith("Testing on ")]
    assert said == ([f"Testing on {root / tested}; --val-split NAME takes another folder"] if asked is None else [])


def test_a_class_that_one_folder_lacks_is_said_once(make_folders: MakeFolders) -> None:
    root = make_folders(TWO)
    shutil.rmtree(root / "test/dog")
    assert "got 'ROOT', where class dog is in train/ but not in test/; give both the same" in _refusal(root)
    assert _load(root, val_split="val").num_classes == 2
    assert "must be a folder that holds valid/, got 'ROOT'; use" in _refusal(root, val_split="valid")
    assert "that holds /, got" in _refusal(root, val_split="")
    with pytest.raises(UsageError, match="--val-split must be left out with --dataset synthetic"):
        load_datasets("synthetic", None, seed=0, val_split="val")


@pytest.mark.timeout(240)
def test_through_the_command_line(make_folders: MakeFolders) -> None:
    root = make_folders({"train/cat": 4, "train/dog": 4, "test": 2, "valid/cat": 1, "valid/dog": 2})
    (root / "train/cat/notes.txt").touch()
    flags = ("--dataset", "imagefolder", "--data-dir", str(root), "--image-size", "16", "--batch-size", "8")
    flags += ("--workers", "0", "--epochs", "1")
    run = str(root / "run")
    refused = run_ranks(1, train, run, *flags)[0]
    assert refused.status == 2 and f"{root / 'test'} holds no class folders" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    done = run_ranks(1, train, run, *flags, "--val-split", "valid")[0]
    assert done.status == 0 and f"Files in {root / 'train'} that are left out: 1 .txt\n" in done.stdout, done.stderr
    errors = metrics(root / "run")[-1]["test_error_percent"]
    assert 3 * errors / 100 == pytest.approx(round(3 * errors / 100), abs=1e-6)  # three images in valid/
    resumed = run_ranks(1, train, run, *flags, "--val-split", "train", "--resume")[0]
    assert resumed.status == 2 and "--resume must be of a run with val_split='train', got 'valid' in" in resumed.stderr
