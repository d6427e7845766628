"""The examples in docs that train, stop, go on and use what came of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

DOCS = Path(__file__).parents[2] / "docs"
SCRIPT = DOCS / "examples/cifar10.sh"
CLASSES = ("airplane", "automobile", "bird")


@pytest.mark.timeout(600)
def test_the_script_in_docs(tmp_path: Path) -> None:
    """On pictures of 32 x 32 pixels, of which each class has a colour."""
    generator = np.random.default_rng(2)
    for split, count in (("train", 20), ("test", 4)):
        for number, name in enumerate(CLASSES):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for index in range(count):
                values = generator.normal(90, 30, (32, 32, 3))
                values[..., number] += 80
                picture = Image.fromarray(values.clip(0, 255).astype(np.uint8))
                picture.save(tmp_path / "data" / split / name / f"{index:04d}.jpg")
    flags = ["--model", "wrn-10-1", "--epochs", "4", "--batch-size", "6", "--workers", "0", "--log-interval", "5"]
    environment = {
        **os.environ,
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [str(SCRIPT), str(tmp_path / "data"), str(tmp_path / "run"), *flags],
        capture_output=True, text=True, timeout=580, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"stopped by SIGTERM; --resume goes on from .*/epoch-\d", done.stderr), done.stderr
    assert "Resuming in epoch " in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if "loss" not in line]
    assert [line["epoch"] for line in epochs] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "loss" in line] == list(range(5, 41, 5))
    assert f"top-1 error  {epochs[-1]['test_error_percent']:.2f} %" in re.sub("  +", "  ", done.stdout)
    labels = re.findall(r"/test/(\w+)/0001\.jpg: (\w+) (\d+\.\d) %, ", done.stdout)
    assert [true for true, _, _ in labels] == list(CLASSES)
    assert all(seen in CLASSES and float(share) > 100 / 3 for _, seen, share in labels)


def test_the_page_shows_the_trainer() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "trainer.md").read_text(), re.DOTALL)
    assert block == (DOCS / "examples/trainer.py").read_text()


@pytest.mark.timeout(400)
def test_the_trainer_in_docs(tmp_path: Path) -> None:
    """Three epochs on two tensor-parallel ranks, the fourth by two replicas."""
    printed = []
    for epochs, tensor_parallel in ((3, 2), (4, 1)):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
                *(str(DOCS / "examples/trainer.py"), str(tmp_path)),
                *("--epochs", str(epochs), "--tp", str(tensor_parallel)),
            ],
            **{"capture_output": True, "text": True, "timeout": 180},
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        printed.append(done.stdout)
    assert "Resuming in epoch 3, after step 16, from " in printed[1] and "Resuming" not in printed[0]
    assert f"The last checkpoint is {tmp_path}/checkpoints/epoch-4" in printed[1]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" not in line]  # of epochs
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 16), (2, 32), (3, 48), (4, 64)]
    assert lines[-1]["train_loss"] < lines[0]["train_loss"] / 10
    assert lines[-1]["test_error_percent"] < 5 and lines[-1]["test_confident_percent"] > 80


@pytest.mark.timeout(300)
def test_the_code_in_the_readme(tmp_path: Path) -> None:
    """As it stands, and again: the second start finds that all is done."""
    (code, *_) = re.findall(r"```python\n(.*?)```", (DOCS.parent / "README.md").read_text(), flags=re.DOTALL)
    (tmp_path / "own.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "own.py"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=140)
        assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "runs/own/metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if "test_error_percent" in line]
    assert [line["epoch"] for line in epochs] == [1, 2, 3]
    assert epochs[-1]["test_error_percent"] < 10
