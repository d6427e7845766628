"""Memory formats of filters, which an engine does not keep: it stores parameters as contiguous bytes.

The format of a filter decides that of a convolution's output, and with it the order in which a dropout after it draws.
So a model whose filters are channels_last gets outputs in that format whether ZeRO keeps its filters so or not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def channels_last_filters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of ``model`` that are laid out as channels_last tensors are, and are no contiguous ones."""
    return [p for p in model.parameters() if p.dim() == 4 and p.stride() != _strides(p) and _is_channels_last(p)]


def _strides(tensor: Tensor) -> tuple[int, ...]:
    return torch.empty(tensor.shape, device="meta").stride()


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last)


def restore(filters: list[nn.Parameter]) -> None:
    """Gives each filter its format back, in place."""
    for filter in filters:
        filter.data = filter.data.clone(memory_format=torch.channels_last).as_strided(
            filter.shape, torch.empty(filter.shape, device="meta", memory_format=torch.channels_last).stride()
        )


def follow(model: nn.Module, filters: list[nn.Parameter]) -> None:
    """Has layers whose ``filters`` lost their format give outputs in it, from inputs in it."""
    lost = {id(filter) for filter in filters}
    for module in model.modules():
        if any(id(param) in lost for param in module.parameters(recurse=False)):
            module.register_forward_pre_hook(_to_channels_last)


def _to_channels_last(module: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(
        x.contiguous(memory_format=torch.channels_last) if isinstance(x, Tensor) and x.dim() == 4 else x for x in inputs
    )
