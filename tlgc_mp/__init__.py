"""Tensor parallelism for convolutions: two-level group convolution inside a DeepSpeed engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlgc_mp import lazy
from tlgc_mp.errors import UsageError

if TYPE_CHECKING:
    from tlgc_mp.checkpoint import load_checkpoint, load_model, save_checkpoint
    from tlgc_mp.engine import checkpoint_activations, initialize
    from tlgc_mp.models import convert, create_model, fold
    from tlgc_mp.nn import TwoLevelConv1d, TwoLevelConv2d, TwoLevelConv3d
    from tlgc_mp.parallel import shard
    from tlgc_mp.planner import plan
    from tlgc_mp.training.trainer import Trainer

__version__ = "0.1.0"
__all__ = [
    "Trainer",
    "TwoLevelConv1d",
    "TwoLevelConv2d",
    "TwoLevelConv3d",
    "UsageError",
    "checkpoint_activations",
    "convert",
    "create_model",
    "fold",
    "initialize",
    "load_checkpoint",
    "load_model",
    "plan",
    "save_checkpoint",
    "shard",
]

__getattr__ = lazy.attributes(
    __name__,
    {
        "Trainer": "tlgc_mp.training.trainer",
        "TwoLevelConv1d": "tlgc_mp.nn",
        "TwoLevelConv2d": "tlgc_mp.nn",
        "TwoLevelConv3d": "tlgc_mp.nn",
        "checkpoint_activations": "tlgc_mp.engine",
        "convert": "tlgc_mp.models",
        "create_model": "tlgc_mp.models",
        "fold": "tlgc_mp.models",
        "initialize": "tlgc_mp.engine",
        "load_checkpoint": "tlgc_mp.checkpoint",
        "load_model": "tlgc_mp.checkpoint",
        "plan": "tlgc_mp.planner",
        "save_checkpoint": "tlgc_mp.checkpoint",
        "shard": "tlgc_mp.parallel",
    },
)
