"""Without its coarse level, the layer is the group convolution of its fine filters, to the bit.

Inputs and weights are small integers, so that float32 holds every partial sum exactly, and the order in which a backend
adds does not matter.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tlgc_mp.nn import TwoLevelConv2d
from tlgc_mp.nn.two_level import COARSE_MODES

SEED = 2110


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("coarse_mode", "coarse_kernel_size"), [*((mode, None) for mode in COARSE_MODES), ("overlapped", 5)]
)
@pytest.mark.parametrize("dial", [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_zero_prolongation_is_group_convolution(
    groups: int,
    dial: tuple[int, bool],
    coarse_mode: str,
    coarse_kernel_size: int | None,
    memory_format: torch.memory_format,
) -> None:
    generator = torch.Generator().manual_seed(SEED)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-4, 5, shape, generator=generator).float()

    layer = TwoLevelConv2d(
        *(16, 24, 3, 2, 1),
        groups=groups,
        bias=True,
        coarse_kernel_size=coarse_kernel_size,
        coarse_channels=dial[0],
        coarse_sum=dial[1],
    )
    layer.coarse_mode = coarse_mode
    with torch.no_grad():
        for param in layer.parameters():
            param.copy_(integers(*param.shape))
        layer.prolongation.zero_()
    x = integers(3, 16, 9, 7).to(memory_format=memory_format).requires_grad_()

    expected = F.conv2d(x, layer.weight, layer.bias, stride=2, padding=1, groups=groups)
    actual = layer(x)
    assert torch.equal(actual, expected), f"output, seed {SEED}"

    cotangent = integers(*expected.shape)
    inputs = [x, layer.weight]
    for name, got, want in zip(
        ("input", "weight"),
        torch.autograd.grad(actual, inputs, cotangent),
        torch.autograd.grad(expected, inputs, cotangent),
        strict=True,
    ):
        assert torch.equal(got, want), f"gradient of {name}, seed {SEED}"
