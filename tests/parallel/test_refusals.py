"""What torch refuses on one device is refused of split tensors: arguments out of range, sizes that do not fit."""

from __future__ import annotations

import datetime
import itertools
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from tests.parallel.common import run_ranks_once
from tests.parallel.operator_calls import Arguments, database, place, samples
from tests.parallel.properties import Given, properties_of, run_properties
from tlgc_mp.parallel.split_tensor import Ranks, SplitTensor

UNCHECKED = ("native_", "_native", "_batch_norm", "torch.ops", "torch._scaled")
"""Beginnings of operators that do not look at sizes on one device either, and read memory that is not theirs."""


def _kind_of_error(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return "none"


def given_dimensions_out_of_range(given: Given) -> Any:
    x = given(6, 12, 6)
    calls: list[Callable[[int], object]] = [
        lambda dim: torch.cat([x, x], dim),
        lambda dim: torch.stack([x, x], dim),
        lambda dim: x.split(3, dim),
        lambda dim: x.unbind(dim),
        lambda dim: x.unsqueeze(dim),
        lambda dim: x.squeeze(dim),
        lambda dim: x.transpose(0, dim),
        lambda dim: x.permute(0, 1, dim),
        lambda dim: x.select(dim, 0),
        lambda dim: x.narrow(dim, 0, 2),
        lambda dim: x.unfold(dim, 2, 1),
        lambda dim: x.softmax(dim),
        lambda dim: x.sum(dim),
        lambda dim: x.flip(dim),
        lambda dim: x.cumsum(dim),
        lambda dim: x.index_select(dim, torch.tensor([0])),
        lambda dim: x.gather(dim, torch.zeros(6, 12, 6, dtype=torch.long)),
    ]
    return [[_kind_of_error(lambda call=call, dim=dim: call(dim)) for dim in (-9, -4, 3, 4, 9)] for call in calls]


def given_sizes_that_do_not_fit(given: Given) -> Any:
    x, w, maps = given(12, 6, 12), given(6, 12, dim=0), given(2, 12, 4, 4)
    filters, classes = given(24, 12, 3, 3, dim=0), torch.arange(12).remainder(4)
    labels = given.cut(classes, 0)
    affine = given(12, dim=0)
    calls: list[Callable[[], object]] = [
        lambda: torch.bmm(x, given(14, 12, 6)),
        lambda: torch.bmm(x, given(12, 6, 6)),
        lambda: w @ given(6, 12, dim=0),
        lambda: torch.addmm(given(1, 6, 6), w, w.t()),
        lambda: torch.addmm(given(6, 3, dim=0), w, w.t()),
        lambda: torch.addmm(given.plain(3), w, w.t()),
        lambda: F.layer_norm(x, (6, 6)),
        lambda: F.layer_norm(x, (12,), affine[:6]),
        lambda: F.layer_norm(x, (12,), affine, affine.unsqueeze(0)),
        lambda: F.conv2d(maps, filters, given.plain(1)),
        lambda: F.conv2d(maps, filters, given.plain(1, 24)),
        lambda: F.conv2d(maps, given(24, 24, 3, 3)),
        lambda: F.conv1d(given(2, 6, 8), given(2, 2, 3), groups=2),
        lambda: F.conv1d(given(2, 12, 8), given(6, 6, 3), groups=3),
        lambda: F.conv_transpose1d(given(2, 6, 8), given(12, 6, 3, dim=0)),
        lambda: F.conv_transpose2d(maps, given(12, 24, 3, 3), given.plain(12)),
        lambda: F.batch_norm(maps, given.plain(6), given.plain(6)),
        lambda: F.group_norm(maps, 5),
        lambda: F.prelu(maps, given.plain(6)),
        lambda: torch.cat([maps, maps[:1]], 1),
        lambda: torch.stack([maps, maps[:1]], 1),
        lambda: F.one_hot(labels, 0),
        lambda: F.one_hot(labels, 3),
        lambda: F.one_hot(labels - 1),
        lambda: F.cross_entropy(given(12, 3, dim=0), labels),
        lambda: maps.view(2, 12, 5, 4),
        lambda: maps.expand(2, 24, 4, 4),
        lambda: maps + given(2, 6, 4, 4),
        lambda: maps.copy_(given(2, 6, 4, 4)),
        lambda: maps.add_(given(2, 6, 4, 4)),
        lambda: maps.mul_(given.plain(6, 1, 1)),
        lambda: maps.clamp_(given.plain(6, 4, 4)),
        lambda: maps[:, :6].copy_(maps),
        lambda: maps.lerp_(maps, given.plain(6, 1, 1)),
        lambda: maps.masked_fill_(given.plain(6, 1, 1) > 0, 1.0),
        lambda: maps.squeeze(0).add_(given.plain(6, 1, 1)),
        lambda: torch._foreach_add_([maps], [given(2, 6, 4, 4)]),
        lambda: maps[:, 12],
        lambda: maps[:, torch.tensor([3, 12])],
        lambda: F.pixel_shuffle(maps, 5),
    ]
    return [_kind_of_error(call) for call in calls]


NAMES = list(properties_of(sys.modules[__name__]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [2, 3])
def test_property(size: int, name: str) -> None:
    problem = run_ranks_once(size, run_properties, __name__)[0][name]
    assert not problem, problem


def _error_inputs() -> Iterator[tuple[str, Any, Any]]:
    """Name, entry and arguments of what the database says is an error."""
    for name, entry in database().items():
        if entry.error_inputs_func is not None:
            for error in entry.error_inputs("cpu"):
                sample = error.sample_input
                yield name, entry, (sample.input, sample.args, sample.kwargs)


def _changed_samples(size: int, first: int, step: int) -> Iterator[tuple[str, Any, Any]]:
    """The same of samples of which one number or the shape of one tensor is another."""
    names = [name for name in database() if not name.startswith(UNCHECKED)]
    for name in names[first::step]:
        entry = database()[name]
        for sample in itertools.islice(samples(entry, quick=True), 3):
            leaves, spec = tree_flatten((sample.input, sample.args, sample.kwargs))
            for i, leaf in enumerate(leaves):
                for other in _others(leaf, size):
                    yield name, entry, tree_unflatten([*leaves[:i], other, *leaves[i + 1 :]], spec)


def _others(leaf: object, size: int) -> Iterator[object]:
    if isinstance(leaf, int) and not isinstance(leaf, bool):
        yield from (-9, 9, leaf + 1)
    elif isinstance(leaf, Tensor) and leaf.layout == torch.strided and not leaf.is_nested and leaf.dim():
        plain = leaf.detach()
        for dim, length in enumerate(plain.shape):
            yield torch.cat([plain, plain.narrow(dim, 0, min(size, length))], dim)
            if length > size:
                yield plain.narrow(dim, 0, length - size).clone()
        yield plain.unsqueeze(0).clone()
        if plain.shape[0]:
            yield plain[0].clone()


def _accepted(first: int | None, step: int) -> tuple[int, list[str]]:
    """How many calls one device refuses, and those of them that these ranks do not."""
    warnings.filterwarnings("ignore")
    ranks = Ranks(dist.new_group(timeout=datetime.timedelta(seconds=30)))
    calls = _error_inputs() if first is None else _changed_samples(ranks.size, first, step)
    tried, found = 0, []
    for number, (name, entry, tree) in enumerate(calls):
        rng = random.Random(f"{name} {number}")
        tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
        placements = [place(tensor, i == 0, number, ranks.size, rng) for i, tensor in enumerate(tensors)]
        try:
            plain, given = (Arguments(tree, placements, on, "") for on in (None, ranks))
        except Exception:  # a change that the clone of a leaf cannot take
            continue
        if not any(type(tensor) is SplitTensor for tensor in given.given):
            continue
        if _kind_of_error(lambda plain=plain, entry=entry: plain.call(entry)) == "none":
            continue
        tried += 1
        if _kind_of_error(lambda given=given, entry=entry: given.call(entry)) == "none":
            found.append(
                f"{name}: {[(tuple(t.shape), p.dim) for t, p in zip(tensors, placements, strict=True)]} {tree}"
            )
    return tried, found


def test_error_inputs_of_the_operator_database() -> None:
    tried, found = run_ranks_once(2, _accepted, None, 1)[0]
    assert not found, "\n".join(found)
    assert tried > 300


@pytest.mark.parametrize("first", [0, *[pytest.param(i, marks=pytest.mark.slow) for i in range(1, 20)]])
def test_samples_of_the_operator_database_with_one_change(first: int) -> None:
    tried, found = run_ranks_once(2, _accepted, first, 20)[0]
    assert not found, "\n".join(found)
    assert tried > 30
