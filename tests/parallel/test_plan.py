"""The plan: which parameters are cut where, how many a rank holds, and what is held whole, on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tlgc_mp import UsageError, create_model
from tlgc_mp.nn import FullyLearnableGroupConv2d, ShuffleConv2d, TwoLevelConv2d, TwoLevelPrototypeConv2d
from tlgc_mp.parallel.plan import Placement, parameter_counts, plan

NORM = {"weight": 0, "bias": 0}
STATISTICS = {"running_mean": 0, "running_var": 0}


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
    assert plan(model, 4) == {
        "0": Placement("column", {"weight": 0, "bias": 0}),
        "1": Placement("channels", {**NORM, **STATISTICS}),
        "3": Placement("two-level", {"weight": 0, "restriction": 0, "prolongation": 0, "bias": 0}),
        "4": Placement("two-level", {"weight": 0, "restriction": 0, "prolongation": 0}),
        "5": Placement("grouped", {"weight": 0}),
        "6": Placement("column", {"weight": 0, "bias": 0}),
        "7": Placement("channels", STATISTICS),
        "8": Placement("channels", NORM),
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


def test_of_a_subclass_of_batch_norm_with_more_to_it_only_what_is_known_is_cut() -> None:
    norm = ActivatedBatchNorm(8, nn.PReLU(8))
    norm.register_buffer("scale", torch.ones(8))
    placements = plan(_network(norm), 2)
    assert placements["1"] == Placement("channels", {**NORM, **STATISTICS})
    assert placements["1.activation"] == Placement("channels", {"weight": 0})


@pytest.mark.parametrize("name", ["wrn-28-10", "imagenet-wrn-34-2", "mobilenet_v2"])
@pytest.mark.parametrize(("conv", "groups"), [("sc", 1), ("gc-2l", 4)])
def test_a_rank_holds_its_part_of_all_but_the_bias_of_the_head(name: str, conv: str, groups: int) -> None:
    model = create_model(name, conv=conv, groups=groups, num_classes=10, device="meta")
    whole = sum(param.numel() for param in model.parameters())
    for ranks in (1, 2, 4):
        assert parameter_counts(model, ranks) == {"total": whole, "per_rank": (whole - 10) // ranks + 10}


@pytest.mark.parametrize(
    ("layer", "ranks", "reason"),
    [
        (TwoLevelConv2d(8, 8, 3, groups=4), 8, "8 ranks do not divide its 4 groups"),
        (TwoLevelConv2d(8, 8, 3, groups=8), 3, "3 ranks do not divide its 8 groups"),
        (TwoLevelPrototypeConv2d(8, 8, 3, groups=4), 8, "8 ranks do not divide its 4 groups"),
        (ShuffleConv2d(8, 8, 3, groups=4), 8, "8 ranks do not divide its 4 groups"),
        *(
            (layer, 4, "4 ranks do not divide its channels, or its weight is computed")
            for layer in (
                nn.Conv2d(12, 8, 3, groups=2),
                nn.Conv2d(6, 6, 3),
                nn.ConvTranspose2d(6, 6, 3),
                nn.BatchNorm2d(6),
                nn.GroupNorm(2, 6),
                nn.LayerNorm([6, 8, 8]),
                nn.Linear(6, 10),
            )
        ),
    ],
    ids=str,
)
def test_what_the_ranks_do_not_divide_is_whole(layer: nn.Module, ranks: int, reason: str) -> None:
    assert plan(_network(layer), ranks)["1"] == Placement("whole", reason=reason)


@pytest.mark.parametrize(
    ("layer", "placement"),
    [
        (nn.Conv2d(6, 8, 3), Placement("column", NORM)),
        (nn.Conv2d(8, 6, 3), Placement("row", {"weight": 1})),
        (nn.Linear(6, 8), Placement("column", NORM)),
        (nn.Linear(8, 6), Placement("row", {"weight": 1})),
        (nn.ConvTranspose2d(8, 6, 3), Placement("row", {"weight": 0})),
        (nn.ConvTranspose2d(6, 8, 3), Placement("column", {"weight": 1, "bias": 0})),
    ],
    ids=str,
)
def test_where_they_divide_one_side_that_one_is_cut(layer: nn.Module, placement: Placement) -> None:
    assert plan(_network(layer), 4)["1"] == placement


@pytest.mark.parametrize("ranks", [3, 8])
def test_of_a_network_all_is_cut_that_the_ranks_divide(ranks: int) -> None:
    placements = plan(create_model("wrn-10-2", groups=4, device="meta"), ranks)
    whole = {name.rpartition(".")[2] for name, placement in placements.items() if placement.kind == "whole"}
    two_level = {"conv1", "conv2", "shortcut"}
    assert whole == (two_level if ranks == 8 else {*two_level, "bn1", "bn2", "bn", "head"})
    assert placements["stem"] == (Placement("column", {"weight": 0}) if ranks == 8 else Placement("row", {"weight": 1}))


@pytest.mark.parametrize("ranks", [0, -2, 2.0, True, "2"])
def test_ranks_that_are_no_count_are_refused(ranks: Any) -> None:
    with pytest.raises(UsageError, match=f"^tensor_parallel must be a number of ranks, got {ranks!r}; use 1 or more$"):
        plan(_network(), ranks)


def test_lazy_layers_are_refused_by_name() -> None:
    with pytest.raises(
        UsageError, match=r"^1\.weight must have a shape, got none yet; run one batch through the model first$"
    ):
        plan(_network(nn.LazyConv2d(8, 3)), 2)
    with pytest.raises(UsageError, match=r"^1\.weight must have a shape, got none yet"):
        plan(_network(nn.LazyBatchNorm2d()), 2)


@pytest.mark.parametrize(
    ("layer", "placement"),
    [
        (nn.GroupNorm(2, 8), Placement("channels", NORM)),
        (nn.LayerNorm([8, 6, 6]), Placement("channels", NORM)),
        (nn.LayerNorm(6), Placement("channels", NORM)),
        (nn.LayerNorm([8, 6, 6], bias=False), Placement("channels", {"weight": 0})),
        (nn.InstanceNorm2d(8, affine=True), Placement("channels", NORM)),
        (nn.SyncBatchNorm(8), Placement("synchronized", {**NORM, **STATISTICS})),
        (nn.PReLU(8), Placement("channels", {"weight": 0})),
        (nn.PReLU(), Placement("whole", reason="no rule for a PReLU")),
        (nn.Conv1d(8, 10, 3), Placement("column", NORM)),
        (nn.Conv3d(8, 8, 3), Placement("row", {"weight": 1})),
        (nn.Conv2d(12, 9, 3, groups=3), Placement("row", {"weight": 1})),
        (nn.ConvTranspose2d(8, 10, 3), Placement("column", {"weight": 1, "bias": 0})),
        (nn.ConvTranspose2d(8, 8, 3), Placement("row", {"weight": 0})),
        (nn.ConvTranspose2d(8, 8, 3, groups=2, bias=False), Placement("grouped", {"weight": 0})),
        (nn.Embedding(8, 8), Placement("whole", reason="no rule for a Embedding")),
        (
            FullyLearnableGroupConv2d(8, 8, 3, groups=2),
            Placement("whole", reason="its groups are learned, and any filter may come to read any channel"),
        ),
    ],
    ids=str,
)
def test_other_layers_with_parameters(layer: nn.Module, placement: Placement) -> None:
    assert plan(_network(layer), 2)["1"] == placement


@pytest.mark.parametrize(
    "layer",
    [
        nn.LayerNorm(8, elementwise_affine=False),
        nn.InstanceNorm2d(8),
        nn.LocalResponseNorm(3),
        nn.ChannelShuffle(2),
        nn.PixelShuffle(2),
        nn.Softmax2d(),
        nn.Dropout2d(),
        nn.AlphaDropout(),
        nn.RReLU(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_that_hold_nothing_need_no_place(layer: nn.Module) -> None:
    assert plan(_network(layer), 2) == {
        "0": Placement("column", NORM),
        "3": Placement("row", {"weight": 1}),
    }


def test_of_two_linear_layers_the_first_is_cut_by_outputs_and_the_second_by_inputs() -> None:
    placements = plan(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(8, 32), nn.Linear(32, 10)), 2)
    assert placements["2"] == Placement("column", NORM)
    assert placements["3"] == Placement("row", {"weight": 1})


def test_a_second_linear_layer_with_a_forward_of_its_own_is_held_like_any() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert plan(_network(Scaled(8, 8)), 2)["1"] == Placement("row", {"weight": 1})


@pytest.mark.parametrize("place", [0, -1])
def test_dropout_may_stand_anywhere(place: int) -> None:
    layers = [nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(8, 10)]
    layers.insert(place % 4, nn.Dropout())
    assert plan(nn.Sequential(*layers), 2)[str(place % 4)] == Placement("dropout")


def test_a_grouped_stem() -> None:
    stem = nn.Conv2d(3, 6, 3, groups=3)
    model = nn.Sequential(stem, nn.Flatten(), nn.Linear(6, 10))
    assert plan(model, 3)["0"] == Placement("grouped", NORM)
    assert plan(model, 2)["0"].kind == "whole"


@pytest.mark.parametrize(("layer", "name"), [(nn.GroupNorm(2, 8), "channels"), (nn.Bilinear(2, 2, 2), "whole")])
def test_a_model_that_is_one_layer(layer: nn.Module, name: str) -> None:
    placements = plan(layer, 2)
    assert list(placements) == [""]
    assert placements[""].kind == name


def test_tied_parameters_are_cut_where_both_layers_cut_them_alike() -> None:
    first, second = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
    second.weight = first.weight
    placements = plan(_network(first, second), 2)
    assert placements["1"] == placements["2"] == Placement("row", {"weight": 1})


def test_tied_parameters_that_layers_hold_in_two_ways_are_whole() -> None:
    embedding, head = nn.Embedding(10, 8), nn.Linear(8, 10)
    head.weight = embedding.weight
    placements = plan(nn.ModuleList([embedding, nn.Linear(8, 8), head]), 2)
    assert placements["0"].dims == {}
    assert placements["2"] == Placement("column", {"bias": 0}, "weight is tied to another layer's")


def test_a_two_level_layer_with_a_parameter_that_is_whole_elsewhere_is_whole() -> None:
    layer = TwoLevelConv2d(8, 8, 3, groups=2)
    assert plan(nn.ModuleList([layer]), 2)["0"].kind == "two-level"
    placements = plan(nn.ModuleList([layer, nn.ParameterList([layer.restriction])]), 2)
    assert placements["0"] == Placement("whole", reason="restriction is tied to another layer's")


def test_networks_whose_code_leaves_channels_apart_gather_dense_convolutions() -> None:
    placements = plan(create_model("wrn-10-2", conv="sc", device="meta"), 4)
    kinds = {name.rpartition(".")[2]: placement.kind for name, placement in placements.items()}
    assert kinds["stem"] == "column"
    assert {kinds[name] for name in ("conv1", "conv2", "shortcut")} == {"gathered"}
    inside = plan(nn.Sequential(create_model("wrn-10-2", conv="sc", device="meta")), 4)
    assert {placement.kind for placement in inside.values()} == {"column", "channels", "row"}
