"""torch.compile and FakeTensor take the layer whole, without a graph break."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tlgc_mp.nn import TwoLevelConv2d
from tlgc_mp.nn.two_level import COARSE_MODES

SEED = 23


DIALS = [(1, False), (2, False), (2, True)]
"""(r, whether representatives are summed)"""


def make(coarse_mode: str, coarse_channels: int = 1, coarse_sum: bool = False) -> TwoLevelConv2d:
    dial = {"coarse_channels": coarse_channels, "coarse_sum": coarse_sum}
    layer = TwoLevelConv2d(
        8, 12, 3, stride=2, padding=1, groups=4, bias=True, dtype=torch.float64, coarse_init="he", **dial
    )
    layer.coarse_mode = coarse_mode
    return layer


@pytest.mark.parametrize("coarse_mode", COARSE_MODES)
def test_fake_tensors(coarse_mode: str) -> None:
    with FakeTensorMode():
        layer = make(coarse_mode)
        x = torch.empty(2, 8, 9, 6, dtype=torch.float64, requires_grad=True)
        x_last = x.contiguous(memory_format=torch.channels_last)
        y = layer(x_last)
        (grad,) = torch.autograd.grad(y, x_last, torch.empty_like(y))
    assert (y.shape, y.dtype) == ((2, 12, 5, 3), torch.float64)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert (grad.shape, grad.dtype) == (x.shape, torch.float64)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("coarse_mode", COARSE_MODES)
@pytest.mark.parametrize("dial", DIALS)
def test_compiled_layer_is_the_eager_one(
    dial: tuple[int, bool], coarse_mode: str, memory_format: torch.memory_format
) -> None:
    torch.manual_seed(SEED)
    layer = make(coarse_mode, *dial)
    x = torch.randn(2, 8, 9, 6, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    names = ["input", *(name for name, _ in layer.named_parameters())]
    inputs = [x, *layer.parameters()]
    expected = layer(x)
    cotangent = torch.randn(expected.shape, dtype=torch.float64)
    expected_grads = torch.autograd.grad(expected, inputs, cotangent)

    torch.compiler.reset()  # a layer of another dial is another graph, of which few are kept
    actual = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    actual_grads = torch.autograd.grad(actual, inputs, cotangent)
    assert actual.is_contiguous(memory_format=memory_format)
    for name, got, want in zip(["output", *names], (actual, *actual_grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12, msg=lambda m, name=name: f"{name}, seed {SEED}: {m}")
