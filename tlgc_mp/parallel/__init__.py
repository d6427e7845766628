"""Everything that knows there is more than one rank. On torch alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlgc_mp import lazy

if TYPE_CHECKING:
    from tlgc_mp.parallel.clipping import clip_grad_norm_
    from tlgc_mp.parallel.report import LayoutReport, layout_report
    from tlgc_mp.parallel.sharding import gather_state_dict, shard
    from tlgc_mp.parallel.split_tensor import whole

__all__ = [
    "LayoutReport",
    "clip_grad_norm_",
    "gather_state_dict",
    "layout_report",
    "shard",
    "whole",
]

__getattr__ = lazy.attributes(
    __name__,
    {
        "clip_grad_norm_": "tlgc_mp.parallel.clipping",
        "gather_state_dict": "tlgc_mp.parallel.sharding",
        "LayoutReport": "tlgc_mp.parallel.report",
        "layout_report": "tlgc_mp.parallel.report",
        "shard": "tlgc_mp.parallel.sharding",
        "whole": "tlgc_mp.parallel.split_tensor",
    },
)
