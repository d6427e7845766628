"""Checkpoints that load at any split over ranks and any ZeRO stage, and are whole or not there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlgc_mp import lazy

if TYPE_CHECKING:
    from tlgc_mp.checkpoint.saver import CheckpointSaver, SaveError, load_checkpoint, save_checkpoint

__all__ = ["CheckpointSaver", "SaveError", "load_checkpoint", "save_checkpoint"]

__getattr__ = lazy.attributes(__name__, dict.fromkeys(__all__, "tlgc_mp.checkpoint.saver"))
