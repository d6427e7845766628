"""Bad input is answered at once: by a launcher's ranks, and before torch is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.test_bad_input import SYNTHETIC, assert_one_line

LAUNCHERS: dict[str, tuple[dict[str, str], str]] = {
    "world as text": (
        {"WORLD_SIZE": "two", "RANK": "0"},
        "WORLD_SIZE, which the launcher sets, must be 1 to 1000000, got 'two'",
    ),
    "world of none": (
        {"WORLD_SIZE": "0", "RANK": "0"},
        "WORLD_SIZE, which the launcher sets, must be 1 to 1000000, got '0'",
    ),
    "rank beyond the world": (
        {"WORLD_SIZE": "2", "RANK": "2"},
        "RANK, which the launcher sets, must be 0 to 1, got '2'",
    ),
    "rank negative": ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK, which the launcher sets, must be 0 to 1, got '-1'"),
    "local rank empty": (
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": ""},
        "LOCAL_RANK, which the launcher sets, must be 0 to 1, got ''",
    ),
    "local world": (
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_WORLD_SIZE": "0"},
        "LOCAL_WORLD_SIZE, which the launcher sets, must be 1 to 2, got '0'",
    ),
    "of Open MPI": (
        {"OMPI_COMM_WORLD_SIZE": "1e3", "OMPI_COMM_WORLD_RANK": "0"},
        "OMPI_COMM_WORLD_SIZE, which the launcher sets, must be 1 to 1000000, got '1e3'",
    ),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", LAUNCHERS)
def test_mistake_of_a_launcher(name: str, tmp_path: Path) -> None:
    variables, said = LAUNCHERS[name]
    unset = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    finished = subprocess.run(
        [sys.executable, "-m", "tlgc_mp", "train", *SYNTHETIC],
        **{"capture_output": True, "text": True, "timeout": 50, "cwd": tmp_path},
        env={**{k: v for k, v in os.environ.items() if k not in unset}, **variables},
    )
    assert finished.returncode == 2
    assert_one_line((finished.stdout, finished.stderr), [said])
    assert not list(tmp_path.iterdir())


_REPORT_IMPORTS = """
import sys
from tlgc_mp.cli.main import main
status = main(sys.argv[1:])
print(sorted(sys.modules.keys() & {"torch", "deepspeed", "numpy", "torchvision"}))
sys.exit(status)
"""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("arguments", [["--groups", "3"], ["--resume"], ["--epochs", "0"], ["--tp", "5"]])
def test_answered_before_torch_is_loaded(tmp_path: Path, arguments: list[str]) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", _REPORT_IMPORTS, "train", *SYNTHETIC, "--output-dir", str(tmp_path / "run"), *arguments],
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (finished.returncode, finished.stdout) == (2, "[]\n"), finished.stderr


@pytest.mark.timeout(60)
@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_help_waits_for_no_library(arguments: list[str]) -> None:
    """How long it takes is the machine's; what it imports is not."""
    finished = subprocess.run(
        [os.path.join(os.path.dirname(sys.executable), "tlgc-mp"), *arguments],
        capture_output=True,
        text=True,
        timeout=50,
        env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"},
    )
    assert finished.returncode == 0 and "tlgc-mp" in finished.stdout
    # "import time:  self [us] |  cumulative |  package.module"
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in finished.stderr.splitlines()}
    assert {"argparse", "tlgc_mp"} <= imported
    assert not imported & {"torch", "torchvision", "deepspeed", "numpy", "sklearn", "matplotlib", "tensorboard"}
