"""Properties of split tensors: ordinary code, run on plain tensors and on split ones, which has to give the same."""

from __future__ import annotations

import datetime
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.parallel.operator_calls import SEED, compare_trees, seed
from tlgc_mp.parallel.split_tensor import Ranks, split, whole

Property = Callable[["Given"], Any]


class Given:
    """Draws the tensors of a property, plain or split; the same numbers on every rank.

    Args:
        ranks: the ranks to split over; ``None`` for plain tensors only.
    """

    def __init__(self, ranks: Ranks | None) -> None:
        self.ranks = ranks
        self.leaves: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(SEED)

    def __call__(self, *shape: int, dim: int = 1, grad: bool = False) -> Tensor:
        """A tensor that is split along ``dim``; its gradient is that of a plain leaf."""
        return self.cut(self.plain(*shape, grad=grad), dim)

    def cut(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor.clone() if self.ranks is None else split(tensor, dim, self.ranks)

    def leaf(self, *shape: int, dim: int = 1) -> Tensor:
        """A leaf that is split itself, and so is its gradient."""
        leaf = self(*shape, dim=dim).detach().requires_grad_()
        self.leaves.append(leaf)
        return leaf

    def plain(self, *shape: int, grad: bool = False) -> Tensor:
        """A plain tensor on either side."""
        leaf = torch.randn(shape, generator=self._generator, dtype=torch.float64).requires_grad_(grad)
        if grad:
            self.leaves.append(leaf)
        return leaf


def results(function: Property, ranks: Ranks | None) -> list[Any]:
    """What a property returns, and the gradients that this gives its leaves."""
    seed(SEED)
    given = Given(ranks)
    returned = tree_leaves(function(given))
    losses = [tensor.square().sum() for tensor in returned if isinstance(tensor, Tensor) and tensor.requires_grad]
    if losses:
        torch.stack(losses).sum().backward()
    # A gradient that is not of the type of its leaf shows here: a plain leaf has a plain one.
    kinds = [leaf.grad is None or type(leaf.grad) is type(leaf) for leaf in given.leaves]
    return [*returned, *[leaf.grad for leaf in given.leaves], kinds, torch.get_rng_state()]


def run_properties(module: str) -> dict[str, str]:
    """Name of each property of a module -> what is wrong with it over all ranks, or nothing."""
    import importlib

    warnings.filterwarnings("ignore")
    limit = datetime.timedelta(seconds=20)
    ranks = Ranks(dist.new_group(timeout=limit))
    votes = dist.new_group(timeout=limit)
    failures = {}
    for name, function in properties_of(importlib.import_module(module)).items():
        problem = ""
        expected = results(function, None)
        try:
            compare_trees(name, whole(results(function, ranks)), expected)
        except Exception as error:
            problem = f"{type(error).__name__}: {str(error)[:300]}"
        problems: list[Any] = [None] * ranks.size
        dist.all_gather_object(problems, problem, group=votes)
        failures[name] = next((problem for problem in problems if problem), "")
    return failures


def properties_of(module: types.ModuleType) -> dict[str, Property]:
    return {name: value for name, value in vars(module).items() if name.startswith("given_")}
