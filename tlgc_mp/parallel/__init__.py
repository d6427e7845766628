"""Everything that knows there is more than one rank."""

from tlgc_mp.parallel.engine import initialize
from tlgc_mp.parallel.sharding import gather_state_dict, shard

__all__ = ["gather_state_dict", "initialize", "shard"]
