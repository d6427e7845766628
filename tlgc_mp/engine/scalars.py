"""Parameters of shape (), such as a gain: what DeepSpeed does with each parameter takes a dimension in two places."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tlgc_mp.engine.protocols import Engine
from tlgc_mp.parallel.signatures import Args


class ScalarsAsBytes(TorchFunctionMode):
    """A context in which a tensor of shape () can be viewed as bytes, as DeepSpeed views what it broadcasts."""

    def __torch_function__(
        self,
        function: Callable[..., object],
        types: object,
        args: Args = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if function is torch.Tensor.view and args[1:] == (torch.uint8,) and args[0].dim() == 0:
            args = (args[0].view(1), torch.uint8)
        return function(*args, **(kwargs or {}))


def clip_scalars_too(engine: Engine) -> None:
    """Has ``engine`` clip gradients of shape () without ZeRO, where it multiplies each in place by a tensor of one."""
    scalars = [param for param in engine.module.parameters() if param.dim() == 0]
    clip = engine.clip_fp32_gradients
    if scalars:
        engine.clip_fp32_gradients = lambda: _with_a_dimension(scalars, clip)


def _with_a_dimension(scalars: list[nn.Parameter], clip: Callable[[], None]) -> None:
    gradients = [param.grad for param in scalars if param.grad is not None]
    for gradient in gradients:
        gradient.data = gradient.data.view(1)
    try:
        clip()
    finally:
        for gradient in gradients:
            gradient.data = gradient.data.view(())
