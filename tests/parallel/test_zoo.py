"""Networks of torchvision and timm, split, take the training step that one device takes, exactly."""

from __future__ import annotations

import pytest
import timm
import torch

from tests.parallel.common import run_ranks_once
from tests.parallel.zoo import _one_device, _rounding, every_third, run_on_rank
from tests.parallel.zoo_models import timm_networks, zoo
from tests.parallel.zoo_table import Result, table
from tests.ranks import run_ranks

SMALL = (
    "torchvision/googlenet",
    "torchvision/shufflenet_v2_x0_5",
    "torchvision/squeezenet1_1",
    "torchvision/lraspp_mobilenet_v3_large",
    "torchvision/mc3_18",
    "torchvision/fasterrcnn_mobilenet_v3_large_320_fpn",
    "torchvision/raft_small",
    "timm/dla46x_c",
    "timm/edgenext_xx_small",
    "timm/levit_128s",
    "timm/mobilevit_xxs",
    "timm/test_byobnet",
    "timm/test_convnext",
    "timm/test_efficientnet_evos",
    "timm/test_maxvit",
    "timm/test_nfnet",
    "timm/test_resnet",
    "timm/test_vit",
)
"""What no other of them stands for. The slow tests take all: ``mnasnet``, ``mobilenet_v3_small`` and ``resnet18``
too, whose blocks are those of ``lraspp`` and ``test_resnet``."""
NAMES = tuple(name for name, network in zoo().items() if not network.skip)
BATCH = 8


@pytest.mark.parametrize("name", SMALL)
def test_small_networks_over_two_ranks(name: str) -> None:
    _assert_right(run_ranks_once(2, run_on_rank, SMALL)[0][name])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("first", range(0, len(NAMES), BATCH))
def test_all_networks_over_two_ranks(first: int) -> None:
    for result in run_ranks(2, run_on_rank, NAMES[first : first + BATCH], timeout=3500.0)[0].values():
        _assert_right(result)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("first", range(0, len(every_third(NAMES)), BATCH))
def test_a_third_of_them_over_four_ranks(first: int) -> None:
    names = every_third(NAMES)[first : first + BATCH]
    for result in run_ranks(4, run_on_rank, names, timeout=3500.0)[0].values():
        _assert_right(result)


def test_every_module_of_timm_is_in_the_zoo() -> None:
    assert {network.family for network in timm_networks()} == set(timm.list_modules())
    for network in timm_networks():
        assert timm.models.is_model_in_modules(network.name.removeprefix("timm/"), [network.family])


def test_rounding_on_one_device_is_small() -> None:
    """It is measured against what a step left behind, which later passes must not change."""
    network = zoo()["timm/test_resnet"]
    result = Result(network.name, network.family, 2)
    before = torch.get_default_dtype()
    try:
        step = _one_device(network, result, measure=True)
        assert 0 < _rounding(network, step) < 1e-11
    finally:
        torch.set_default_dtype(before)


def test_the_table_counts_and_names_what_did_not_run() -> None:
    networks = zoo()
    half = {"parameters": 100, "parameters_a_rank": 50, "kept": 100, "convolutional": True}
    results = [
        Result("timm/dla34", "dla", 2, worst=0.0, kept_split=50, **half),
        Result("timm/vgg11_bn", "vgg", 2, worst=0.0, kept_split=40, kept_whole=20, whole={"flip": 3}, **half),
        Result("timm/test_vit", "vision_transformer", 2, worst=0.0, parameters=100, parameters_a_rank=100),
        Result("timm/dpn48b", "dpn", 2, "outputs[0] is off by 1e-01"),
    ]
    wanted = [(result.model, 2) for result in results] + [("timm/rexnet_100", 4), ("torchvision/vit_h_14", 2)]
    text = " ".join(table(results, wanted, networks).split())
    assert "Over 2 ranks, 3 of 4 networks" in text
    assert "split in 1 of 2 convolutional networks, and in 0 of 1 others" in text
    assert "- `timm/vgg11_bn`, P = 2: flip 3" in text
    assert "- `timm/dpn48b`, P = 2: outputs[0] is off by 1e-01" in text
    assert "This table is partial: what has not run yet (1) stands at the end." in text
    assert "Not run yet over 4 ranks The same command goes on with these (1). timm/rexnet_100" in text
    assert "`torchvision/vit_h_14`: about 640 million parameters" in text


def _assert_right(result: Result) -> None:
    assert not result.reason, f"{result.model} over {result.ranks} ranks: {result.reason}"
    assert result.parameters_a_rank < result.parameters, f"nothing of {result.model} is split"
