"""Everything that knows there is more than one rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlgc_mp import lazy

if TYPE_CHECKING:
    from tlgc_mp.parallel.engine import initialize
    from tlgc_mp.parallel.recompute import checkpoint_activations
    from tlgc_mp.parallel.sharding import gather_state_dict, shard

__all__ = ["checkpoint_activations", "gather_state_dict", "initialize", "shard"]

__getattr__ = lazy.attributes(
    __name__,
    {
        "checkpoint_activations": "tlgc_mp.parallel.recompute",
        "initialize": "tlgc_mp.parallel.engine",
        "gather_state_dict": "tlgc_mp.parallel.sharding",
        "shard": "tlgc_mp.parallel.sharding",
    },
)
