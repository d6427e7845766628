"""Tensor parallelism for convolutions: two-level group convolution inside a DeepSpeed engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlgc_mp import lazy
from tlgc_mp.errors import UsageError

if TYPE_CHECKING:
    from tlgc_mp.models import convert, create_model
    from tlgc_mp.parallel import initialize, shard

__version__ = "0.1.0"
__all__ = ["UsageError", "convert", "create_model", "initialize", "shard"]

__getattr__ = lazy.attributes(
    __name__,
    {
        "convert": "tlgc_mp.models",
        "create_model": "tlgc_mp.models",
        "initialize": "tlgc_mp.parallel",
        "shard": "tlgc_mp.parallel",
    },
)
