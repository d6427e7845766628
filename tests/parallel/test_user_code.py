"""What users do with networks gives on a split one what it gives on one device: calls, hooks, copies, files, errors."""

from __future__ import annotations

import datetime
import warnings
from typing import Any

import pytest
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from tests.parallel import user_lifetimes, user_networks
from tests.parallel.against_one_device import difference
from tests.parallel.common import run_ranks_once
from tests.parallel.user_networks import Place
from tlgc_mp.parallel import whole

TOLERANCE = 1e-9
USES = {
    name: function
    for module in (user_networks, user_lifetimes)
    for name, function in vars(module).items()
    if name.startswith("uses_")
}


def _run_on_rank() -> dict[str, str]:
    """Name of each use -> what is wrong with it over all ranks, or nothing."""
    warnings.filterwarnings("ignore")
    votes = dist.new_group(timeout=datetime.timedelta(seconds=60))
    problems = {}
    for name, use in USES.items():
        expected = use(Place(split=False))
        try:
            problem = _compared(whole(use(Place(split=True))), expected)
        except Exception as error:
            problem = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, problem, group=votes)
        problems[name] = next((text for text in everywhere if text), "")
    return problems


def _compared(found: Any, expected: Any) -> str:
    own, theirs = tree_leaves(found), tree_leaves(expected)
    if len(own) != len(theirs):
        return f"{len(own)} results, where one device gives {len(theirs)}"
    for index, (a, b) in enumerate(zip(own, theirs, strict=True)):
        off = difference(a, b, least=1e-5)  # some gradients are zero but for rounding
        if not off <= TOLERANCE:
            return f"result {index} is off by {off:.1e}: {a!r:.80} for {b!r:.80}"
    return ""


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", USES)
def test_use(name: str, ranks: int) -> None:
    assert not run_ranks_once(ranks, _run_on_rank)[0][name]
