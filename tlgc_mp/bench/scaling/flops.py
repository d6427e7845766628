"""The arithmetic that a training step needs, layer by layer, from shapes alone.

It is that of the formulas, whatever an implementation makes of them: a rate taken from it does not grow with arithmetic
that somebody adds. BatchNorm, ReLU and the optimizer do not count.
"""

from __future__ import annotations

import torch
from torch import nn

from tlgc_mp.bench.settings import IMAGE_SIZE
from tlgc_mp.models import create_model


def layer_flops(
    name: str, conv: str, groups: int, batch_size: int, coarse_channels: int = 1, coarse_sum: bool = False
) -> dict[str, int]:
    """Name of each convolution and linear layer -> FLOPs of a training step over ``batch_size`` images.

    A multiplication and an addition are two. The gradients of weights and of inputs take as many as the forward pass;
    nobody asks for that of the images.

    Args:
        name, conv, groups, coarse_channels, coarse_sum: of the model, as :func:`tlgc_mp.create_model` takes them.
    """
    # Convolutions of all kinds are in the same places, and only the dense one is torch's own throughout.
    dense = create_model(name, conv="sc", device="meta")
    layers: dict[nn.Module, str] = {
        module: key for key, module in dense.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)
    }
    stem = next(iter(layers))
    flops: dict[str, int] = {}

    def count(module: nn.Module, inputs: tuple[object, ...], output: torch.Tensor) -> None:
        if isinstance(module, nn.Linear):
            needed = module.in_features * module.out_features
        else:
            assert isinstance(module, nn.Conv2d)
            shared = coarse_channels * (1 if coarse_sum else groups)
            needed = _multiplications(module, "sc" if module is stem else conv, groups, coarse_channels, shared)
        passes = 2 if module is stem else 3
        flops[layers[module]] = passes * 2 * batch_size * output.shape[2:].numel() * needed

    hooks = [module.register_forward_hook(count) for module in layers]
    with torch.no_grad():
        dense(torch.empty(2, 3, IMAGE_SIZE, IMAGE_SIZE, device="meta"))  # BatchNorm wants two
    for hook in hooks:
        hook.remove()
    missing = [key for key in layers.values() if key not in flops]
    assert not missing, f"layers that are not called as modules cannot be counted: {missing}"
    return flops


def _multiplications(dense: nn.Conv2d, conv: str, groups: int, coarse_channels: int, shared: int) -> int:
    """For one output position of one image, of a convolution of kind ``conv`` in the place of ``dense``.

    Args:
        shared: how many maps each group of a two-level convolution reads of the others.
    """
    window = dense.kernel_size[0] * dense.kernel_size[1]
    n, m = dense.in_channels, dense.out_channels
    if conv == "sc":
        return window * n * m
    fine = window * n * m // groups  # all A_k
    if conv == "bgc":
        return 2 * fine  # and all B_k
    return fine + window * n * coarse_channels + m * shared if conv == "gc-2l" else fine  # and R_0, S_k
