"""Under bfloat16 autocast the layer computes in bfloat16 and keeps float32 parameters and gradients."""

import pytest
import torch

from tlgc_mp.nn import TwoLevelConv2d
from tlgc_mp.nn.two_level import COARSE_MODES

SEED = 16
TOLERANCE = 0.01
"""Of the difference's norm, relative: bfloat16 rounds by up to 2^-8 = 0.004, here two or three times in a row."""


@pytest.mark.parametrize("coarse_mode", COARSE_MODES)
def test_bfloat16_autocast(coarse_mode: str) -> None:
    torch.manual_seed(SEED)
    layer = TwoLevelConv2d(16, 24, 3, padding=1, groups=4, bias=True, coarse_init="he")
    layer.coarse_mode = coarse_mode
    assert layer.bias is not None
    torch.nn.init.normal_(layer.bias)
    names = ["input", *(name for name, _ in layer.named_parameters())]
    x = torch.randn(4, 16, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    inputs = [x, *layer.parameters()]
    expected = layer(x)
    cotangent = torch.randn(expected.shape)
    expected_grads = torch.autograd.grad(expected, inputs, cotangent)

    with torch.autocast("cpu", torch.bfloat16):
        actual = layer(x)
    assert actual.dtype == torch.bfloat16
    actual_grads = torch.autograd.grad(actual, inputs, cotangent.bfloat16(), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(actual, inputs, cotangent.bfloat16())
    assert all(torch.equal(one, other) for one, other in zip(inside, actual_grads, strict=True))

    for name, got, want in zip(
        ["output", *names], (actual.float(), *actual_grads), (expected, *expected_grads), strict=True
    ):
        assert got.dtype == torch.float32, name
        error = ((got - want).norm() / want.norm()).item()
        assert 0 < error < TOLERANCE, f"{name}: relative error {error:.4f}, seed {SEED}"
