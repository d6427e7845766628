"""ShuffleConv2d is a group convolution followed by ShuffleNet's permutation of its output channels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tlgc_mp.errors import UsageError
from tlgc_mp.nn import ShuffleConv2d

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def test_channel_g_k_moves_to_place_k_g_as_shufflenet_draws_it() -> None:
    layer = ShuffleConv2d(6, 6, 1, groups=3)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2).repeat(3, 1).view(6, 2, 1, 1))  # the group convolution hands its input on
    x = torch.arange(6.0).view(1, 6, 1, 1)
    assert layer(x).flatten().tolist() == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("n", "m", "groups"), [(4, 6, 1), (4, 6, 2), (8, 4, 4), (6, 12, 3), (4, 4, 4)])
def test_output_gradients_and_format(n: int, m: int, groups: int, layout: str) -> None:
    generator = torch.Generator().manual_seed(n * m)
    layer = ShuffleConv2d(n, m, 3, stride=2, padding=1, groups=groups, bias=True, dtype=torch.float64)
    x = torch.randn(2, n, 6, 5, generator=generator, dtype=torch.float64)
    x = x.contiguous(memory_format=FORMATS[layout]).requires_grad_()
    inputs = (x, layer.weight, layer.bias)
    y = layer(x)
    assert y.is_contiguous(memory_format=FORMATS[layout])

    plain = F.conv2d(x, layer.weight, layer.bias, stride=2, padding=1, groups=groups)
    moved_from = [group * (m // groups) + channel for channel in range(m // groups) for group in range(groups)]
    expected = torch.stack([plain[:, channel] for channel in moved_from], 1)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    cotangent = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    for got, want in zip(
        torch.autograd.grad(y, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UsageError, match=r"^groups must be a divisor of in_channels=8, got 3; use one of 1, 2, 4$"):
        ShuffleConv2d(8, 12, 3, groups=3)
