"""Whether a network fits, how fast a step is, and on how many devices: found without memory and without a network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlgc_mp import lazy

if TYPE_CHECKING:
    from tlgc_mp.planner.search import plan

__all__ = ["plan"]

__getattr__ = lazy.attributes(__name__, {"plan": "tlgc_mp.planner.search"})
