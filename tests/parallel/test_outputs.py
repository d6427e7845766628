"""Outputs in any container come out plain and whole."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.parallel.common import SEED, run_ranks_once
from tlgc_mp.parallel import shard
from tlgc_mp.parallel.containers import map_leaves
from tlgc_mp.parallel.split_tensor import SplitTensor


class Pair(NamedTuple):
    first: Tensor
    second: Any


@dataclasses.dataclass
class Outputs:
    logits: Tensor
    maps: list[Any]
    loss: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Tensor
    inner: Any


class Fields(dict):  # type: ignore[type-arg]
    """A dict that is read by attributes, as configurations are."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


@dataclasses.dataclass
class Both(collections.OrderedDict):  # type: ignore[type-arg]
    """A dataclass that is a dict of its fields too, as outputs of transformers are."""

    logits: Tensor | None = None
    hidden: Any = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self[field.name] = getattr(self, field.name)


class Rows(list):  # type: ignore[type-arg]
    pass


class Sizes(tuple):  # type: ignore[type-arg]
    pass


CONTAINERS: dict[str, Any] = {
    "a tensor": lambda x: x,
    "a named tuple": lambda x: Pair(x, {"second": [x, None]}),
    "a dataclass": lambda x: Outputs(x, [x * 2, "name", (x,)]),
    "a frozen dataclass": lambda x: Frozen(x, Frozen(x + 1, 3)),
    "a subclass of dict": lambda x: Fields(x=x, y=Fields(z=[x])),
    "a dict and a dataclass": lambda x: Both(x, (x, x)),
    "a subclass of list": lambda x: Rows([x, Rows([x])]),
    "a subclass of tuple": lambda x: Sizes((x, 1)),
    "a default dict": lambda x: collections.defaultdict(list, {"x": [x]}),
}


class Network(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.name = name

    def forward(self, x: Tensor) -> Any:
        return CONTAINERS[self.name](self.conv(x))


def _network(name: str) -> nn.Module:
    torch.manual_seed(SEED)
    return Network(name).double()


def _images() -> Tensor:
    return torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)


def _found(out: Any) -> list[tuple[type, Tensor]]:
    found: list[tuple[type, Tensor]] = []
    map_leaves(lambda leaf: found.append((type(leaf), leaf.detach())) if isinstance(leaf, Tensor) else leaf, out)
    return found


def _on_ranks() -> dict[str, tuple[Any, Any]]:
    answers = {}
    for name in CONTAINERS:
        out = shard(_network(name))(_images())
        copied = CONTAINERS[name](torch.zeros(1))
        assert type(out) is type(copied) if name != "a tensor" else type(out) is Tensor
        answers[name] = _found(out)
        if isinstance(out, Both):
            assert out.logits is out["logits"] and out.hidden is out["hidden"]
    return answers


@pytest.mark.parametrize("name", CONTAINERS)
def test_come_out_whole(name: str) -> None:
    expected = _found(_network(name)(_images()))
    assert expected
    for answers in run_ranks_once(2, _on_ranks):
        for (kind, value), (_, wanted) in zip(answers[name], expected, strict=True):
            assert kind is not SplitTensor
            torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-9)


def test_what_does_not_change_is_the_same_object() -> None:
    given = Outputs(torch.zeros(1), [1, (2, {"x": 3})])
    assert map_leaves(lambda leaf: leaf, given) is given
    rows = Rows([1, 2])
    assert map_leaves(lambda leaf: leaf, rows) is rows
    frozen = Frozen(torch.zeros(1), None)
    made = map_leaves(lambda leaf: leaf + 1 if isinstance(leaf, Tensor) else leaf, frozen)
    assert type(made) is Frozen and made.x == 1 and frozen.x == 0
