"""MobileNetV2: torchvision's network, but for its 1x1 convolutions."""

from __future__ import annotations

import pytest
import torch
import torchvision.models
from torch import nn

from tlgc_mp import create_model
from tlgc_mp.models.mobilenet_v2 import LAST
from tlgc_mp.nn import TwoLevelConv2d

POINTWISE = 34
"""Two of each of 17 blocks, but one of the first, and the last one."""


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if not list(module.children())}


@pytest.fixture(scope="module")
def original() -> nn.Module:
    with torch.device("meta"):
        return torchvision.models.mobilenet_v2(weights=None)


@pytest.mark.parametrize(
    ("conv", "groups", "everywhere"),
    [("sc", 1, False), ("gc", 4, False), ("gc-2l", 4, False), ("gc-2l", 4, True), ("gc-2l", 1, True)],
)
def test_every_pointwise_convolution_is_replaced_and_nothing_else(
    original: nn.Module, conv: str, groups: int, everywhere: bool
) -> None:
    found = layers(create_model("mobilenet_v2", conv=conv, groups=groups, coarse_everywhere=everywhere, device="meta"))
    expected = layers(original)
    assert list(found) == list(expected)
    pointwise = [name for name, m in expected.items() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    assert len(pointwise) == POINTWISE and pointwise[-1] == LAST
    for name, module in expected.items():
        layer = found[name]
        if name not in pointwise:
            assert repr(layer) == repr(module), name
            continue
        two_level = conv == "gc-2l" and (everywhere or name != LAST)
        assert type(layer) is (TwoLevelConv2d if two_level else nn.Conv2d), name
        for key in ("in_channels", "out_channels", "kernel_size", "stride", "padding"):
            assert getattr(layer, key) == getattr(module, key), f"{name}.{key}"
        assert (layer.groups, layer.bias) == (groups, None), name


def test_dense_weights_are_torchvisions_to_load() -> None:
    torch.manual_seed(1)
    model = create_model("mobilenet_v2", conv="sc").double()
    other = torchvision.models.mobilenet_v2(weights=None).double()
    other.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 64, 48, dtype=torch.float64)
    for mode in (False, True):
        model.train(mode)
        other.train(mode)
        logits = []
        for network in (model, other):
            torch.manual_seed(2)  # of the dropout
            logits.append(network(images))
        assert logits[0].abs().max() > 1e-3
        torch.testing.assert_close(logits[0], logits[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize(("conv", "groups"), [("sc", 1), ("gc", 8), ("gc-2l", 8)])
def test_small_images(conv: str, groups: int, size: int) -> None:
    torch.manual_seed(1)
    model = create_model("mobilenet_v2", conv=conv, groups=groups, num_classes=7)
    logits = model(torch.randn(2, 3, size, size))
    logits.sum().backward()
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()
    assert all(param.grad is not None and param.grad.isfinite().all() for param in model.parameters())


def test_weights_are_drawn_as_those_of_every_model() -> None:
    """He initialization with the fan of one group where it is asked for, and not torchvision's own."""
    torch.manual_seed(1)
    state = create_model("mobilenet_v2", groups=4, coarse_init="he").state_dict()
    torch.manual_seed(1)
    again = create_model("mobilenet_v2", groups=4, coarse_init="he").state_dict()
    assert all(torch.equal(state[key], again[key]) for key in state)
    for key, fan_in in {
        f"{LAST}.weight": 320 // 4,
        "features.17.conv.0.0.weight": 160 // 4,
        "features.17.conv.2.prolongation": 4,
        "features.17.conv.1.0.weight": 9,
    }.items():
        assert state[key].std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05), key
    assert state["classifier.1.weight"].std().item() == pytest.approx(1280**-0.5, rel=0.05)


def test_filters_are_channels_last() -> None:
    weight = create_model("mobilenet_v2", groups=4).get_submodule("features.0.0").weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
