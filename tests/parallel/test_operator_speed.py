"""What an operator on a split tensor costs in Python, in processor time. Run as a program, it prints the figures.

Kernels on tensors this small take next to nothing, so what is measured is the way to them.
"""

from __future__ import annotations

import time
import timeit
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tlgc_mp.parallel import split_tensor
from tlgc_mp.parallel.layout import Layout, Ranks
from tlgc_mp.parallel.split_tensor import SplitTensor, from_share

RANKS = Ranks(size=2)


def _microseconds(function: Callable[[], object], count: int = 2000) -> float:
    return min(timeit.repeat(function, number=count, repeat=5, timer=time.process_time)) / count * 1e6


def _split(requires_grad: bool = False) -> SplitTensor:
    return SplitTensor(torch.randn(2, 4, 4, 4), Layout(1, None), RANKS).requires_grad_(requires_grad)  # type: ignore[return-value]


OPERATORS: dict[str, Callable[[Tensor], object]] = {
    "relu": torch.relu,
    "add": lambda x: x + x,
    "mul": lambda x: x * 2.0,
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "view": lambda x: x.flatten(2),
    "mean": lambda x: x.mean((2, 3)),
    "cat": lambda x: torch.cat([x, x], 1),
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
}


def _relu_and_add(x: Tensor, grad: Tensor) -> object:
    return torch.autograd.grad(torch.relu(x) + x, x, grad)


def figures() -> dict[str, tuple[float, float]]:
    """Operator -> microseconds on a split tensor, and on a plain one."""
    split, plain = _split(), torch.randn(2, 4, 4, 4)
    found = {
        name: (_microseconds(lambda run=run: run(split)), _microseconds(lambda run=run: run(plain)))  # type: ignore[misc]
        for name, run in OPERATORS.items()
    }
    leaf, whole = _split(True), plain.clone().requires_grad_()
    grad, whole_grad = _split(), torch.ones_like(plain)
    found["relu, add and their gradients"] = (
        _microseconds(lambda: _relu_and_add(leaf, grad), 500),
        _microseconds(lambda: _relu_and_add(whole, whole_grad), 500),
    )
    return found


@pytest.mark.parametrize("name", ["relu", "add", "mul", "permute", "view"])
def test_a_local_operator_takes_little(name: str) -> None:
    run, x = OPERATORS[name], _split()
    assert _microseconds(lambda: run(x)) < 40


def _step_of_layers() -> None:
    """Each kind of argument that layers pass: parameters read from shares, sizes as tuples, tensors in a list."""
    weight = torch.randn(4, 1, 3, 3, requires_grad=True)
    x, outputs = _split(True), []
    for _ in range(5):
        shown = from_share(weight, Layout(0, None), RANKS)
        y = F.conv2d(x, shown, None, (1, 1), (1, 1), (1, 1), 8)
        x = F.max_pool2d(y, (1, 1), (1, 1))
        outputs.append(x)
    joined = torch.cat(outputs, 1)
    joined.backward(torch.ones_like(joined))
    assert weight.grad is not None


def test_no_container_is_searched_by_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """``tree_leaves`` takes longer than a local operator does."""
    searched: list[object] = []
    monkeypatch.setattr(split_tensor, "tree_leaves", lambda tree: searched.append(tree) or tree_leaves(tree))
    _step_of_layers()
    assert not searched, searched


def test_gradients_take_little() -> None:
    x, grad = _split(True), _split()
    assert _microseconds(lambda: _relu_and_add(x, grad), 500) < 400


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, (split, plain) in figures().items():
        print(f"{name:32s} {split:6.1f} us, plain {plain:5.1f}")
