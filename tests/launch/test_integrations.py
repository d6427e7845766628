"""The examples of other libraries' training give on two tensor-parallel ranks what they give on one."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.jobs import ROOT, free_port

LIBRARIES = {"timm": ("timm",), "accelerate": ("accelerate", "transformers"), "lightning": ("lightning",)}


def losses(library: str, ranks: int, folder: Path) -> list[float]:
    """Of each step, which rank 0 tells."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*torchrun, "--master-port", free_port(), str(ROOT / f"docs/examples/{library}_training.py")],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=140,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if library == "accelerate":  # an optimizer's step for two batches
        assert re.findall(r"  (\d) steps of the optimizer", done.stdout) == list("011223")
    return [float(loss) for loss in re.findall(r"^step \d+  loss ([\d.]+)", done.stdout, flags=re.MULTILINE)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("library", LIBRARIES)
def test_two_ranks_train_as_one(library: str, tmp_path: Path) -> None:
    for name in LIBRARIES[library]:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    alone, split = (losses(library, ranks, tmp_path) for ranks in (1, 2))
    assert len(alone) >= 4 and len(set(alone)) == len(alone), alone
    assert split == pytest.approx(alone, abs=2e-4)
