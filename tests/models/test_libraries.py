"""Models of torchvision and timm by name."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from tlgc_mp import UsageError, create_model
from tlgc_mp.cli.main import main
from tlgc_mp.models import libraries
from tlgc_mp.models.names import check_model
from tlgc_mp.nn import TwoLevelConv2d

ROOT = Path(__file__).parents[2]
SMALL = ("torchvision:mobilenet_v3_small", "timm:resnet10t")


def library(name: str, **arguments: Any) -> nn.Module:
    """The same model, made by the library alone."""
    kind, _, own = name.partition(":")
    if kind == "torchvision":
        return torchvision.models.get_model(own, weights=None, **arguments)
    return timm.create_model(own, pretrained=False, **arguments)


def same(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][key], states[1][key]) for key in states[0]
    )


@pytest.mark.parametrize("device", [None, "cpu", "meta"])
@pytest.mark.parametrize("name", SMALL)
def test_dense_is_what_the_library_makes_of_the_seed(name: str, device: str | None) -> None:
    torch.manual_seed(7)
    expected = library(name, num_classes=5)
    torch.manual_seed(7)
    torch.rand(3)  # what was drawn before does not count
    before = torch.get_rng_state()
    model = create_model(name, conv="sc", num_classes=5, device=device)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(model, expected)
    torch.manual_seed(8)
    assert not same(create_model(name, conv="sc", num_classes=5), expected)


def test_weights_do_not_depend_on_the_default_device() -> None:
    torch.manual_seed(7)
    expected = create_model("timm:resnet10t", conv="gc", groups=4)
    with torch.device("meta"):
        assert same(create_model("timm:resnet10t", conv="gc", groups=4), expected)


def test_classes_are_imagenets_where_nothing_says() -> None:
    assert create_model("timm:vit_tiny_patch16_224", conv="sc").head.out_features == 1000  # type: ignore[union-attr]


def test_converted() -> None:
    torch.manual_seed(7)
    first, second = (
        create_model("torchvision:resnet18", groups=4, coarse_init="he", coarse_kernel_size=1) for _ in range(2)
    )
    layers = [layer for layer in first.modules() if isinstance(layer, TwoLevelConv2d)]
    assert len(layers) == 19 and all(layer.groups == 4 for layer in layers)
    assert all(layer.restriction.shape[-1] == 1 and layer.prolongation.abs().max() > 0 for layer in layers)
    assert list(first.conversion.left) == ["conv1"]  # type: ignore[union-attr, arg-type]
    assert same(first, second)


def params(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, int]:
    assert main(["params", *flags]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", [*SMALL, "torchvision:regnet_y_400mf", "torchvision:swin_t"])
def test_params_of_a_dense_model(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    total = sum(param.numel() for param in library(name).parameters())
    assert params(capsys, "--model", name, "--conv", "sc") == {"total": total, "per_rank": total}


def test_params_of_a_converted_model(capsys: pytest.CaptureFixture[str]) -> None:
    """Of each convolution but the stem: d d m n / N filters, n of the restriction (d0 = 1) and m N of the
    prolongation."""
    dense = library("torchvision:resnet18", num_classes=10)
    expected = sum(param.numel() for param in dense.parameters())
    for name, layer in dense.named_modules():
        if isinstance(layer, nn.Conv2d) and name != "conv1":
            filters = layer.weight.numel()
            expected += filters // 4 + layer.in_channels + layer.out_channels * 4 - filters
    flags = ("--model", "torchvision:resnet18", "--num-classes", "10", "--coarse-kernel-size", "1")
    assert params(capsys, *flags)["total"] == expected


@pytest.mark.parametrize("name", ["torchvision:resnet50", "timm:convnext_tiny", "timm:vit_tiny_patch16_224"])
def test_every_rank_holds_about_a_share(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    counts = [params(capsys, "--model", name, "--conv", "sc", "--tp", ranks) for ranks in ("1", "2")]
    assert counts[0]["total"] == counts[1]["total"]
    assert counts[0]["total"] <= 2 * counts[1]["per_rank"] < 1.02 * counts[0]["total"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("torchvision:resnet5", r"torchvision has, got 'torchvision:resnet5'; use one of torchvision:resnet50, "),
        ("timm:convnext_tny", r"timm has, got 'timm:convnext_tny'; use one of timm:convnext_tiny, "),
        ("torchvision:qqqq", r"got 'torchvision:qqqq'; use a name of torchvision's list_models"),
        ("timm:resnet50.a1_in1k", r"got 'timm:resnet50.a1_in1k'; use timm:resnet50, without trained weights"),
        ("timm:hf-hub:timm/resnet50", r"got 'timm:hf-hub:timm/resnet50'; use timm:<name>"),
        ("torchvision:", r"got 'torchvision:'; use torchvision:<name>"),
        ("keras:resnet50", r"model must be .*torchvision:<name> or timm:<name>, got 'keras:resnet50'"),
        ("torchvision:fasterrcnn_resnet50_fpn", r"logits .* a detector.*losses of boxes; train it with tlgc_mp.init"),
        ("torchvision:deeplabv3_resnet50", r"logits .* segmentation"),
        ("torchvision:raft_small", r"logits .* optical flow"),
        ("torchvision:googlenet", r"logits .* auxiliary classifiers"),
        ("torchvision:inception_v3", r"logits .* auxiliary classifiers"),
        ("torchvision:quantized_googlenet", r"logits .* auxiliary classifiers"),
        ("timm:mobilenetv5_300m_enc", r"logits .* a tensor of shape \(2, 2048"),
    ],
)
def test_what_does_not_train_on_a_cross_entropy(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        create_model(name, conv="sc")


def test_a_network_for_videos_is_not_trained_on_images(capsys: pytest.CaptureFixture[str]) -> None:
    said = "model must give logits (B, classes) for images (B, 3, H, W), got 'torchvision:r3d_18', a network for videos"
    with pytest.raises(UsageError, match=re.escape(said)):
        libraries.check_trainable("torchvision:r3d_18")
    assert main(["train", "--model", "torchvision:r3d_18", "--groups", "4", "--dataset", "synthetic"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["torchvision:r3d_18", "torchvision:mc3_18", "torchvision:r2plus1d_18"])
def test_params_of_a_network_for_videos(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of each convolution but the stem that 4 divides: a quarter of the filters, a representative a group, and N
    columns of the prolongation."""
    dense = library(name, num_classes=400)
    total = sum(param.numel() for param in dense.parameters())
    flags = ("--model", name, "--num-classes", "400")
    assert params(capsys, *flags, "--conv", "sc") == {"total": total, "per_rank": total}
    _, *layers = (layer for layer in dense.modules() if isinstance(layer, nn.Conv3d))
    for layer in layers:
        if layer.in_channels % 4 == layer.out_channels % 4 == 0:
            filters = layer.weight.numel()
            restriction = layer.weight[0].numel()
            total += filters // 4 + restriction + layer.out_channels * 4 - filters
    counts = params(capsys, *flags, "--conv", "gc-2l", "--groups", "4", "--tp", "2")
    assert counts["total"] == total and total <= 2 * counts["per_rank"] < 1.02 * total


