"""The commands on the accelerator of this machine, one process a device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.launch.jobs import Job, started
from tlgc_mp.cli.main import main

pytestmark = pytest.mark.skipif(not torch.accelerator.is_available(), reason="this machine has no accelerator")

OPTIONS = ["--model", "wrn-10-2", "--groups", "4", "--dataset", "digits", "--epochs", "3", "--learning-rate", "0.01"]


def _kind() -> str:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    return device.type


def _finished(job: Job, status: int = 0) -> None:
    assert job.wait(150) == status, job.said()
    for word in ("Traceback", "Warning"):
        assert word not in job.said()


@pytest.mark.timeout(280)
@pytest.mark.parametrize(
    "config", [{}, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}], ids=["fp32", "bf16"]
)
def test_stopped_and_resumed(tmp_path: Path, config: dict[str, object]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    options = [*OPTIONS, "--deepspeed_config", str(path)] if config else OPTIONS
    with started("plain", options, tmp_path / "whole", DS_ACCELERATOR=_kind()) as job:
        _finished(job)
        whole = job.lines()
    assert whole[2]["train_loss"] < 0.9 * whole[0]["train_loss"]

    with started("plain", options, tmp_path / "stopped", DS_ACCELERATOR=_kind()) as job:
        job.wait_for_epoch()
        job.ctrl_c()
        _finished(job, 130)
    with started("plain", [*options, "--resume"], tmp_path / "stopped", DS_ACCELERATOR=_kind()) as job:
        _finished(job)
        resumed = job.lines()
    assert [line["epoch"] for line in resumed] == [1, 2, 3]
    # cuDNN sums some gradients in another order each time.
    for line, expected in zip(resumed, whole, strict=True):
        assert line["train_loss"] == pytest.approx(expected["train_loss"], rel=0.05)


def test_more_ranks_than_accelerators(tmp_path: Path) -> None:
    count = torch.accelerator.device_count()
    place = {"RANK": str(count), "WORLD_SIZE": str(count + 1), "LOCAL_RANK": str(count)}
    with started("plain", OPTIONS, tmp_path, DS_ACCELERATOR=_kind(), **place) as job:
        assert job.wait(60) == 2, job.said()
        assert (
            f"local rank must be less than {count}, the number of {_kind()} devices of this node, got {count}"
            in job.stderr
        )


@pytest.mark.timeout(280)
def test_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", _kind())
    flags = ["--quick", "--widths", "2", "--depth", "10", "--batch-sizes", "4", "--groups", "2", "--tp", "1"]
    strategies = ["gc-2l", "gc-2l-overlapped", "gc-2l-fused", "gc-2l-dense", "gc", "naive-mp"]
    status = main(["bench", "scaling", *flags, "--strategies", *strategies, "--output", str(tmp_path)])
    assert status == 0, capsys.readouterr().out
    rows = json.loads((tmp_path / "scaling.json").read_text())
    assert [row["strategy"] for row in rows] == strategies
    for row in rows:
        assert row["peak_memory_bytes"] > 3 * row["parameter_bytes"]
        for kind in ("convolution, forward", "convolution, backward", "BatchNorm", "optimizer", "waiting and the rest"):
            assert row["accounting"][kind] > 0, f"{kind} of {row['strategy']}"
