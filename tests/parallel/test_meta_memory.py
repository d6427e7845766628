"""Splitting a model that is on the meta device: a rank never holds more than its share."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

RANKS = 4
STATUS = Path("/proc/self/status")


def _status_bytes(key: str) -> int:
    """A size that Linux keeps of this process: VmRSS is held now, VmHWM was held at most."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def _split_on_last_rank() -> dict[str, int]:
    """Splits WRN-28-80 on one rank of four that are not there; what it holds, and by how much the process grew."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from tlgc_mp import create_model
    from tlgc_mp.parallel import shard
    from tlgc_mp.parallel.plan import parameter_counts

    dist.init_process_group("fake", store=FakeStore(), rank=RANKS - 1, world_size=RANKS)
    shard(create_model("wrn-10-2", groups=RANKS, device="meta"))
    before = _status_bytes("VmRSS")
    assert _status_bytes("VmHWM") - before < 16 * 2**20, "memory of the start hides what follows"
    model = create_model("wrn-28-80", groups=RANKS, device="meta")
    planned = parameter_counts(model, RANKS)["per_rank"]
    model = shard(model)
    grown = _status_bytes("VmHWM") - before
    held = sum(param.numel() for param in model.parameters())
    return {"planned": planned, "held": held, "grown": grown, "nonzero": int(model.get_submodule("head").weight.any())}


@pytest.mark.skipif(not STATUS.exists(), reason="reads the peak memory that Linux keeps of a process")
def test_rank_holds_its_share_and_never_more() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(_split_on_last_rank).result(timeout=120)
    assert found["planned"] == found["held"]
    assert found["nonzero"]
    share_bytes = 4 * found["held"]
    assert share_bytes > 500e6
    assert 0.95 * share_bytes <= found["grown"] <= 1.10 * share_bytes
