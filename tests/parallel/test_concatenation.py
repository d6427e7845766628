"""Maps that are joined: what DenseNet and U-Net do, and all that may happen to a map between two joins."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.parallel.common import run_ranks_once
from tests.parallel.properties import Given, properties_of, run_properties
from tlgc_mp.parallel import split_tensor
from tlgc_mp.parallel.layout import Layout, Ranks
from tlgc_mp.parallel.split_tensor import SplitTensor, from_share

SHAPE = (2, 12, 4, 4)


def _dense(x: Tensor, layers: int = 4) -> Tensor:
    """Each layer sees all maps before it."""
    maps = [x * 2]
    for _ in range(layers):
        maps.append(torch.tanh(torch.cat(maps, 1))[:, :6] * 3)
    return torch.cat(maps, 1)


def given_maps_that_are_joined_often(given: Given) -> Any:
    x = given(*SHAPE, grad=True)
    return _dense(x), _dense(x).sum(1)


def given_joins_along_every_dimension(given: Given) -> Any:
    x, y = given(*SHAPE, grad=True) * 2, given(*SHAPE, grad=True).exp()
    joined = [torch.cat([x, y, x], dim) for dim in (0, 1, 2, 3, -1, -3)]
    return joined, torch.concat((y, x), dim=2), torch.concatenate([y, x], axis=1), torch.cat(tensors=[x, y])


def given_maps_of_several_kinds(given: Given) -> Any:
    x, y = given(*SHAPE, grad=True) * 2, given(*SHAPE, dim=2, grad=True) * 3
    whole, constant, leaf = given.plain(*SHAPE, grad=True), given(*SHAPE), given.leaf(*SHAPE)
    return torch.cat([x, y, whole, constant, leaf, x], 1), torch.cat([constant, x], 2), torch.cat([leaf, x], 1)


def given_maps_of_several_types(given: Given) -> Any:
    x = given(*SHAPE, grad=True) * 2
    return torch.cat([x, x.float()], 1), torch.cat([x.float(), x.float()], 1).double(), torch.cat([x, x > 0], 1)


def given_a_map_that_changes_between_joins(given: Given) -> Any:
    x = given(*SHAPE, grad=True) * 2
    before = torch.cat([x, x], 1) * 1
    x.mul_(3)
    between = torch.cat([x, x], 1) * 1
    x[:, :3] = x[:, 3:6] * 2
    after = torch.cat([x, x.exp()], 1) * 1
    x.flatten(2).add_(1)
    return before, between, after, torch.cat([x, x], 1)


def given_a_map_that_is_given_other_data(given: Given) -> Any:
    x, y = given(*SHAPE, grad=True) * 2, given(*SHAPE)
    before = torch.cat([x, y], 1)
    x.data = y * 5
    return before, torch.cat([x, y], 1)


def given_a_joined_map_that_is_changed(given: Given) -> Any:
    x = given(*SHAPE, grad=True) * 2
    joined = torch.cat([x, x], 1)
    joined.mul_(2)
    joined[:, 2:9] = 1
    return joined, torch.cat([x, joined], 1)


def given_a_map_that_is_cut_off(given: Given) -> Any:
    x = given(*SHAPE, grad=True) * 2
    before = torch.cat([x, x], 1)
    with torch.no_grad():
        apart = torch.cat([x, x], 1)
    x.detach_()
    return before, apart.requires_grad, torch.cat([x, before], 1), torch.cat([x, x], 1).requires_grad


def given_hooks_of_joined_maps(given: Given) -> Any:
    x = given(*SHAPE, grad=True) * 2
    seen: list[Tensor] = []
    x.register_hook(lambda grad: seen.append(grad.clone()))
    first = torch.cat([x, x], 1)
    x.register_hook(lambda grad: grad * 2)
    x.retain_grad()
    loss = (first * given.plain(2, 24, 4, 4)).sum() + (torch.cat([x, first], 1).square()).sum() + x.exp().sum()
    loss.backward()
    return seen, x.grad, [type(grad) is type(x) for grad in (*seen, x.grad)]


def given_gradients_of_joined_maps(given: Given) -> Any:
    x = given(*SHAPE, grad=True)
    y = x.tanh()
    out = torch.cat([torch.cat([y, y * y], 1), y], 1)
    first = torch.autograd.grad(out.square().sum(), [y, x], create_graph=True)
    return first, torch.autograd.grad(sum(g.square().sum() for g in first), [y, x], create_graph=True)


def given_a_graph_that_is_kept(given: Given) -> Any:
    x = given(*SHAPE, grad=True)
    y = x.tanh()
    out = torch.cat([y, y], 1)
    out.sum().backward(retain_graph=True)
    out.square().sum().backward(retain_graph=True)
    return torch.cat([y, out], 1)


def given_recomputed_joins(given: Given) -> Any:
    x = given(*SHAPE, grad=True) * 2
    return [checkpoint(_dense, x, use_reentrant=reentrant) for reentrant in (True, False)]


def given_joined_views(given: Given) -> Any:
    x = given(*SHAPE, grad=True) * 2
    flat, turned = x.flatten(2), x.permute(0, 2, 3, 1)
    y = x.view(2, 3, 4, 4, 4)  # over two ranks not a view of its share
    joined = torch.cat([turned, turned], 3), torch.cat([flat, flat], 2), torch.cat([y, y], 1)
    x.mul_(2)
    return joined, torch.cat([y, y], 1), torch.cat([turned, turned], 3), torch.cat([x, x], 1)


def given_memory_formats(given: Given) -> Any:
    x = (given(*SHAPE, grad=True) * 2).contiguous(memory_format=torch.channels_last)
    y = given(*SHAPE, grad=True) * 2
    joined = [torch.cat(pair, 1) for pair in ((x, x), (x, y), (y, x))]
    return joined, [F.interpolate(j, scale_factor=2).stride() for j in joined]


def given_autocast(given: Given) -> Any:
    x = (given(*SHAPE, grad=True) * 2).float()
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([x, x], 1), torch.cat([x, x.bfloat16()], 1).dtype


def given_errors(given: Given) -> Any:
    x = given(*SHAPE, grad=True) * 2
    found = []
    for tensors, dim in (([x, x[:1]], 1), ([x, x], 4), ([x, x[0]], 1), ([], 1), ([x, None], 1), (x, 1)):
        try:
            found.append(torch.cat(tensors, dim))
        except Exception as error:
            found.append(type(error).__name__)
    return found


NAMES = list(properties_of(sys.modules[__name__]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [2, 3])
def test_property(size: int, name: str) -> None:
    problem = run_ranks_once(size, run_properties, __name__)[0][name]
    assert not problem, problem


def _alone(requires_grad: bool = True) -> Tensor:
    """A split tensor of which nothing has to be sent."""
    return from_share(torch.randn(2, 6, 4, 4).requires_grad_(requires_grad), Layout(1, None), Ranks(size=2))


def test_gradients_of_joins_are_cut_and_added_up_as_plain_tensors() -> None:
    """Ten maps in ten joins get 55 pieces of gradients, which split tensors would cut and add up one by one."""
    maps = [_alone() * 2 for _ in range(10)]
    outputs = [torch.cat(maps[: i + 1], 1) for i in range(10)]
    gradients = [torch.ones_like(output.detach()) for output in outputs]
    count: Counter[str] = Counter()
    split_tensor.observers.append(lambda func, how: count.update([str(func)]))
    torch.autograd.backward(outputs, gradients)
    split_tensor.observers.clear()
    assert count == {"aten.mul.Tensor": 10, "aten.view.default": 10}


def test_a_map_goes_when_nobody_holds_it() -> None:
    x = _alone() * 2
    joined = torch.cat([x, x], 1)
    gone = weakref.ref(x)
    del x, joined
    assert gone() is None


def test_a_map_enters_anew_after_it_has_changed() -> None:
    x = _alone() * 2
    assert isinstance(x, SplitTensor)
    torch.cat([x, x], 1)
    first = x.entered
    torch.cat([x, x], 1)
    assert x.entered is first
    x.add_(1)
    torch.cat([x, x], 1)
    assert x.entered is not first
