"""Layers into whose weights torch's own fusion with BatchNorm must not go."""

from __future__ import annotations

import inspect

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from tlgc_mp.errors import UsageError


class NotFusedByTorch(nn.Module):
    """A convolution whose output channels are not those of its ``weight`` alone, or not in that order.

    :func:`torch.nn.utils.fuse_conv_bn_eval` scales nothing else, and would return another function without a word.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name == "weight":
            frame = inspect.currentframe()
            while frame is not None and frame.f_code.co_name == "__setattr__":  # of subclasses, too
                frame = frame.f_back
            if frame is not None and frame.f_code is fuse_conv_bn_eval.__code__:
                raise UsageError(
                    f"conv must be a layer whose outputs follow its weight alone, got a {type(self).__name__}; "
                    "use tlgc_mp.fold(model), which folds BatchNorm into it as well"
                )
        super().__setattr__(name, value)  # type: ignore[arg-type]
