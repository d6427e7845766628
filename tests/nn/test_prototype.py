"""TwoLevelPrototypeConv2d is Equation (3.2): restriction, a dense 1x1 convolution, one output channel a group
prolonged.

The reference takes the three steps one after the other, with torch's own convolutions, in float64.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tlgc_mp.nn import TwoLevelPrototypeConv2d
from tlgc_mp.nn.two_level import COARSE_MODES


def step_by_step(layer: TwoLevelPrototypeConv2d, x: Tensor) -> Tensor:
    groups = layer.groups
    fine = F.conv2d(x, layer.weight, layer.bias, stride=2, padding=1, groups=groups)
    representatives = F.conv2d(x, layer.restriction, stride=2, padding=1, groups=groups)
    if layer.coarse_sum:
        representatives = representatives.unflatten(1, (groups, -1)).sum(1)
    coarse = F.conv2d(representatives, layer.coarse[:, :, None, None])
    return fine + F.conv2d(coarse, layer.spread.view(layer.out_channels, -1, 1, 1), groups=groups)


@pytest.mark.parametrize("mode", COARSE_MODES)
@pytest.mark.parametrize(("count", "summed"), [(1, False), (1, True), (2, False), (3, True)])
@pytest.mark.parametrize(("n", "m", "groups"), [(4, 6, 1), (4, 6, 2), (8, 4, 4), (6, 12, 3)])
def test_output_and_gradients(n: int, m: int, groups: int, count: int, summed: bool, mode: str) -> None:
    torch.manual_seed(n + m + groups)
    layer = TwoLevelPrototypeConv2d(
        *(n, m, 3),
        stride=2,
        padding=1,
        groups=groups,
        bias=True,
        dtype=torch.float64,
        coarse_channels=count,
        coarse_sum=summed,
    )
    layer.coarse_mode = mode
    for param in layer.parameters():
        nn.init.normal_(param)
    x = torch.randn(2, n, 6, 5, dtype=torch.float64, requires_grad=True)
    inputs = {"input": x, **dict(layer.named_parameters())}
    assert set(inputs) == {"input", "weight", "restriction", "coarse", "spread", "bias"}
    expected, actual = step_by_step(layer, x), layer(x)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(expected)
    for name, got, want in zip(
        inputs,
        torch.autograd.grad(actual, inputs.values(), cotangent),
        torch.autograd.grad(expected, inputs.values(), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("count", [1, 3])
def test_its_coarse_level_has_n_squared_and_m_parameters(count: int) -> None:
    layer = TwoLevelPrototypeConv2d(8, 12, 3, groups=4, device="meta", coarse_channels=count)
    coarse = count * 9 * 8 + (count * 4) ** 2 + count * 12
    assert sum(param.numel() for param in layer.parameters()) == 9 * 8 * 12 // 4 + coarse
