"""A split model in torch's DistributedDataParallel: over the replicas it trains as one device, else it is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.parallel.against_one_device import SEED
from tests.ranks import run_ranks
from tlgc_mp.errors import UsageError
from tlgc_mp.parallel import gather_state_dict, shard


def _network() -> nn.Module:
    torch.manual_seed(SEED)
    layers = [nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 5)]
    return nn.Sequential(*layers).double()


def _train(model: nn.Module, batch: slice) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = torch.Generator().manual_seed(SEED)
    for _ in range(3):
        images = torch.randn(4, 3, 6, 6, generator=data, dtype=torch.float64)
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), torch.arange(4)[batch]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()


def _over_replicas() -> tuple[dict[str, object], str]:
    rank = dist.get_rank()
    members = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    replicas = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
    assert isinstance(members, dist.ProcessGroup)
    model = shard(_network(), members)
    again = copy.deepcopy(model)
    _train(DistributedDataParallel(model, process_group=replicas), slice(2 * (rank // 2), 2 * (rank // 2) + 2))
    with pytest.raises(UsageError) as refused:
        DistributedDataParallel(nn.Sequential(nn.Identity(), again))(torch.zeros(1, 3, 6, 6, dtype=torch.float64))
    views = DistributedDataParallel(again, process_group=replicas, gradient_as_bucket_view=True)
    with pytest.raises(UsageError, match="gradient_as_bucket_view must be False of a split model, got True"):
        views(torch.zeros(1, 3, 6, 6, dtype=torch.float64))
    return gather_state_dict(model), str(refused.value)


def test_gradients_are_averaged_over_replicas_alone() -> None:
    alone = _network()
    _train(alone, slice(None))
    for rank, (state, said) in enumerate(run_ranks(4, _over_replicas)):
        for name, expected in alone.state_dict().items():
            found = state[name]
            assert isinstance(found, Tensor)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert said == (
            "process_group of DistributedDataParallel must be ranks that hold the same share, got [0, 1, 2, 3]; leave "
            f"out all but one of {[0, 1] if rank < 2 else [2, 3]}, and split the model again"
        )
