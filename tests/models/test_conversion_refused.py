"""What convert refuses, and that a model it refuses is left as it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from tests.models.test_conversion import Subclass, network
from tlgc_mp import UsageError, convert
from tlgc_mp.models import create_model

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"conv": "dense"}, "conv must be one of gc, gc-2l, gc-2l-proto, shuffle, flgc, bgc, got 'dense'"),
    ({"conv": "sc"}, "conv must be one of gc, gc-2l, gc-2l-proto, shuffle, flgc, bgc, got 'sc'"),
    ({"groups": 0}, "groups must be 1 or more, got 0"),
    ({"groups": 2.0}, "groups must be 1 or more, got 2.0"),
    ({"groups": True}, "groups must be 1 or more, got True"),
    ({"init": "dense"}, "init must be one of random, from_dense, got 'dense'"),
    (
        {"init": "from_dense", "conv": "shuffle"},
        "conv must be one of gc, gc-2l, bgc with init='from_dense', got 'shuffle'; use init='random'",
    ),
    ({"where": 3}, "where must be a function of (name, layer), or a pattern, got 3; use e.g. 'layer4.*'"),
    (
        {"groups": 3},
        "groups must be one of 1, 2, 4, 8, 16, 32, 64, got 3: none of its 20 convolutions can be replaced: groups=3 "
        "does not divide its channels (19 of them)",
    ),
    (
        {"where": "layer5.*"},
        "where must select layers, got 'layer5.*': none of its 20 convolutions can be replaced: not selected by where "
        "(19 of them); select names such as 'layer1.0.conv1'",
    ),
]


@pytest.mark.parametrize(("wrong", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_refusal_changes_nothing(wrong: dict[str, Any], message: str) -> None:
    model = torchvision.models.resnet18()
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError) as caught:
        convert(model, **{"groups": 2, **wrong})
    assert str(caught.value) == message
    assert_unchanged(model, modules, state)


def assert_unchanged(model: nn.Module, modules: dict[str, nn.Module], state: dict[str, Tensor]) -> None:
    found = dict(model.named_modules())
    assert found.keys() == modules.keys()
    assert all(found[name] is modules[name] for name in modules)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not hasattr(model, "conversion")


def test_weights_that_cannot_be_fitted_leave_the_model_as_it_is() -> None:
    model = network(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    with torch.no_grad():
        model[2].weight.fill_(torch.inf)
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(torch.linalg.LinAlgError):
        convert(model, groups=2, init="from_dense")
    assert_unchanged(model, modules, state)


NOTHING: dict[str, tuple[nn.Module, str]] = {
    "no convolution": (
        nn.Linear(3, 3),
        "model must have convolutions to replace, got none; give one with torch.nn.Conv2d layers",
    ),
    "only a stem": (
        network(),
        "model must have dense convolutions after the first, got others: none of its 1 convolutions can be "
        "replaced: the stem (1 of them)",
    ),
    "grouped": (
        network(nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=8), Subclass(8, 8, 3)),
        "model must have dense convolutions after the first, got others: none of its 4 convolutions can be "
        "replaced: grouped already (2 of them)",
    ),
}


@pytest.mark.parametrize(("model", "message"), NOTHING.values(), ids=NOTHING)
def test_nothing_to_replace(model: nn.Module, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        convert(model, groups=2)
    assert str(caught.value) == message


def test_the_meta_device_has_no_weights_to_fit() -> None:
    model = create_model("wrn-10-1", conv="sc", device="meta")
    with pytest.raises(
        UsageError,
        match="init must be 'random' for a model on the meta device, which holds no weights, got 'from_dense'",
    ):
        convert(model, groups=2, init="from_dense")


@pytest.mark.parametrize("arguments", [{"coarse_kernel_size": 1}, {"coarse_init": "he"}])
def test_a_fitted_coarse_level_is_not_asked_for_otherwise(arguments: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    with pytest.raises(
        UsageError,
        match="coarse_kernel_size and coarse_init must be left out with init='from_dense', which sets the coarse level",
    ):
        convert(model, groups=2, init="from_dense", **arguments)
    with pytest.raises(UsageError, match="got 'gc', which has no coarse level"):
        convert(model, groups=2, conv="gc", **arguments)
