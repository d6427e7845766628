"""Weights fitted to a dense convolution's: as close as any can be, and closer than a group convolution's.

The operator that a fitted layer has is written out as one dense weight, block by block, and its error is compared with
the singular values of the blocks, computed by numpy, and with what an optimizer finds. Weights are random, or those of
a WideResNet trained on handwritten digits.
"""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tlgc_mp import convert, create_model
from tlgc_mp.data import load_datasets
from tlgc_mp.nn import TwoLevelConv2d

SEED = 11
GROUPS = [2, 4, 8, 16]


def fitted(dense: nn.Conv2d, conv: str, groups: int, **dial: Any) -> nn.Module:
    """What a copy of ``dense`` becomes as the second convolution of a network."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), copy.deepcopy(dense), nn.Linear(1, 1))
    return convert(network, conv=conv, groups=groups, init="from_dense", **dial).get_submodule("1")


def operator(layer: nn.Module) -> Tensor:
    """The dense weight (m, n, d, d) of a group or two-level convolution, in float64."""
    weight = layer.weight.detach().double()
    groups = layer.groups
    rows, columns = weight.shape[0] // groups, weight.shape[1]
    whole = torch.zeros(weight.shape[0], columns * groups, *weight.shape[2:], dtype=torch.float64)
    for k in range(groups):
        here = slice(k * rows, (k + 1) * rows)
        whole[here, k * columns : (k + 1) * columns] = weight[here]
    if isinstance(layer, TwoLevelConv2d):
        prolongation, restriction = layer.prolongation.detach().double(), layer.restriction.detach().double()
        for j in range(groups):
            for i in range(layer.coarse_channels):
                column = prolongation[:, i if layer.coarse_sum else j * layer.coarse_channels + i]
                given = restriction[j * layer.coarse_channels + i]
                whole[:, j * columns : (j + 1) * columns] += column[:, None, None, None] * given
    return whole


def squared_error(layer: nn.Module, dense: nn.Conv2d) -> float:
    return (operator(layer) - dense.weight.detach().double()).square().sum().item()


def least_squared_error(dense: nn.Conv2d, groups: int, rank: int) -> float:
    """Of the exact diagonal blocks, and the best matrix of that rank for what each group gives to the others."""
    weight = dense.weight.detach().double().numpy()
    m, n = weight.shape[0] // groups, weight.shape[1] // groups
    total = 0.0
    for j in range(groups):
        columns = weight[:, j * n : (j + 1) * n].reshape(weight.shape[0], -1)
        others = np.delete(columns, slice(j * m, (j + 1) * m), axis=0)
        total += (np.linalg.svd(others, compute_uv=False)[rank:] ** 2).sum()
    return float(total)


@pytest.mark.parametrize("groups", [1, *GROUPS])
def test_a_balanced_layer_takes_the_mean_of_each_groups_blocks(groups: int) -> None:
    """The sum of squares about the mean is the least."""
    for name, dense in random_layers().items():
        layer = fitted(dense, "bgc", groups)
        blocks = dense.weight.detach().double().numpy().reshape(groups, dense.out_channels // groups, groups, -1)
        least = 0.0
        for k in range(groups):
            others = np.delete(blocks[k], k, axis=1)
            least += float(((others - others.mean(1, keepdims=True)) ** 2).sum()) if groups > 1 else 0.0
        rows = layer.mean_weight.detach().double().repeat(1, groups, 1, 1) / groups
        error = (operator(layer) + rows - dense.weight.detach().double()).square().sum().item()
        assert error == pytest.approx(least, rel=1e-5, abs=1e-9), f"{name}, seed {SEED}"


@functools.cache
def random_layers() -> dict[str, nn.Conv2d]:
    torch.manual_seed(SEED)
    shapes = [(16, 32, 3), (64, 32, 1), (32, 64, (3, 5))]
    return {f"random {n} to {m}, {d}": nn.Conv2d(n, m, d) for n, m, d in shapes}


@functools.cache
def trained_layers() -> dict[str, nn.Conv2d]:
    """Every convolution but the stem of a dense WRN-10-1 that reads most handwritten digits right."""
    torch.manual_seed(SEED)
    model = create_model("wrn-10-1", conv="sc")
    digits = load_datasets("digits", None, seed=SEED).train
    images, labels = (torch.stack([torch.as_tensor(value) for value in values]) for values in zip(*digits, strict=True))  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for step in range(60):
        batch = torch.randperm(len(labels))[:128]
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert step or loss.item() > 1.5
    assert loss.item() < 0.5, f"not trained, seed {SEED}"
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)]
    return {name: layer for name, layer in layers if name != "stem"}


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("layers", [random_layers, trained_layers], ids=["random", "trained"])
def test_error_is_the_least_there_is_and_below_that_of_groups_alone(layers: object, groups: int) -> None:
    for name, dense in layers().items():  # type: ignore[operator]
        two_level, grouped = (squared_error(fitted(dense, conv, groups), dense) for conv in ("gc-2l", "gc"))
        assert grouped == pytest.approx(least_squared_error(dense, groups, 0), rel=1e-6), f"{name}, seed {SEED}"
        assert two_level == pytest.approx(least_squared_error(dense, groups, 1), rel=1e-6), f"{name}, seed {SEED}"
        assert two_level < 0.999 * grouped, f"{name}, seed {SEED}"


@pytest.mark.parametrize("groups", [2, 8])
@pytest.mark.parametrize("layers", [random_layers, trained_layers], ids=["random", "trained"])
def test_the_error_falls_with_the_representatives_of_a_group(layers: object, groups: int) -> None:
    for name, dense in layers().items():  # type: ignore[operator]
        width = dense.weight[0].numel() // groups
        counts = sorted({1, 2, 3, 5, min(width, dense.out_channels * (groups - 1) // groups)})
        errors = {r: squared_error(fitted(dense, "gc-2l", groups, coarse_channels=r), dense) for r in counts}
        for count, error in errors.items():
            least = least_squared_error(dense, groups, count)
            assert error == pytest.approx(least, rel=1e-6, abs=1e-8), f"{name}, r = {count}, seed {SEED}"
        assert list(errors.values()) == sorted(errors.values(), reverse=True)
        norm = dense.weight.detach().square().sum().item()
        assert errors[counts[-1]] < 1e-12 * norm < errors[1], f"{name}, seed {SEED}"


@pytest.mark.parametrize("groups", [2, 8])
@pytest.mark.parametrize("layers", [random_layers, trained_layers], ids=["random", "trained"])
def test_the_error_falls_with_representatives_that_are_summed(layers: object, groups: int) -> None:
    for name, dense in layers().items():  # type: ignore[operator]
        counts = [1, 2, 4, 8, min(dense.weight[0].numel(), dense.out_channels)]
        dials = [{"coarse_channels": count, "coarse_sum": True} for count in counts]
        errors = [squared_error(fitted(dense, "gc-2l", groups, **dial), dense) for dial in dials]
        assert errors[0] < 0.999 * least_squared_error(dense, groups, 0), f"{name}, seed {SEED}"
        assert all(after < before for before, after in itertools.pairwise(errors)), f"{name}, {errors}, seed {SEED}"
        assert errors[-1] < 1e-12 * dense.weight.detach().square().sum().item(), f"{name}, seed {SEED}"


@pytest.mark.parametrize(
    "dial", [{}, {"coarse_channels": 2}, {"coarse_sum": True}, {"coarse_channels": 2, "coarse_sum": True}]
)
@pytest.mark.parametrize("groups", [2, 4])
def test_no_optimizer_finds_better_weights(groups: int, dial: dict[str, Any]) -> None:
    """Over all parameters, the prolongation's rows into their own group among them."""
    torch.manual_seed(SEED)
    dense = nn.Conv2d(8, 12, 2, dtype=torch.float64)
    least = squared_error(fitted(dense, "gc-2l", groups, **dial), dense)
    found = []
    for _ in range(5):
        layer = TwoLevelConv2d(8, 12, 2, groups=groups, dtype=torch.float64, coarse_init="he", **dial)
        optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=400, line_search_fn="strong_wolfe")

        def closure(layer: TwoLevelConv2d = layer, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            by_group = layer.restriction.unflatten(0, (groups, -1))
            prolongation = layer.prolongation.view(12, -1, layer.coarse_channels).expand(-1, groups, -1)
            coarse = torch.einsum("mjr,jrchw->mjchw", prolongation, by_group).flatten(1, 2)
            own = layer.weight.unflatten(0, (groups, -1))
            fine = torch.cat([F.pad(own[k], (0, 0, 0, 0, *_around(k, groups, own.shape[2]))) for k in range(groups)])
            error = (coarse + fine - dense.weight.detach()).square().sum()
            error.backward()
            return error

        optimizer.step(closure)
        found.append(squared_error(layer, dense))
    assert min(found) > least * (1 - (0.01 if dial.get("coarse_sum") else 1e-9)), f"seed {SEED}"
    assert min(found) < least * 1.01, "the optimizer finds nothing as good: it says nothing about what is best"


def _around(group: int, groups: int, width: int) -> tuple[int, int]:
    """The channels before and after those of ``group``."""
    return group * width, (groups - 1 - group) * width


@pytest.mark.parametrize(
    ("conv", "dial"),
    [
        ("gc", {}),
        ("gc-2l", {}),
        ("gc-2l", {"coarse_channels": 3}),
        ("gc-2l", {"coarse_channels": 3, "coarse_sum": True}),
        ("gc-2l", {"coarse_channels": 200}),
    ],
)
@pytest.mark.parametrize("groups", [1, *GROUPS])
def test_output_is_that_of_the_dense_weight_it_stands_for(groups: int, conv: str, dial: dict[str, Any]) -> None:
    torch.manual_seed(SEED)
    dense = nn.Conv2d(32, 16, 3, stride=2, padding=(1, 2), dilation=(2, 1), dtype=torch.float64)
    layer = fitted(dense, conv, groups, **dial)
    x = torch.randn(3, 32, 9, 8, dtype=torch.float64)
    expected = F.conv2d(x, operator(layer), dense.bias, dense.stride, dense.padding, dense.dilation)  # type: ignore[arg-type]
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12, msg=lambda m: f"seed {SEED}: {m}")
    if groups == 1 or dial.get("coarse_channels") == 200:
        torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-12, msg=lambda m: f"seed {SEED}: {m}")


@pytest.mark.parametrize("dial", [{}, {"coarse_channels": 3}, {"coarse_channels": 3, "coarse_sum": True}])
def test_a_group_that_gives_nothing_to_the_others_keeps_a_coarse_level_that_can_learn(dial: dict[str, Any]) -> None:
    torch.manual_seed(SEED)
    dense = nn.Conv2d(8, 8, 3, groups=2)
    whole = nn.Conv2d(8, 8, 3)
    with torch.no_grad():
        whole.weight.zero_()
        whole.weight[:4, :4], whole.weight[4:, 4:] = dense.weight[:4], dense.weight[4:]
    layer = fitted(whole, "gc-2l", 2, **dial)
    assert not layer.prolongation.any()
    layer(torch.randn(2, 8, 6, 6)).square().sum().backward()
    assert layer.prolongation.grad is not None
    assert layer.prolongation.grad.abs().min() > 0
