"""Networks of torchvision and timm, split, take the training step that one device takes, exactly."""

from __future__ import annotations

import pytest
import timm

from tests.parallel.common import run_ranks_once
from tests.parallel.zoo import IN_EVERY_THIRD, Result, run_on_rank
from tests.parallel.zoo_models import timm_networks, zoo
from tests.ranks import run_ranks

SMALL = (
    "torchvision/googlenet",
    "torchvision/mnasnet0_5",
    "torchvision/mobilenet_v3_small",
    "torchvision/resnet18",
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
NAMES = tuple(zoo())
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
@pytest.mark.parametrize("first", range(0, len(NAMES[::IN_EVERY_THIRD]), BATCH))
def test_a_third_of_them_over_four_ranks(first: int) -> None:
    names = NAMES[::IN_EVERY_THIRD][first : first + BATCH]
    for result in run_ranks(4, run_on_rank, names, timeout=3500.0)[0].values():
        _assert_right(result)


def test_every_module_of_timm_is_in_the_zoo() -> None:
    assert {network.family for network in timm_networks()} == set(timm.list_modules())
    for network in timm_networks():
        assert timm.models.is_model_in_modules(network.name.removeprefix("timm/"), [network.family])


def _assert_right(result: Result) -> None:
    assert not result.reason, f"{result.model} over {result.ranks} ranks: {result.reason}"
    assert result.parameters_a_rank < result.parameters, f"nothing of {result.model} is split"
