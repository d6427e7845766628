"""Tensor parallelism for convolutions: two-level group convolution inside a DeepSpeed engine."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tlgc_mp.errors import UsageError

if TYPE_CHECKING:
    from tlgc_mp.models import create_model
    from tlgc_mp.parallel import initialize, shard

__version__ = "0.1.0"
__all__ = ["UsageError", "create_model", "initialize", "shard"]

_HOMES = {"create_model": "tlgc_mp.models", "initialize": "tlgc_mp.parallel", "shard": "tlgc_mp.parallel"}


def __getattr__(name: str) -> Any:
    """Public names load on first use: torch and deepspeed take seconds that ``tlgc-mp --help`` must not wait for."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
