"""BalancedConv2d is y_k = A_k x_k + B_k (x_1 + ... + x_N) / N.

The reference writes the dense filters out, block by block, and lets torch's dense convolution take them, in float64.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tlgc_mp.errors import UsageError
from tlgc_mp.nn import BalancedConv2d, TwoLevelConv2d, init_parameters

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def dense_filters(layer: BalancedConv2d) -> Tensor:
    rows = []
    by_group = (filters.chunk(layer.groups) for filters in (layer.weight, layer.mean_weight))
    for k, (own, of_mean) in enumerate(zip(*by_group, strict=True)):
        blocks = [of_mean / layer.groups + (own if j == k else 0) for j in range(layer.groups)]
        rows.append(torch.cat(blocks, 1))
    return torch.cat(rows)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("n", "m", "groups"), [(4, 6, 1), (4, 6, 2), (8, 4, 4), (6, 12, 3), (4, 4, 4)])
def test_output_gradients_and_format(n: int, m: int, groups: int, layout: str) -> None:
    generator = torch.Generator().manual_seed(n * m)
    layer = BalancedConv2d(n, m, 3, stride=2, padding=(1, 2), groups=groups, bias=True, dtype=torch.float64)
    x = torch.randn(2, n, 6, 5, generator=generator, dtype=torch.float64)
    x = x.contiguous(memory_format=FORMATS[layout]).requires_grad_()
    inputs = (x, *layer.parameters())
    y = layer(x)
    assert y.is_contiguous(memory_format=FORMATS[layout])
    expected = F.conv2d(x, dense_filters(layer), layer.bias, stride=2, padding=(1, 2))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    for got, want in zip(
        torch.autograd.grad(y, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_of_1x1_filters_it_is_a_two_level_layer_whose_representatives_are_summed() -> None:
    torch.manual_seed(12)
    balanced = BalancedConv2d(12, 8, 1, groups=4, dtype=torch.float64)
    two_level = TwoLevelConv2d(12, 8, 1, groups=4, dtype=torch.float64, coarse_channels=3, coarse_sum=True)
    with torch.no_grad():
        two_level.weight.copy_(balanced.weight)
        two_level.restriction.copy_(torch.eye(3).repeat(4, 1)[:, :, None, None] / 4)
        two_level.prolongation.copy_(balanced.mean_weight.flatten(1))
    x = torch.randn(2, 12, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(two_level(x), balanced(x), rtol=1e-12, atol=1e-12)


def test_it_has_twice_the_filters_and_their_initial_spread() -> None:
    layer = BalancedConv2d(128, 256, 3, groups=4, device="meta")
    assert {name: tuple(param.shape) for name, param in layer.named_parameters()} == {
        "weight": (256, 32, 3, 3),
        "mean_weight": (256, 32, 3, 3),
    }
    layer = layer.to_empty(device="cpu")
    for draw in (layer.reset_parameters, lambda: init_parameters(layer, 5)):
        draw()
        for param in layer.parameters():
            assert param.std().item() == pytest.approx((2 / (9 * 32)) ** 0.5, rel=0.02)
        assert not torch.equal(layer.weight, layer.mean_weight)


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UsageError, match=r"^groups must be a divisor of in_channels=8, got 3; use one of 1, 2, 4$"):
        BalancedConv2d(8, 12, 3, groups=3)
