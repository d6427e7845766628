"""Memory formats of filters, which an engine does not keep: it stores parameters as contiguous bytes.

The format of a filter decides that of a convolution's output, and with it the order in which a dropout after it draws.
So a model whose filters are channels_last gets outputs in that format whether ZeRO keeps its filters so or not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tlgc_mp.nn.window import channels_last_of, memory_format_of


def channels_last_filters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of ``model`` that are laid out as channels_last tensors are, and are no contiguous ones."""
    return [p for p in model.parameters() if p.dim() in (4, 5) and p.stride() != _strides(p) and _is_channels_last(p)]


def _strides(tensor: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> tuple[int, ...]:
    return torch.empty(tensor.shape, device="meta", memory_format=memory_format).stride()


def _is_channels_last(tensor: Tensor) -> bool:
    return memory_format_of(tensor) == channels_last_of(tensor)


def restore(filters: list[nn.Parameter]) -> None:
    """Gives each filter its format back, in place."""
    for filter in filters:
        last = channels_last_of(filter)
        filter.data = filter.data.clone(memory_format=last).as_strided(filter.shape, _strides(filter, last))


def follow(model: nn.Module, filters: list[nn.Parameter]) -> None:
    """Has layers whose ``filters`` lost their format give outputs in it, from inputs in it."""
    lost = {id(filter) for filter in filters}
    for module in model.modules():
        if any(id(param) in lost for param in module.parameters(recurse=False)):
            module.register_forward_pre_hook(_to_channels_last)


def _to_channels_last(module: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(
        x.contiguous(memory_format=channels_last_of(x)) if isinstance(x, Tensor) and x.dim() in (4, 5) else x
        for x in inputs
    )
