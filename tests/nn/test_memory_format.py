"""The memory format of the input is kept, forward and backward: channels_last from a model's first layer to its last.

A tensor in another format makes every convolution after it reorder, which costs nearly half of its speed.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import Node

from tlgc_mp.models import create_model
from tlgc_mp.nn import TwoLevelConv2d, TwoLevelConv3d
from tlgc_mp.nn.two_level import COARSE_MODES

BATCH = 7
"""Not the first dimension of any weight, so that it tells activations from weights."""


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("grad_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("weight_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("coarse_mode", COARSE_MODES)
@pytest.mark.parametrize("dial", [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_layer_keeps_the_format(
    kernel_size: int,
    dial: tuple[int, bool],
    coarse_mode: str,
    weight_format: torch.memory_format,
    grad_format: torch.memory_format,
    memory_format: torch.memory_format,
) -> None:
    layer = TwoLevelConv2d(
        *(8, 12, kernel_size), padding=1, groups=4, bias=True, coarse_channels=dial[0], coarse_sum=dial[1]
    )
    layer.to(memory_format=weight_format)  # type: ignore[call-overload]
    layer.coarse_mode = coarse_mode
    x = torch.randn(BATCH, 8, 6, 5).to(memory_format=memory_format).requires_grad_()
    y = layer(x)
    assert y.is_contiguous(memory_format=memory_format), f"output strides {y.stride()}"
    watch = Watch(memory_format)
    assert y.grad_fn is not None
    y.grad_fn.register_hook(lambda grad_inputs, _: watch.see("gradient of a convolution's output", grad_inputs))
    (grad,) = torch.autograd.grad(y, x, torch.randn(y.shape).to(memory_format=grad_format))
    watch.see("gradient of the input", (grad,))
    assert watch.count == 2
    assert not watch.wrong


@pytest.mark.parametrize("memory_format", [torch.channels_last_3d, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("weight_format", [torch.channels_last_3d, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("coarse_mode", COARSE_MODES)
@pytest.mark.parametrize("training", [True, False])
def test_layer_of_volumes_keeps_the_format(
    training: bool, coarse_mode: str, weight_format: torch.memory_format, memory_format: torch.memory_format
) -> None:
    layer = TwoLevelConv3d(8, 12, 3, padding=1, groups=4, bias=True).train(training)
    layer.to(memory_format=weight_format)  # type: ignore[call-overload]
    layer.coarse_mode = coarse_mode
    x = torch.randn(BATCH, 8, 4, 6, 5).to(memory_format=memory_format).requires_grad_()
    y = layer(x)
    assert y.is_contiguous(memory_format=memory_format), f"output strides {y.stride()}"
    (grad,) = torch.autograd.grad(y, x, torch.randn(y.shape))
    assert grad.is_contiguous(memory_format=memory_format), f"strides of the gradient {grad.stride()}"


def nodes(root: Node) -> Iterator[Node]:
    """Every step of the backward pass that starts at ``root``."""
    seen: set[Node] = set()
    ahead = [root]
    while ahead:
        node = ahead.pop()
        if node not in seen:
            seen.add(node)
            yield node
            ahead.extend(following for following, _ in node.next_functions if following is not None)


class Watch:
    """Counts the 4-D activations and gradients it is shown, and notes those in another memory format."""

    def __init__(self, memory_format: torch.memory_format) -> None:
        self.memory_format = memory_format
        self.count = 0
        self.wrong: list[str] = []

    def see(self, where: str, tensors: tuple[Tensor | None, ...]) -> None:
        for tensor in tensors:
            if tensor is not None and tensor.dim() == 4 and tensor.shape[0] == BATCH:
                self.count += 1
                if not tensor.is_contiguous(memory_format=self.memory_format):
                    self.wrong.append(f"{where}: {tuple(tensor.shape)}, strides {tensor.stride()}, {tensor.dtype}")


def watch_forward(module: nn.Module, name: str, watch: Watch) -> None:
    def see(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        watch.see(f"{name} input", inputs)
        watch.see(f"{name} output", (output,))

    module.register_forward_hook(see)


def watch_backward(node: Node, watch: Watch) -> None:
    """A hook on the node: a module's backward hooks fail before in-place ReLU, and see no step between modules."""

    def see(grad_inputs: tuple[Tensor | None, ...], grad_outputs: tuple[Tensor | None, ...]) -> None:
        watch.see(f"{node.name()} gradient of its output", grad_outputs)
        watch.see(f"{node.name()} gradient of its input", grad_inputs)

    node.register_hook(see)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("conv", "groups"), [("sc", 1), ("gc", 4), ("gc-2l", 1), ("gc-2l", 4)])
@pytest.mark.parametrize(
    ("name", "size", "layers"),
    [
        ("wrn-10-1", 16, 9 + 7),  # 9 convolutions (6 of 3x3, 2 shortcuts, the stem) and 7 BatchNorm layers
        ("mobilenet_v2", 64, 52 + 52),  # each convolution (34 of 1x1, 17 depthwise, the stem) has its BatchNorm
    ],
)
def test_model_is_channels_last_throughout(
    name: str, size: int, layers: int, conv: str, groups: int, autocast: bool
) -> None:
    torch.manual_seed(0)
    model = create_model(name, conv=conv, groups=groups)
    forward, backward = Watch(torch.channels_last), Watch(torch.channels_last)
    for module_name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | TwoLevelConv2d):
            watch_forward(module, module_name, forward)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        images = torch.randn(BATCH, 3, size, size)  # contiguous
        loss = F.cross_entropy(model(images), torch.arange(BATCH))
    assert loss.grad_fn is not None
    for node in nodes(loss.grad_fn):
        watch_backward(node, backward)
    loss.backward()

    assert forward.count == 2 * layers  # each with an input and an output
    assert not forward.wrong
    assert backward.count >= 2 * layers
    assert not backward.wrong
