"""The plan: which parameters are cut where, how many a rank holds, and what is refused by name, on the meta device."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from tlgc_mp import UsageError, create_model
from tlgc_mp.nn import TwoLevelConv2d
from tlgc_mp.parallel.plan import Placement, parameter_counts, plan


def _network(*middle: nn.Module, width: int = 8) -> nn.Module:
    """A stem of ``width`` channels, ``middle``, and a head."""
    return nn.Sequential(nn.Conv2d(3, width, 3), *middle, nn.Flatten(), nn.Linear(width, 10))


def test_every_kind_of_layer_is_placed() -> None:
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            TwoLevelConv2d(8, 8, 3, groups=4, bias=True),
            TwoLevelConv2d(8, 8, 3, groups=4, coarse_kernel_size=1),
            nn.Conv2d(8, 8, 3, groups=8, bias=False),
            nn.Conv2d(8, 16, 1),
            nn.BatchNorm2d(16, affine=False),
            nn.BatchNorm2d(16, track_running_stats=False),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(),
            nn.Linear(16, 10),
        )
    norm = {"weight": 0, "bias": 0}
    statistics = {"running_mean": 0, "running_var": 0}
    assert plan(model, 4) == {
        "0": Placement("column", {"weight": 0, "bias": 0}),
        "1": Placement("channels", {**norm, **statistics}),
        "3": Placement("two-level", {"weight": 0, "restriction": 0, "prolongation": 0, "bias": 0}),
        "4": Placement("two-level", {"weight": 0, "restriction": 0, "prolongation": 0}),
        "5": Placement("grouped", {"weight": 0}),
        "6": Placement("gathered", {"weight": 0, "bias": 0}),
        "7": Placement("channels", statistics),
        "8": Placement("channels", norm),
        "11": Placement("dropout", {}),
        "12": Placement("row", {"weight": 1}),
    }


class ActivatedBatchNorm(nn.BatchNorm2d):
    """BatchNorm, then an activation that is its child."""

    def __init__(self, channels: int, activation: nn.Module) -> None:
        super().__init__(channels)
        self.activation = activation


def test_a_subclass_of_batch_norm_that_holds_what_it_holds_is_placed() -> None:
    norm = ActivatedBatchNorm(8, nn.ReLU())
    assert plan(_network(norm), 2)["1"] == plan(_network(nn.BatchNorm2d(8)), 2)["1"]


def test_a_subclass_of_batch_norm_with_more_to_it_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"^1\.activation: PReLU mixes channels, holds parameters "):
        plan(_network(ActivatedBatchNorm(8, nn.PReLU(8))), 2)
    norm = ActivatedBatchNorm(8, nn.ReLU())
    norm.register_buffer("scale", torch.ones(8))
    with pytest.raises(UsageError, match=r"^1: ActivatedBatchNorm mixes channels, holds parameters "):
        plan(_network(norm), 2)


def test_tied_parameters_are_refused_by_name() -> None:
    first, second = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
    second.weight = first.weight
    with pytest.raises(UsageError, match=r"^2\.weight: it is the same parameter as 1\.weight, "):
        plan(_network(first, second), 2)


@pytest.mark.parametrize("name", ["wrn-28-10", "imagenet-wrn-34-2", "mobilenet_v2"])
@pytest.mark.parametrize(("conv", "groups"), [("sc", 1), ("gc-2l", 4)])
def test_a_rank_holds_its_part_of_all_but_the_bias_of_the_head(name: str, conv: str, groups: int) -> None:
    model = create_model(name, conv=conv, groups=groups, num_classes=10, device="meta")
    whole = sum(param.numel() for param in model.parameters())
    for ranks in (1, 2, 4):
        assert parameter_counts(model, ranks) == {"total": whole, "per_rank": (whole - 10) // ranks + 10}


@pytest.mark.parametrize(
    ("model", "ranks", "message"),
    [
        (_network(TwoLevelConv2d(8, 8, 3, groups=4)), 8, "does not divide groups=4 of 1; use one of 1, 2, 4"),
        (_network(TwoLevelConv2d(8, 8, 3, groups=8)), 3, "does not divide out_channels=8 of 0; use one of 1, 2, 4, 8"),
        (_network(nn.Conv2d(8, 8, 3, groups=2)), 4, "does not divide groups=2 of 1; use one of 1, 2"),
        (_network(), 16, "does not divide out_channels=8 of 0; use one of 1, 2, 4, 8"),
        (_network(nn.Conv2d(8, 12, 3)), 8, "does not divide out_channels=12 of 1; use one of 1, 2, 3, 4, 6, 12"),
        (_network(nn.Conv2d(6, 8, 3)), 4, "does not divide in_channels=6 of 1; use one of 1, 2, 3, 6"),
        (_network(nn.BatchNorm2d(6)), 4, "does not divide num_features=6 of 1; use one of 1, 2, 3, 6"),
        (
            nn.Sequential(nn.Conv2d(3, 8, 1), nn.Linear(6, 10)),
            4,
            "does not divide in_features=6 of 1; use one of 1, 2, 3, 6",
        ),
        (_network(), 0, "does not divide out_channels=8 of 0; use one of 1, 2, 4, 8"),
        (_network(), -2, "does not divide out_channels=8 of 0; use one of 1, 2, 4, 8"),
    ],
)
def test_counts_that_do_not_divide_are_refused(model: nn.Module, ranks: int, message: str) -> None:
    with pytest.raises(UsageError, match=f"^tensor_parallel={ranks} {message}$"):
        plan(model, ranks)


@pytest.mark.parametrize("ranks", [3, 8])
def test_a_whole_network_is_refused_by_the_first_layer_that_does_not_divide(ranks: int) -> None:
    layer = "out_channels=16 of stem" if ranks == 3 else "groups=4 of units.0.conv1"
    with pytest.raises(UsageError, match=f"tensor_parallel={ranks} does not divide {re.escape(layer)}; use one of"):
        plan(create_model("wrn-10-2", groups=4, device="meta"), ranks)


@pytest.mark.parametrize(
    "layer",
    [
        nn.GroupNorm(2, 8),
        nn.LayerNorm(8, elementwise_affine=False),
        nn.LocalResponseNorm(3),
        nn.ChannelShuffle(2),
        nn.PixelShuffle(2),
        nn.Softmax2d(),
        nn.ConvTranspose2d(8, 8, 3),
        nn.PReLU(8),
        nn.SyncBatchNorm(8),
        nn.Dropout2d(),
        nn.AlphaDropout(),
        nn.RReLU(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_that_mix_channels_or_are_unknown_are_refused_by_name(layer: nn.Module) -> None:
    works = "use convolutions, BatchNorm2d, Dropout, and one Linear as the head"
    with pytest.raises(UsageError, match=f"^1: {type(layer).__name__} .* is not known; {works}$"):
        plan(_network(layer), 2)


def test_second_linear_layer_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 10))
    with pytest.raises(UsageError, match=r"^3: a second linear layer after 2 cannot be split; one head is$"):
        plan(model, 2)


@pytest.mark.parametrize("place", [0, -1])
def test_dropout_of_what_is_not_split_is_refused_by_name(place: int) -> None:
    layers = [nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(8, 10)]
    layers.insert(place % 4, nn.Dropout())
    with pytest.raises(UsageError, match=rf"^{place % 4}: Dropout before the stem or after the head cannot be split"):
        plan(nn.Sequential(*layers), 2)


def test_grouped_stem_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"^0: a stem with groups=3 cannot be split; use a dense one$"):
        plan(nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.Flatten(), nn.Linear(6, 10)), 2)


def test_model_that_is_one_unknown_layer_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^the model: GroupNorm "):
        plan(nn.GroupNorm(2, 8), 2)
