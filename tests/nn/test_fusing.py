"""torch's own fusion of a convolution with BatchNorm is right for a layer of this package, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

from tlgc_mp.errors import UsageError
from tlgc_mp.nn import FullyLearnableGroupConv2d, ShuffleConv2d, TwoLevelConv2d, TwoLevelPrototypeConv2d

SEED = 43


def frozen() -> nn.Module:
    """With groups of the same size, or else the weight and BatchNorm would differ in shape."""
    layer = FullyLearnableGroupConv2d(8, 12, 3, groups=4)
    with torch.no_grad():
        layer.input_selection.copy_(torch.eye(4).repeat(2, 1))
        layer.filter_selection.copy_(torch.eye(4).repeat(3, 1))
    return layer.frozen()


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "two-level": lambda: TwoLevelConv2d(8, 12, 3, groups=4, coarse_init="he"),
    "with bias": lambda: TwoLevelConv2d(8, 12, 3, groups=4, coarse_init="he", bias=True),
    "prototype": lambda: TwoLevelPrototypeConv2d(8, 12, 3, groups=4, coarse_init="he"),
    "shuffle": lambda: ShuffleConv2d(8, 12, 3, groups=4),
    "frozen": frozen,
    "learned": lambda: FullyLearnableGroupConv2d(8, 12, 3, groups=4),
}
RIGHT = {"learned"}


@pytest.mark.parametrize("kind", LAYERS)
def test_right_or_refused(kind: str) -> None:
    torch.manual_seed(SEED)
    layer, norm = LAYERS[kind]().double().eval(), nn.BatchNorm2d(12).double().eval()
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
        tensor.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    if kind in RIGHT:
        x = torch.randn(2, 8, 7, 7, dtype=torch.float64)
        torch.testing.assert_close(fuse_conv_bn_eval(layer, norm)(x), norm(layer(x)), rtol=0, atol=1e-11)
        return
    with pytest.raises(UsageError, match=r"use tlgc_mp\.fold"):
        fuse_conv_bn_eval(layer, norm)


class Watched(TwoLevelConv2d):
    """As the class of a split layer, which sees every attribute that is set."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)


def test_refused_for_a_subclass_that_sets_attributes_itself() -> None:
    layer = Watched(8, 12, 3, groups=4).eval()
    with pytest.raises(UsageError, match=r"use tlgc_mp\.fold"):
        fuse_conv_bn_eval(layer, nn.BatchNorm2d(12).eval())


def test_weights_may_be_assigned_by_anyone_else() -> None:
    layer = LAYERS["two-level"]()
    weight = nn.Parameter(torch.zeros_like(layer.weight))
    layer.weight = weight
    assert layer.weight is weight
