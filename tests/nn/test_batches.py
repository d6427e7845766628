"""An input without a batch, as torch.nn.Conv2d takes it, and an empty batch, as plain convolutions compute them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tlgc_mp.nn import BalancedConv2d, FullyLearnableGroupConv2d, ShuffleConv2d, TwoLevelConv2d, TwoLevelPrototypeConv2d
from tlgc_mp.nn.two_level import COARSE_MODES

N, GROUPS, OUT = 8, 4, 12
SHAPES = [(N, 8, 6), (0, N, 8, 6), (3, N, 8, 6)]
"""GROUPS divides the height, which would take the channels' place."""


def _two_level(mode: str, coarse_channels: int = 1, coarse_sum: bool = False) -> TwoLevelConv2d:
    dial = {"coarse_channels": coarse_channels, "coarse_sum": coarse_sum}
    layer = TwoLevelConv2d(N, OUT, 3, padding=1, stride=2, groups=GROUPS, bias=True, coarse_init="he", **dial)
    layer.coarse_mode = mode
    return layer


def _two_level_oracle(layer: Any, x: Tensor) -> Tensor:
    window = {"stride": layer.stride, "groups": GROUPS}
    fine = F.conv2d(x, layer.weight, layer.bias, padding=layer.padding, **window)
    given = F.conv2d(x, layer.restriction, None, padding=tuple(k // 2 for k in layer.coarse_kernel_size), **window)
    if layer.coarse_sum:
        given = given.unflatten(-3, (GROUPS, -1)).sum(-4)
    return fine + torch.einsum("mg,...ghw->...mhw", layer.prolongation_matrix(), given)


def _shuffle_oracle(layer: Any, x: Tensor) -> Tensor:
    y = F.conv2d(x, layer.weight, layer.bias, padding=1, groups=GROUPS)
    per = OUT // GROUPS
    return y.index_select(-3, torch.tensor([g * per + k for k in range(per) for g in range(GROUPS)]))


def _balanced_oracle(layer: Any, x: Tensor) -> Tensor:
    window = {"stride": 2, "padding": 1}
    mean = sum(x.chunk(GROUPS, -3)) / GROUPS
    return F.conv2d(x, layer.weight, layer.bias, **window, groups=GROUPS) + F.conv2d(mean, layer.mean_weight, **window)


def _learnable_oracle(layer: Any, x: Tensor) -> Tensor:
    mask = F.one_hot(layer.filter_selection.argmax(1), GROUPS) @ F.one_hot(layer.input_selection.argmax(1), GROUPS).t()
    return F.conv2d(x, layer.weight * mask[:, :, None, None], padding=1)


def _frozen() -> nn.Module:
    layer = FullyLearnableGroupConv2d(N, OUT, 3, padding=1, groups=GROUPS).double()
    frozen = layer.frozen()
    frozen.made_of = [layer]
    return frozen


LAYERS: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Tensor]]] = {
    **{
        f"{mode}, r = {count}, {'summed' if summed else 'apart'}": (
            lambda mode=mode, count=count, summed=summed: _two_level(mode, count, summed),
            _two_level_oracle,
        )
        for mode in COARSE_MODES
        for count, summed in ((1, False), (2, False), (2, True))
    },
    "another coarse kernel": (
        lambda: TwoLevelConv2d(N, OUT, 3, padding=1, groups=GROUPS, coarse_kernel_size=1, coarse_init="he"),
        _two_level_oracle,
    ),
    "prototype": (lambda: TwoLevelPrototypeConv2d(N, OUT, 3, padding=1, groups=GROUPS), _two_level_oracle),
    "shuffle": (lambda: ShuffleConv2d(N, OUT, 3, padding=1, groups=GROUPS, bias=True), _shuffle_oracle),
    "balanced": (lambda: BalancedConv2d(N, OUT, 3, 2, 1, groups=GROUPS, bias=True), _balanced_oracle),
    "learnable": (lambda: FullyLearnableGroupConv2d(N, OUT, 3, padding=1, groups=GROUPS), _learnable_oracle),
    "frozen": (_frozen, lambda layer, x: _learnable_oracle(layer.made_of[0], x)),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_output_and_gradients(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(7)
    make, oracle = LAYERS[name]
    layer = make().double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = oracle(layer, x)
    cotangent = torch.randn(expected.shape, dtype=torch.float64)
    (expected_grad,) = torch.autograd.grad(expected, x, cotangent)
    y = layer(x)
    inputs = [x, *layer.parameters()]
    grad, *others = torch.autograd.grad(y, inputs, cotangent)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12)
    assert [other.shape for other in others] == [param.shape for param in layer.parameters()]
    assert len(shape) == 3 or shape[0] or not any(other.any() for other in others)
