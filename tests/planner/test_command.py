"""``tlgc-mp plan``: what it says, writes and refuses."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tlgc_mp
from tlgc_mp import UsageError, create_model
from tlgc_mp.cli.main import main
from tlgc_mp.planner.devices import DEVICES, Network, read_bandwidth, read_memory

SMALL = ["plan", "--model", "wrn-10-1", "--groups", "2", "--image-size", "8", "--batch-size", "16"]


def test_it_says_how_to_start_what_fits_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--ranks", "2", "--recipe", "digits", "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "plan.json").read_text())
    rates = [each["samples_per_second"] for each in found["candidates"] if each["fits"]]
    assert rates == sorted(rates, reverse=True) and found["best"]["samples_per_second"] == rates[0]
    kinds = ("parameters", "gradients", "optimizer", "activations", "copies", "workspace")
    for each in found["candidates"]:
        assert each["memory"]["total"] == pytest.approx(sum(each["memory"][kind] for kind in kinds))
        assert each["step_seconds"] == pytest.approx(sum(each["seconds"].values()))
        assert each["tensor_parallel"] * each["data_parallel"] == 2
        assert each["micro_batch"] * each["accumulation"] * each["data_parallel"] == 16
    assert {each["zero_stage"] for each in found["candidates"]} == {0, 1, 2, 3}
    assert {each["tensor_parallel"] for each in found["candidates"]} == {1, 2}
    assert (tmp_path / "plan.png").stat().st_size > 1000 and "| N |" in (tmp_path / "plan.md").read_text()
    line = next(line for line in said.splitlines() if "tlgc_mp train" in line)
    config = json.loads((tmp_path / "plan-deepspeed.json").read_text())
    assert config == found["best"]["deepspeed_config"]
    _starts(shlex.split(line), tmp_path)


def _starts(words: list[str], folder: Path) -> None:
    """The line that was said is one that ``train`` takes, over as many ranks."""
    from tlgc_mp.cli.main import _parser
    from tlgc_mp.cli.options import parse
    from tlgc_mp.parallel.topology import Launch
    from tlgc_mp.training.settings import resolve

    words = [str(folder / word) if word == "plan-deepspeed.json" else word for word in words[words.index("train") :]]
    options = parse(_parser(), [*words, "--output-dir", str(folder / "run")], 2)
    settings = resolve(options, Launch(world=2, rank=0, local_rank=0, local_world=2))
    assert settings.batch_size == 16


def test_what_does_not_fit_says_by_how_much_and_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--model", "wrn-10-8", "--groups", "8", "--image-size", "16", "--batch-size", "32"]
    words += ["--memory", "0.624GiB"]
    assert main(words) == 1
    said = capsys.readouterr().out
    assert "Nothing fits. " in said and " GiB, " in said and " too many, most of it " in said
    (line,) = [line for line in said.splitlines() if line.startswith("It fits on ")]
    ranks = int(line.split()[3])
    assert main([*words, "--ranks", str(ranks)]) == 0
    assert main([*words, "--ranks", str(ranks // 2)]) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "h300"], "--gpu must be one of h200, h100, a100-80, a100-40, v100, rtx-4090, rtx-3090, titan-rtx, "),
        (["--memory", "0GiB"], "--memory must be a size above 0, got '0GiB'; use e.g. 24GiB or 80GB"),
        (["--memory", "lots"], "--memory must be a size above 0, got 'lots'; use e.g. 24GiB or 80GB"),
        (["--memory", "1MB"], "--memory must be more than the 0.60 GiB that a process takes, got 1MB; use e.g. 24GiB"),
        (["--network", "fast"], "--network must be a bandwidth above 0, got 'fast'; use e.g. 100Gbit"),
        (["--hosts", "0x8"], "--hosts must be HOSTSxRANKS, got '0x8'; use e.g. 8x8 for 8 hosts of 8 ranks"),
        (["--hosts", "2x2", "--ranks", "8"], "--hosts must make the 8 ranks of --ranks, got '2x2', which makes 4; "),
        (["--ranks", "0"], "--ranks must be 1 to 4096, got 0; use e.g. 8"),
        (["--ranks", "4", "--tp", "3"], "--tp must divide the 4 ranks, got 3; use one of 1, 2, 4"),
        (["--ranks", "4", "--tp", "4"], "tensor_parallel must be a divisor of groups=2, got 4; use one of 1, 2"),
        (["--ranks", "3"], "the batch must be a multiple of the replicas of 3 ranks, got 16; "),
        (["--batch-size", "0"], "--batch-size must be 1 to 1000000, got 0"),
        (["--optimizer", "lion"], "--optimizer must be one of sgd, adamw, got 'lion'"),
        (["--dtype", "fp8"], "--dtype must be one of fp32, bf16, got 'fp8'"),
        (["--calibrated", "/nowhere"], "--calibrated must be a file, got '/nowhere': No such file or directory"),
        (["--model", "wrn-11-1"], "model must be of a depth 6 u + 4, got 'wrn-11-1'; "),
        (["--model", "torchvision:fasterrcnn_resnet50_fpn"], "model must give logits (B, classes) for images "),
    ],
)
def test_bad_input_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *words]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith(f"tlgc-mp: error: {said}") and not out


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * x.sum().item()


CONFIG = {"train_batch_size": 8}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "resnet"}, "model"),
        ({"model": Reads()}, "model cannot be measured without values, got "),
        ({"sample_input": 3}, "sample_input must hold a tensor whose first dimension is the batch's, got none"),
        ({"config": {}}, "train_batch_size must be a number of samples, got None"),
        ({"ranks": 0}, "ranks must be 1 or more, got 0"),
        ({"memory": -1.0}, "memory must be a number of bytes above 0, got -1.0"),
        ({"device": "abacus"}, "--gpu must be one of "),
        ({"dtype": "fp8"}, "dtype must be one of fp32, bf16, got 'fp8'"),
    ],
)
def test_the_function_refuses_what_cannot_work(changes: dict[str, Any], said: str) -> None:
    given: dict[str, Any] = {"model": nn.Linear(4, 4), "sample_input": torch.empty(2, 4), "config": CONFIG, **changes}
    with pytest.raises(UsageError, match=f"^{said}"):
        tlgc_mp.plan(given.pop("model"), given.pop("sample_input"), given.pop("config"), **given)


def test_what_the_configuration_says_is_kept() -> None:
    model = create_model("wrn-10-1", groups=4, device="meta")
    config = {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 4,
        "tensor_parallel": {"autotp_size": 2},
        "zero_optimization": {"stage": 2},
    }
    found = tlgc_mp.plan(model, torch.empty(2, 3, 8, 8), config, ranks=4)
    for each in found.candidates:
        assert (each.tensor_parallel, each.share.stage, each.micro_batch, each.accumulation) == (2, 2, 4, 2)
    assert found.best is not None and "P" in str(found)


def test_memory_and_bandwidth_are_read_as_they_are_said() -> None:
    assert read_memory("24GiB") == 24 * 2**30 and read_memory("80GB") == 80e9 and read_memory("0.5TiB") == 2**39
    assert read_bandwidth("100Gbit") == 12.5e9 and read_bandwidth("20mbit") == 2.5e6


def test_a_ring_takes_as_long_as_its_bytes() -> None:
    from tlgc_mp.planner.traffic import REPLICAS, Collective

    network = Network(hosts=2, ranks=2, bandwidth=1e9, latency=0.0)
    device = DEVICES["h200"]
    for name, sent in (("all_gather", 3e9), ("reduce_scatter", 0.75e9), ("all_reduce", 1.5e9)):
        each = Collective(name, REPLICAS, 4, 1, 1e9, "network")
        assert each.sent == sent
        assert each.seconds(device, network, 1) == pytest.approx(sent / 1e9)
