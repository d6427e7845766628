"""Everything that knows DeepSpeed: its engine around a split model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlgc_mp import lazy

if TYPE_CHECKING:
    from tlgc_mp.engine.initialization import initialize
    from tlgc_mp.engine.recompute import checkpoint_activations

__all__ = ["checkpoint_activations", "initialize"]

__getattr__ = lazy.attributes(
    __name__,
    {
        "checkpoint_activations": "tlgc_mp.engine.recompute",
        "initialize": "tlgc_mp.engine.initialization",
    },
)
