"""An in-place activation may follow a two-level layer, as it may follow a convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tlgc_mp.nn import TwoLevelConv2d
from tlgc_mp.nn.two_level import COARSE_MODES

SEED = 31


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("coarse_mode", COARSE_MODES)
def test_in_place_relu(coarse_mode: str, bias: bool, kernel_size: int, memory_format: torch.memory_format) -> None:
    torch.manual_seed(SEED)
    layer = TwoLevelConv2d(8, 12, kernel_size, groups=4, bias=bias, dtype=torch.float64, coarse_init="he")
    layer.coarse_mode = coarse_mode
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()

    def results(inplace: bool) -> list[Tensor]:
        y = F.relu(layer(x), inplace=inplace)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]

    for found, expected in zip(results(True), results(False), strict=True):
        assert torch.equal(found, expected), f"seed {SEED}"
