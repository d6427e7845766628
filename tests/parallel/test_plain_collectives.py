"""The collectives below autograd: values of every type and memory format, shapes on the meta device, bytes sent."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.parallel.common import SEED, run_ranks_once
from tlgc_mp.parallel import collectives

TYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
]
SHAPES = [(), (5,), (2, 3, 4, 5), (3, 0, 2)]


def _inputs(ranks: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """(P, *shape): what each rank gives; numbers that are exact in every type."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(0, 5, (ranks, *shape), generator=generator).to(dtype)


def _ranks() -> Any:
    group = dist.group.WORLD
    assert group is not None
    return SimpleNamespace(size=dist.get_world_size(), rank=dist.get_rank(), group=group, group_name=group.group_name)


def _values() -> dict[Any, dict[str, Tensor]]:
    ranks = _ranks()
    found = {}
    for dtype in TYPES:
        for shape in SHAPES:
            mine = _inputs(ranks.size, shape, dtype)[ranks.rank]
            stacked = _inputs(ranks.size, (ranks.size, *shape), dtype)[ranks.rank]
            if mine.dim() == 4:
                mine = mine.contiguous(memory_format=torch.channels_last)
            before = mine.clone()
            found[dtype, shape] = {
                "gathered": collectives.all_gather(mine, ranks),
                "summed": collectives.all_reduce(mine, ranks),
                "scattered": collectives.reduce_scatter(stacked, ranks),
            }
            if not dtype.is_complex:
                found[dtype, shape]["largest"] = collectives.all_reduce(mine, ranks, dist.ReduceOp.MAX)
            assert torch.equal(mine, before)
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_values_of_every_type_and_shape(ranks: int) -> None:
    for rank, found in enumerate(run_ranks_once(ranks, _values)):
        for (dtype, shape), values in found.items():
            inputs = _inputs(ranks, shape, dtype)
            assert torch.equal(values["gathered"], inputs), (dtype, shape)
            assert torch.equal(values["summed"], inputs.sum(0).to(dtype)), (dtype, shape)
            rows = _inputs(ranks, (ranks, *shape), dtype).sum(0).to(dtype)
            assert torch.equal(values["scattered"], rows[rank]), (dtype, shape)
            if "largest" in values:
                assert torch.equal(values["largest"], inputs.amax(0)), (dtype, shape)
            if len(shape) == 4:
                assert values["summed"].is_contiguous(memory_format=torch.channels_last)


def test_on_the_meta_device_nothing_is_sent() -> None:
    ranks = SimpleNamespace(size=4, rank=1, group_name="a group that does not exist")
    share = torch.empty(2, 3, 4, 4, device="meta").contiguous(memory_format=torch.channels_last)
    gathered = collectives.all_gather(share, ranks)  # type: ignore[arg-type]
    summed = collectives.all_reduce(share, ranks)  # type: ignore[arg-type]
    row = collectives.reduce_scatter(gathered, ranks)  # type: ignore[arg-type]
    assert (gathered.shape, summed.stride(), row.shape) == ((4, 2, 3, 4, 4), share.stride(), (2, 3, 4, 4))
    assert all(result.is_meta for result in (gathered, summed, row))


def _recorded() -> list[tuple[str, int]]:
    ranks, notes = _ranks(), []
    collectives.recorders.append(lambda name, size: notes.append((name, size)))
    share = torch.ones(3, 5)
    collectives.all_gather(share, ranks)
    collectives.all_reduce(share.double(), ranks)
    collectives.reduce_scatter(torch.ones(ranks.size, 7, dtype=torch.bfloat16), ranks)
    collectives.recorders.clear()
    collectives.all_gather(share, ranks)
    return notes


def test_recorders_see_every_collective_and_its_bytes() -> None:
    for notes in run_ranks_once(2, _recorded):
        assert notes == [("all_gather", 60), ("all_reduce", 120), ("reduce_scatter", 28)]


def _of_zeros() -> list[Tensor]:
    ranks = _ranks()
    zeros = torch._efficientzerotensor((2, 3), dtype=torch.float64)
    found = [collectives.all_gather(zeros, ranks), collectives.reduce_scatter(zeros, ranks)]
    found += [collectives.all_reduce(zeros, ranks), collectives.coarse_gather(zeros, 2, ranks.group_name)]
    found += [collectives.coarse_reduce_scatter(zeros, 2, ranks.group_name)]
    return [*found, collectives.exchange_channels(zeros, [1, 1], [1, 1], ranks.group_name)]


def test_zeros_that_lie_nowhere_are_sent_as_numbers() -> None:
    """As the gradient of ``torch.sgn`` is: torch knows that it is zero, and keeps no numbers."""
    for found in run_ranks_once(2, _of_zeros):
        shapes = [(2, 2, 3), (3,), (2, 3), (4, 3), (1, 3), (2, 3)]
        assert [tuple(tensor.shape) for tensor in found] == shapes
        assert all(not tensor.any() for tensor in found)