ARCHITECTURES = [f"timm:{name}" for name in timm.list_models("test_*")] + [
    f"torchvision:{name}"
    for name in (
        *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "maxvit_t", "mnasnet0_5", "mobilenet_v2"),
        *("quantized_resnet18", "regnet_x_400mf", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_v2_t", "vgg11"),
    )
]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_does(name: str) -> None:
    libraries.check_trainable(name)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"conv": "sc", "groups": 2}, "groups must be 1 with conv='sc', the dense convolution, got 2"),
        ({"conv": "gc", "groups": 0}, "groups must be a number of groups, got 0"),
        (
            {"conv": "gc", "groups": 7},
            "model must be one that can be converted, .*: groups must be one of 1, 2, 4, 8.*, got 7: .*conv='sc'",
        ),
        ({"conv": "sc", "num_classes": 0}, "num_classes must be 1 or more, got 0"),
        ({"conv": "gc-2l", "coarse_everywhere": True}, "coarse_everywhere must be False but for mobilenet_v2"),
        ({"conv": "gc", "coarse_init": "he"}, "conv must be .* with coarse_init='he'"),
        ({"conv": "sc", "device": "abacus"}, "device must be a device that torch knows, got 'abacus'"),
    ],
)
def test_arguments_that_cannot_work(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        create_model("torchvision:resnet18", **arguments)


def test_a_network_without_a_convolution_to_replace() -> None:
    with pytest.raises(UsageError, match=r"got 'torchvision:vit_b_32': .*the stem.*with conv='sc'"):
        create_model("torchvision:vit_b_32", groups=4)


def test_timm_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "timm" else found(name))
    with pytest.raises(
        UsageError, match="'timm:resnet10t' needs timm, which is not installed; pip install 'tlgc-mp\\[timm\\]'"
    ):
        check_model("timm:resnet10t", "sc", 1)
    check_model("torchvision:resnet18", "sc", 1)


@pytest.mark.parametrize(
    ("name", "size", "made_for"),
    [
        ("torchvision:vit_b_16", 32, 224),
        ("timm:swin_tiny_patch4_window7_224", 64, 224),
        ("torchvision:alexnet", 32, 224),
    ],
)
def test_images_of_a_size_that_a_model_does_not_take(name: str, size: int, made_for: int) -> None:
    said = rf"got 4 of {size} x {size} pixels .*; use images of {made_for} x {made_for} "
    with pytest.raises(UsageError, match=said):
        libraries.check_images(name, size, 4)
    libraries.check_images(name, made_for, 4)


def test_names_are_checked_without_loading_a_library() -> None:
    code = (
        "import sys; from tlgc_mp.models.names import check_model; check_model('timm:resnet10t', 'gc-2l', 4)\n"
        "print(sorted({'torch', 'torchvision', 'timm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


EXAMPLES = ("detector", "segmentation")


def test_the_page_shows_the_examples() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "other_models.md").read_text(), re.DOTALL)
    assert blocks == [(ROOT / "docs" / "examples" / f"{name}.py").read_text() for name in EXAMPLES]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_gives_the_same_losses_on_two_ranks(name: str) -> None:
    losses = []
    for ranks in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        done = subprocess.run(
            [*command, str(ROOT / "docs" / "examples" / f"{name}.py")],
            **{"capture_output": True, "text": True, "timeout": 140},
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        losses.append([float(loss) for loss in re.findall(r"loss (\d+\.\d+)", done.stdout)])
    assert len(losses[0]) >= 3 and losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], abs=2e-4)
