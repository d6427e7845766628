"""Ranks that do not come to a collective: the others say so, by name and in bounded time."""

from __future__ import annotations

import copy
import datetime
import math
import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.parallel.common import run_ranks_once, smooth_network
from tlgc_mp.engine import initialize
from tlgc_mp.errors import UsageError
from tlgc_mp.parallel import collectives, shard
from tlgc_mp.parallel.exchange import CoarseExchange
from tlgc_mp.parallel.layout import Ranks
from tlgc_mp.parallel.waiting import GRACE_SECONDS, MissingRankError, as_timeout

TIMEOUT = 2.0
SLACK = 4.0
"""Of a busy machine, in seconds."""


def _group() -> Any:
    return dist.new_group(timeout=datetime.timedelta(seconds=TIMEOUT))


def _outcome(function: Any) -> tuple[str, float]:
    """What ``function`` raised, or "", and how long it took."""
    begun = time.monotonic()
    try:
        function()
    except MissingRankError as error:
        return str(error), time.monotonic() - begun
    return "", time.monotonic() - begun


def _evaluates_alone() -> dict[str, Any]:
    """Rank 0 alone evaluates a split model; then rank 1 calls it, too late."""
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4))
    networks = {
        "dense": shard(copy.deepcopy(whole).eval(), timeout=TIMEOUT),
        "two-level": shard(smooth_network("cpu").eval(), timeout=datetime.timedelta(seconds=TIMEOUT)),
    }
    config = {"train_batch_size": 2, "tensor_parallel": {"autotp_size": 2}}
    engine, *_ = initialize(model=copy.deepcopy(whole), config=config, collective_timeout=TIMEOUT)
    networks["engine"] = engine
    engine.eval()
    images = torch.ones(2, 3, 8, 8)
    found: dict[str, Any] = {}
    for name, network in networks.items():
        with torch.no_grad():
            before = network(images)
        alone: tuple[str, float] = "", 0.0
        if dist.get_rank() == 0:
            alone = _outcome(lambda network=network: network(images))
        total = torch.ones(1)
        dist.all_reduce(total)  # what rank 1 does meanwhile goes on
        late = _outcome(lambda network=network: network(images)) if dist.get_rank() == 1 else ("", 0.0)
        dist.barrier()
        found[name] = alone, late, before.shape, total.item()
    return found


def test_a_rank_that_evaluates_alone_is_told_who_is_missing() -> None:
    ranks = run_ranks_once(2, _evaluates_alone)
    for name in ("dense", "two-level", "engine"):
        (message, seconds), _, shape, total = ranks[0][name]
        assert message.startswith("rank 1 did not take part in "), name
        assert "must run the model" in message
        assert TIMEOUT * 0.9 < seconds < TIMEOUT + GRACE_SECONDS + SLACK
        assert (shape[0], total) == (2, 2.0)
        assert ranks[1][name][0] == ("", 0.0)


def test_the_rank_that_comes_too_late_is_told_the_same() -> None:
    first, second = run_ranks_once(2, _evaluates_alone)
    for name in ("dense", "two-level", "engine"):
        message, seconds = second[name][1]
        assert message == first[name][0][0]
        assert seconds < SLACK


def _two_of_four() -> dict[str, tuple[str, float]]:
    rank, world = dist.get_rank(), dist.get_world_size()
    operations = {
        "all_reduce": lambda ranks: collectives.all_reduce(torch.ones(3), ranks),
        "coarse_gather": lambda ranks: collectives.coarse_gather(torch.ones(3, 2), world, ranks.group_name),
        **{
            f"coarse_reduce_scatter{where}": lambda ranks, over_network=over_network: CoarseExchange(
                world, ranks.group_name, over_network
            ).backward(torch.ones(world, 3))()
            for where, over_network in (("", False), (" between hosts", True))
        },
        "exchange_channels": lambda ranks: collectives.exchange_channels(
            torch.ones(world, 2), [1] * world, [1] * world, ranks.group_name
        ),
    }
    found = {}
    groups = [Ranks(_group()) for _ in operations]
    for (name, operation), ranks in zip(operations.items(), groups, strict=True):
        operation(ranks)
        if rank in (0, 2):
            time.sleep(0.3 * rank)
            found[name] = _outcome(lambda operation=operation, ranks=ranks: operation(ranks))
        dist.barrier()
    return found


def test_all_kinds_of_collectives_name_all_ranks_that_are_missing() -> None:
    ranks = run_ranks_once(4, _two_of_four)
    for rank in (0, 2):
        assert len(ranks[rank]) == 5
        for name, (message, seconds) in ranks[rank].items():
            assert message.startswith(f"ranks 1, 3 did not take part in {name.split()[0]} within "), message
            assert seconds < TIMEOUT + GRACE_SECONDS + SLACK


def _different_collectives() -> str:
    ranks = Ranks(_group())
    collectives.all_reduce(torch.ones(1), ranks)
    if dist.get_rank() == 0:
        return _outcome(lambda: collectives.all_gather(torch.ones(4096), ranks))[0]
    return _outcome(lambda: collectives.reduce_scatter(torch.ones(2, 4096), ranks))[0]


def test_ranks_in_different_collectives_are_told_so() -> None:
    for message in run_ranks_once(2, _different_collectives):
        assert "rank 0 in all_gather (number 2), rank 1 in reduce_scatter (number 2)" in message


def _other_errors() -> list[str]:
    """What is no timeout comes through as it is, at once."""
    ranks, found = Ranks(_group()), []
    begun = time.monotonic()
    for wrong in (lambda: collectives.reduce_scatter(torch.ones(3, 2), ranks), lambda: _raise(ranks)):
        try:
            wrong()
        except RuntimeError as error:
            found.append(type(error).__name__)
    assert time.monotonic() - begun < TIMEOUT
    return found


def _raise(ranks: Ranks) -> Tensor:
    with mock.patch.object(collectives, "_comm", return_value=mock.Mock(side_effect=RuntimeError("out of memory"))):
        return collectives.all_reduce(torch.ones(1), ranks)


def test_other_errors_come_through_unchanged() -> None:
    for found in run_ranks_once(2, _other_errors):
        assert found[-1] == "RuntimeError"
        assert "MissingRankError" not in found


@pytest.mark.parametrize("value", [3, 3.0, datetime.timedelta(seconds=3)])
def test_a_timeout_is_seconds_or_a_timedelta(value: Any) -> None:
    assert as_timeout("timeout", value) == datetime.timedelta(seconds=3)


@pytest.mark.parametrize("value", [0, -1.0, True, "3", None, math.inf, math.nan, 1e300, datetime.timedelta(0)])
def test_another_timeout_is_refused(value: Any) -> None:
    with pytest.raises(UsageError, match="collective_timeout must be"):
        as_timeout("collective_timeout", value)
