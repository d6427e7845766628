"""A run of a model of timm through the command line: trained, split, saved, exported and loaded."""

from __future__ import annotations

import gc
import json
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.ranks import run_ranks
from tests.training.runs import metrics, train
from tlgc_mp import load_model
from tlgc_mp.cli.main import _parser, main
from tlgc_mp.data import EvaluationBatches, load_datasets
from tlgc_mp.data.loaders import started_workers
from tlgc_mp.parallel.topology import Launch
from tlgc_mp.training.model import model_of
from tlgc_mp.training.settings import output_folder, resolve

SHORT = ("--batch-size", "16", "--epochs", "1", "--limit-steps", "2", "--learning-rate", "0.01")


@pytest.mark.timeout(240)
def test_split_over_two_ranks_it_trains_as_on_one_device(tmp_path: Path) -> None:
    flags = ("--model", "timm:test_resnet", "--conv", "sc", "--image-size", "64", *SHORT)
    for ranks in (1, 2):
        outcomes = run_ranks(ranks, train, str(tmp_path / str(ranks)), "--tp", str(ranks), *flags)
        assert [outcome.status for outcome in outcomes] == [0] * ranks, outcomes[0].stderr
    one, two = (metrics(tmp_path / ranks)[-1] for ranks in "12")
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)
    assert two["test_loss"] == pytest.approx(one["test_loss"], rel=1e-4)
    result = json.loads((tmp_path / "2" / "result.json").read_text())
    assert result["parameters"] <= 2 * result["parameters_per_rank"] < 1.05 * result["parameters"]


@pytest.mark.timeout(240)
def test_two_replicas_without_batch_norm_and_their_export(tmp_path: Path) -> None:
    """Of a network that looks positions up in a buffer that no state dict holds."""
    run, exported = tmp_path / "run", tmp_path / "model.safetensors"
    flags = ("--model", "timm:test_vit_relpos", "--conv", "sc", "--image-size", "160", *SHORT)
    outcomes = run_ranks(2, train, str(run), "--tp", "1", *flags)
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].stderr
    assert main(["export", str(run), str(exported)]) == 0
    model = load_model(str(exported))
    assert not model.training
    test = load_datasets("synthetic", None, seed=0, image_size=160).test
    images, labels = zip(*(test[i] for i in range(len(test))), strict=True)
    with torch.no_grad():
        loss = F.cross_entropy(model(torch.stack(images)), torch.tensor(labels))
    assert loss.item() == pytest.approx(metrics(run)[-1]["test_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--model", "timm:test_vit"), "got 128 of 8 x 8 pixels (Input height (8) should be divisible"),
        (("--model", "torchvision:fcn_resnet50"), "a segmentation network"),
        (("--model", "torchvision:resnet81"), "use one of torchvision:resnet18"),
        (("--model", "torchvision:resnet18", "--activation-checkpointing"), "--activation-checkpointing must be left"),
    ],
)
def test_what_cannot_be_trained_is_said_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], said: str
) -> None:
    output = tmp_path / "run"
    common = ("train", "--conv", "sc", "--dataset", "synthetic", "--image-size", "8", "--output-dir", str(output))
    assert main([*common, *flags]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and err.startswith("tlgc-mp: error: ") and said in err
    assert not output.exists()


@pytest.mark.parametrize(
    ("model", "size"), [("imagenet-wrn-34-2", "32"), ("mobilenet_v2", "32"), ("timm:test_efficientnet", "32")]
)
def test_one_image_at_a_time_where_batch_norm_has_one_value(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, size: str
) -> None:
    output = tmp_path / "run"
    flags = ("--model", model, "--groups", "1", "--image-size", size, "--batch-size", "1", "--output-dir", str(output))
    assert main(["train", "--dataset", "synthetic", "--conv", "sc", *flags]) == 2
    err = capsys.readouterr().err
    assert (
        len(err.splitlines()) == 1 and f"got 1 (1 in 1 replicas x 1 accumulation steps): of one image of {size}" in err
    )
    assert err.rstrip().endswith("use --batch-size 2 or more") and not output.exists()


@pytest.mark.parametrize(("model", "size"), [("wrn-10-1", 8), ("mobilenet_v2", 64), ("timm:test_vit", 160)])
def test_one_image_at_a_time_elsewhere(tmp_path: Path, model: str, size: int) -> None:
    flags = ["train", "--dataset", "synthetic", "--model", model, "--conv", "sc", "--image-size", str(size)]
    options = _parser().parse_args([*flags, "--batch-size", "1", "--output-dir", str(tmp_path / "run")])
    options.groups = 1
    assert isinstance(model_of(resolve(options, Launch()), 10, size), torch.nn.Module)


def test_workers_of_an_earlier_run_in_the_process_are_not_blamed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = torch.utils.data.TensorDataset(torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))
    list(EvaluationBatches(images, batch_size=2, rank=0, replicas=1, num_workers=1))
    deadline = time.monotonic() + 60
    while started_workers[-1].is_alive() and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    assert not started_workers[-1].is_alive()
    mistaken = ("train", "--conv", "sc", "--dataset", "synthetic", "--model", "torchvision:resnet81")
    assert main([*mistaken, "--output-dir", str(tmp_path / "run")]) == 2
    assert "use one of torchvision:resnet18" in capsys.readouterr().err


def test_the_folder_of_a_run_has_no_colon() -> None:
    options = _parser().parse_args(["train", "--model", "timm:test_resnet", "--conv", "sc", "--groups", "1"])
    assert output_folder(options) == "runs/timm-test_resnet-sc-1-cifar10"
