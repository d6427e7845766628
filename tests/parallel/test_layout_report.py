"""The report of what a split costs: against what real ranks hold, send and keep."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from tests.parallel.common import SEED, run_ranks_once
from tlgc_mp import UsageError, create_model
from tlgc_mp.nn import TwoLevelConv2d
from tlgc_mp.parallel import collectives, layout_report, shard
from tlgc_mp.parallel.replicas import CHECK_BYTES


class Joins(nn.Module):
    """A DenseNet in small: each layer takes all maps before it, joined; and a part that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(16), nn.BatchNorm2d(24)])
        self.layers = nn.ModuleList([nn.Conv2d(8, 8, 1), nn.Conv2d(16, 8, 1), nn.Conv2d(24, 8, 1)])
        self.last = nn.Conv2d(32, 4, 1)
        self.mixes = False

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.stem(x)]
        for norm, layer in zip(self.norms, self.layers, strict=True):
            maps.append(layer(torch.relu(norm(torch.cat(maps, 1)))))
        joined = torch.cat(maps, 1)
        if self.mixes:
            joined = joined.flip(1)
        return self.last(joined)


def _two_level() -> nn.Module:
    torch.manual_seed(SEED)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), TwoLevelConv2d(8, 8, 3, groups=4)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )


NETWORKS: dict[str, Any] = {
    "joins": Joins,
    "two-level": _two_level,
    "resnet18": torchvision.models.resnet18,
    "own": lambda: create_model("wrn-10-1", conv="gc-2l", groups=4, num_classes=10),
}


def _images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(SEED))


def _on_ranks(name: str) -> dict[str, Any]:
    model = NETWORKS[name]()
    told = layout_report(model, _images(), tensor_parallel=torch.distributed.get_world_size())
    given: Counter[str] = Counter()
    split = shard(model, sample_inputs=_images())
    collectives.recorders.append(lambda kind, size: given.update({kind: size}))
    hook = split.register_forward_pre_hook(lambda module, inputs: None)
    inner = next(iter(split.children())).register_forward_hook(lambda module, inputs, output: None)
    split(_images()).sum().backward()  # with a hook inside, so that no share goes plain
    collectives.recorders.clear()
    given["all_gather"] -= CHECK_BYTES  # the first pass in training compares the ranks
    hook.remove()
    inner.remove()
    return {
        "told": told,
        "again": layout_report(split, _images()),
        "held": sum(param.numel() for param in split.parameters()),
        "given": dict(given),
        "text": str(split.layout),
    }


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_what_real_ranks_hold_and_send(name: str, ranks: int) -> None:
    for answer in run_ranks_once(ranks, _on_ranks, name):
        told = answer["told"]
        assert sum(layer.parameters_per_rank for layer in told.layers) == answer["held"]
        sent = Counter({kind: 0 for kind in answer["given"]})
        for layer in told.layers:
            sent.update(layer.sent)
        others = (ranks - 1) / ranks
        parts = {"all_gather": ranks - 1, "coarse_gather": ranks - 1, "all_reduce": 2 * others}
        assert answer["given"], "nothing was sent"
        for kind, size in answer["given"].items():
            assert sent[kind] == pytest.approx(size * parts.get(kind, others), rel=0.01, abs=200), kind
        assert answer["again"].bytes_sent == told.bytes_sent
        assert f"over {ranks} ranks" in answer["text"]


def test_a_join_sends_no_map() -> None:
    """What the layers after a join send is their sums and the order of their filters, and no gathered input."""
    report = layout_report(Joins(), torch.empty(8, 3, 32, 32), tensor_parallel=2)
    for layer in report.layers:
        if layer.name.startswith(("layers.", "last")):
            map_bytes = 8 * 32 * 32 * 4 * (4 if layer.name == "last" else 8)
            assert sum(layer.sent.values()) < 1.5 * map_bytes, layer.name  # its output's scatter, its gradient's gather


def test_what_computes_whole_is_named() -> None:
    model = Joins()
    assert not any("flip" in layer.whole for layer in layout_report(model, _images(), tensor_parallel=2).layers)
    model.mixes = True
    report = layout_report(model, _images(), tensor_parallel=2)
    assert sum(layer.whole["flip"] for layer in report.layers) == 2, "once forward, once backward"
    assert "flip x1" in str(report)


def test_nearly_all_of_common_networks_is_split() -> None:
    for make in (torchvision.models.resnet50, torchvision.models.densenet121, torchvision.models.convnext_tiny):
        with torch.device("meta"):
            model = make()
        report = layout_report(model, torch.empty(2, 3, 64, 64, device="meta"), tensor_parallel=2)
        assert report.parameters_split > 0.99 and report.activations_split > 0.9, make.__name__


def test_frozen_filters_need_no_input_for_backward() -> None:
    sent = []
    for frozen in (False, True):
        model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 32, 1), nn.Conv2d(32, 8, 1))
        model[1].weight.requires_grad_(not frozen)
        report = layout_report(model, torch.empty(2, 4, 8, 8), tensor_parallel=2)
        sent.append({layer.name: layer.sent["all_gather"] for layer in report.layers})
    gather = 2 * 4 * 8 * 8 * 4  # this rank's 4 channels of the input
    assert sent[0]["1"] == 2 * gather, "once forward, once for the gradient of the filters"
    assert sent[1]["1"] == gather


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * x.sum().item()


def test_a_model_that_reads_values_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^model cannot be measured without values, got "):
        layout_report(Reads(), _images(), tensor_parallel=2)
    assert layout_report(Reads(), tensor_parallel=2).parameters_split > 0.5


@pytest.mark.parametrize("ranks", [0, None, "2", True])
def test_arguments_are_checked(ranks: Any) -> None:
    with pytest.raises(UsageError, match=r"^tensor_parallel must be a number of ranks, got "):
        layout_report(Reads(), tensor_parallel=ranks)


ATTENTION: dict[str, Any] = {
    "one layer": lambda: timm.create_model("vit_tiny_patch16_224", depth=1, num_heads=6, img_size=32),
    "of torch": lambda: nn.TransformerEncoderLayer(192, 6, 768, batch_first=True),
}


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("ranks", [2, 3])
def test_attention_sends_nothing_between_its_layers(name: str, ranks: int) -> None:
    inputs = torch.randn(2, 3, 32, 32) if name == "one layer" else torch.randn(2, 5, 192, requires_grad=True)
    sent: Counter[str] = Counter()
    for layer in layout_report(ATTENTION[name](), inputs, tensor_parallel=ranks).layers:
        if "attn" in layer.name:
            sent.update(layer.sent)
    # The input of the first layer is gathered, forward and backward (that of torch's layer is whole, and kept), and its
    # gradient scattered. The output of the last
    # is scattered, and its gradient gathered once, for its weight and for its input.
    size = 2 * 5 * 192 * 4 * (ranks - 1) // ranks  # of ten tokens
    assert sent["all_gather"] == (3 if name == "one layer" else 2) * size
    assert sent["reduce_scatter"] == 2 * size
