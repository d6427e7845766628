"""Which folder of images a run was trained on: two of them are two data sets, and one that was moved is the same."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.bench.test_training_report import row
from tests.ranks import run_ranks
from tests.training.runs import metrics, tlgc_mp
from tlgc_mp.cli.main import _parser, main
from tlgc_mp.cli.options import parse
from tlgc_mp.data import load_datasets
from tlgc_mp.training.settings import output_folder

WORDS = ["--model", "wrn-10-1", "--groups", "2", "--dataset", "imagefolder", "--batch-size", "4", "--workers", "0"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    generator = np.random.default_rng(1)
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(4):
                values = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(values).save(tmp_path / "images" / split / name / f"{number}.bmp")
    return tmp_path / "images"


def _fingerprint(images: Path) -> str | None:
    return load_datasets("imagefolder", str(images), seed=0).fingerprint


def _rename(images: Path) -> None:
    (images / "train/a/0.bmp").rename(images / "train/a/9.bmp")


def _rename_class(images: Path) -> None:
    for split in ("train", "test"):
        (images / split / "b").rename(images / split / "c")


def _grow(images: Path) -> None:
    with open(images / "test/b/3.bmp", "ab") as file:
        file.write(b"\0")


def _move_to_other_class(images: Path) -> None:
    (images / "train/a/0.bmp").rename(images / "train/b/9.bmp")


@pytest.mark.parametrize("change", [_rename, _rename_class, _grow, _move_to_other_class])
def test_files_classes_and_sizes_tell_folders_apart(images: Path, change: Callable[[Path], None]) -> None:
    before = _fingerprint(images)
    assert before is not None
    shutil.copytree(images, images.parent / "copy")
    assert _fingerprint(images.parent / "copy") == before
    change(images)
    assert _fingerprint(images) != before


@pytest.mark.timeout(240)
def test_a_run_goes_on_with_its_own_images_only(images: Path, tmp_path: Path) -> None:
    words = ["train", *WORDS, "--epochs", "1", "--output-dir", str(tmp_path / "run"), "--data-dir"]
    (outcome,) = run_ranks(1, tlgc_mp, *words, str(images))
    assert outcome.status == 0, outcome.stderr
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["data_dir"], result["data_fingerprint"]) == (str(images), _fingerprint(images))
    again = ("train", "--resume", "--output-dir", str(tmp_path / "run"), "--epochs", "2")
    moved = images.rename(images.parent / "moved")
    shutil.copytree(moved, images)
    _rename(images)
    (refused,) = run_ranks(1, tlgc_mp, *again)
    assert refused.status == 2
    assert f"--data-dir must hold the images that the run was trained on, {str(images)!r}, got " in refused.stderr
    (outcome,) = run_ranks(1, tlgc_mp, *again, "--data-dir", str(moved))
    assert outcome.status == 0, outcome.stderr
    assert len(metrics(tmp_path / "run")) == 2


def test_each_folder_has_an_output_folder(tmp_path: Path) -> None:
    folders = []
    for place in ("one/cats", "two/cats", "one/dogs"):
        (tmp_path / place).mkdir(parents=True)
        options = parse(_parser(), ["train", *WORDS, "--data-dir", str(tmp_path / place)], 1)
        folders.append(output_folder(options))
    assert len(set(folders)) == 3
    assert [folder.rpartition("-")[0] for folder in folders] == [
        f"runs/wrn-10-1-gc-2l-2-imagefolder-{name}" for name in ("cats", "cats", "dogs")
    ]


def test_a_folder_of_any_bytes_has_an_output_folder_that_is_text(tmp_path: Path) -> None:
    place = tmp_path / os.fsdecode(b"caf\xe9\n")
    place.mkdir()
    folder = output_folder(parse(_parser(), ["train", *WORDS, "--data-dir", str(place)], 1))
    assert folder.rpartition("-")[0] == r"runs/wrn-10-1-gc-2l-2-imagefolder-caf\udce9\n"


def test_runs_on_two_folders_are_not_seeds_of_one(tmp_path: Path) -> None:
    rows = [
        row("sc", 1, seed, error, dataset="imagefolder", data_dir=f"/data/{name}", data_fingerprint=name)
        for seed, (error, name) in enumerate([(4.0, "cats"), (2.0, "dogs"), (6.0, "cats")])
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    assert main(["report", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "report")]) == 0
    sections = (tmp_path / "report/report.md").read_text().split("## ")[1:]
    assert [section.splitlines()[0] for section in sections if "imagefolder" in section.splitlines()[0]] == [
        "wrn-28-10 on imagefolder (/data/cats, cats)",
        "wrn-28-10 on imagefolder (/data/dogs, dogs)",
    ]
    assert "5.00" in sections[0] and "2.00" in sections[1]
