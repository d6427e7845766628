"""What is done with a trained network: tested, asked about pictures, exported, without deepspeed and on one device."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.ranks import run_ranks
from tests.training.runs import metrics, tlgc_mp
from tlgc_mp.checkpoint import export_checkpoint, load_model
from tlgc_mp.cli.main import main
from tlgc_mp.data import load_datasets
from tlgc_mp.data.preparation import Preparation
from tlgc_mp.errors import UsageError

COLOURS = {"blue": (30, 40, 220), "green": (20, 200, 30), "red": (230, 30, 20)}
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
SEED = 3


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two tensor-parallel ranks, beside what was exported from it."""
    folder = tmp_path_factory.mktemp("digits")
    words = ("train", "--model", "wrn-10-1", "--dataset", "digits", "--epochs", "2", "--tp", "2", "--ema", "0.9")
    outcomes = run_ranks(2, tlgc_mp, *words, "--output-dir", str(folder / "run"))
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].stderr
    assert main(["export", str(folder / "run/checkpoints/best"), str(folder / "digits.safetensors")]) == 0
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy pictures of three colours, 12 x 16 pixels, and a run that learned them, in the folder beside them."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(SEED)
    for split, count in (("train", 16), ("test", 6)):
        for name, colour in COLOURS.items():
            (folder / "data" / split / name).mkdir(parents=True)
            for number in range(count):
                values = (np.array(colour) + generator.normal(0, 20, (12, 16, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(values).save(folder / "data" / split / name / f"{number}.png")
    words = ["train", "--model", "wrn-10-1", "--groups", "2", "--dataset", "imagefolder", "--epochs", "4"]
    words += ["--data-dir", str(folder / "data"), "--batch-size", "8", "--lr", "0.01", "--workers", "0"]
    (outcome,) = run_ranks(1, tlgc_mp, *words, "--output-dir", str(folder / "run"))
    assert outcome.status == 0, outcome.stderr
    assert main(["export", str(folder / "run"), str(folder / "colours.safetensors")]) == 0
    return folder


@pytest.mark.timeout(120)
def test_a_run_is_tested_on_its_own_data(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = metrics(digits / "run")[-1]
    assert main(["evaluate", str(digits / "run"), "--output", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["error_percent"] == pytest.approx(line["test_error_percent"], abs=1e-9)
    assert found["loss"] == pytest.approx(line["test_loss"], rel=1e-5)
    printed = dict(re.split(r"  +", text) for text in capsys.readouterr().out.splitlines())
    assert printed["top-1 error"] == f"{line['test_error_percent']:.2f} %"
    assert printed.keys() >= {"images", "loss", "top-5 error", *map(str, range(10))}


WITHOUT_DEEPSPEED = """
import sys
sys.modules["deepspeed"] = None  # importing it would raise
from tlgc_mp.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.timeout(120)
def test_an_exported_file_gives_the_same(digits: Path, tmp_path: Path) -> None:
    """`best` is exported by that name; against a calculation of its own."""
    path, output = digits / "digits.safetensors", tmp_path / "found.json"
    words = ["evaluate", str(path), "--dataset", "digits", "--output", str(output)]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DEEPSPEED, *words], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert found["error_percent"] == pytest.approx(min(m["test_error_percent"] for m in metrics(digits / "run")))
    test = load_datasets("digits", None, seed=0).test
    images, labels = zip(*(test[index] for index in range(len(test))), strict=True)
    truth = torch.tensor(labels)
    with torch.no_grad():
        logits = load_model(str(path))(torch.stack(images))
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits.double(), truth)), rel=1e-5)
    right = logits.argmax(1) == truth
    for digit in range(10):
        expected = 100 * float(right[truth == digit].double().mean())
        assert found["class_accuracy_percent"][str(digit)] == pytest.approx(expected)


def _prepared(path: Path) -> Tensor:
    """A picture of 12 x 16 pixels by hand: the middle 12 x 12 of it, normalized."""
    values = np.asarray(Image.open(path)).astype(np.float64)[:, 2:14] / 255
    return torch.from_numpy((values - MEAN) / STD).permute(2, 0, 1).float()


@pytest.mark.timeout(120)
def test_pictures_are_labelled(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [pictures / "data" / "test" / name / "0.png" for name in COLOURS]
    model = load_model(str(pictures / "colours.safetensors"))
    with torch.no_grad():
        shares = model(torch.stack([_prepared(path) for path in paths])).softmax(1)
    expected = []
    for path, row in zip(paths, shares, strict=True):
        order = row.argsort(descending=True).tolist()
        expected.append(f"{path}: " + ", ".join(f"{sorted(COLOURS)[n]} {100 * row[n]:.1f} %" for n in order))
    for network in ("colours.safetensors", "run"):
        assert main(["predict", str(pictures / network), *map(str, paths)]) == 0
        assert capsys.readouterr().out.splitlines() == expected
    assert [line.split(": ")[1].split()[0] for line in expected] == sorted(COLOURS)
    assert main(["predict", str(pictures / "run"), str(paths[0]), "--top", "1"]) == 0
    assert "," not in capsys.readouterr().out.partition(": ")[2]


@pytest.mark.timeout(120)
def test_a_file_says_how_its_images_are_prepared(pictures: Path) -> None:
    from safetensors import safe_open

    with safe_open(str(pictures / "colours.safetensors"), framework="pt") as file:
        told = json.loads(file.metadata()["tlgc_mp"])["images"]
    assert told["classes"] == sorted(COLOURS)
    assert (told["image_size"], told["resize"]) == (12, 12)
    assert (told["mean"], told["std"]) == (MEAN.tolist(), STD.tolist())


@pytest.mark.timeout(120)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_of_any_bytes_take_a_line_each(pictures: Path, tmp_path: Path, encoding: str) -> None:
    """The end of a line, bytes that are no text, and letters that the output cannot hold."""
    names = ["two\nlines.png", os.fsdecode(b"caf\xe9.png"), "\u732b.png"]
    for name in names:
        shutil.copy(pictures / "data/test/red/0.png", tmp_path / name)
    words = ["predict", str(pictures / "colours.safetensors"), *(str(tmp_path / name) for name in names)]
    done = subprocess.run(
        [sys.executable, "-m", "tlgc_mp", *words],
        **{"capture_output": True, "timeout": 100, "check": False, "cwd": Path(__file__).parents[1]},
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert done.returncode == 0, done.stderr
    shown = [r"two\nlines.png", r"caf\udce9.png", "\u732b.png" if encoding == "utf-8" else r"\u732b.png"]
    lines = done.stdout.decode(encoding).splitlines()
    assert [line.partition(": red ")[0] for line in lines] == [f"{tmp_path}/{name}" for name in shown]


@pytest.mark.parametrize(
    "change",
    [
        {"classes": ["a"]},
        {"classes": ["a", 2]},
        {"image_size": 0},
        {"resize": "12"},
        {"std": [0.1, 0.0, 0.1]},
        {"mean": [0.1]},
        {"mean": None},
    ],
)
def test_a_preparation_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    entry = Preparation(("a", "b"), 12, 12, (0.5,) * 3, (0.2,) * 3).entry()
    assert Preparation.from_entry(json.loads(json.dumps(entry)), 2).entry() == entry
    with pytest.raises(UsageError, match="it does not say how images are prepared for it"):
        Preparation.from_entry({**entry, **change}, 2)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evaluate", "FILE"], "--dataset must be given for an exported file, got none; use one of digits, "),
        (["evaluate", "FILE", "--dataset", "digits"], "--dataset must have the 3 classes of the network, got digits"),
        (
            ["evaluate", "nowhere", "--dataset", "digits"],
            "checkpoint must be one, or a folder that holds one, got 'nowhere'",
        ),
        (["evaluate", "FILE", "--dataset", "imagefolder"], "--data-dir must be given with --dataset imagefolder"),
        (["evaluate", "RUN", "--output", "/nowhere/x.json"], "--output must be a file to write, got '/nowhere/x.json'"),
        (["predict", "FILE", "nowhere.png"], "IMAGE must be a file, got 'nowhere.png'"),
        (["predict", "FILE", "FILE"], "every image must be one that can be read, got "),
        (["predict", "FILE", "FILE", "--top", "0"], "--top must be 1 or more, got 0"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    pictures: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"FILE": str(pictures / "colours.safetensors"), "RUN": str(pictures / "run")}
    assert main([places.get(word, word) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tlgc-mp: error: {said}"), line


def _save_own(folder: str) -> dict[str, Tensor]:
    from tlgc_mp import initialize, save_checkpoint
    from tlgc_mp.parallel.sharding import gather_state_dict

    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    engine, _, _, _ = initialize(
        model=model,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        config={"train_batch_size": 4, "tensor_parallel": {"autotp_size": 2}},
    )
    engine.backward(engine(torch.randn(4, 3, 8, 8)).square().mean())
    engine.step()
    save_checkpoint(engine, folder, client_state={"epoch": 1})
    return gather_state_dict(engine.module)


@pytest.mark.timeout(120)
def test_checkpoints_of_other_code_are_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = run_ranks(2, _save_own, str(tmp_path / "saved"))[0]
    output = str(tmp_path / "own.safetensors")
    assert main(["export", str(tmp_path / "saved"), output]) == 0
    assert f"Wrote the weights to {output}; the model is your own code's" in capsys.readouterr().out
    state = load_file(output)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    with pytest.raises(UsageError, match="does not say which model it holds"):
        load_model(output)
    assert export_checkpoint(str(tmp_path / "saved/latest"), output) is None
