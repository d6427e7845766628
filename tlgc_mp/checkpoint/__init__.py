"""Checkpoints that load at any split over ranks and any ZeRO stage, and are whole or not there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlgc_mp import lazy

if TYPE_CHECKING:
    from tlgc_mp.checkpoint.loader import load_checkpoint
    from tlgc_mp.checkpoint.offline import export_checkpoint, load_model, reshard_checkpoint
    from tlgc_mp.checkpoint.saver import CheckpointSaver, SaveError, save_checkpoint

_OFFLINE = ("export_checkpoint", "load_model", "reshard_checkpoint")
_SAVED = ("CheckpointSaver", "SaveError", "save_checkpoint")
__all__ = [
    "CheckpointSaver",
    "SaveError",
    "export_checkpoint",
    "load_checkpoint",
    "load_model",
    "reshard_checkpoint",
    "save_checkpoint",
]

__getattr__ = lazy.attributes(
    __name__,
    {
        "load_checkpoint": "tlgc_mp.checkpoint.loader",
        **dict.fromkeys(_SAVED, "tlgc_mp.checkpoint.saver"),
        **dict.fromkeys(_OFFLINE, "tlgc_mp.checkpoint.offline"),
    },
)
