"""How fast ranks send to one another: what two of them measure for ``tlgc-mp plan --calibrate``."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypedDict

from tlgc_mp.bench.ranks.launch import Request

if TYPE_CHECKING:
    import torch

ELEMENTS, REPEATS = 1 << 21, 10
"""Of the all-reduce that measures a link, in float32."""


class LinkFigures(TypedDict):
    """What a rank sends in a ring, and how long a message takes."""

    bytes_per_second: float
    latency_seconds: float


@dataclass(frozen=True)
class LinkRequest(Request[LinkFigures]):
    """What the ranks are asked."""

    measured_by: ClassVar[str] = "tlgc_mp.planner.link:measure_link"


def measure_link(request: LinkRequest, device: torch.device) -> LinkFigures:
    """Of this rank. Collective."""
    import torch
    import torch.distributed as dist

    ranks = dist.get_world_size()
    best: dict[int, float] = {}
    for elements in (1, ELEMENTS):
        tensor = torch.ones(elements, device=device)
        for _ in range(REPEATS):
            dist.all_reduce(tensor)  # after which all are here
            began = time.perf_counter()
            dist.all_reduce(tensor)
            tensor[:1].item()  # has arrived, on an accelerator too
            best[elements] = min(best.get(elements, float("inf")), time.perf_counter() - began)
    sent = 2 * (ranks - 1) / ranks * 4 * ELEMENTS
    latency = best[1] / (2 * (ranks - 1))
    return {"bytes_per_second": sent / max(best[ELEMENTS] - best[1], 1e-9), "latency_seconds": latency}
