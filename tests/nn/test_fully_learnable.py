"""FullyLearnableGroupConv2d: its mask, its straight-through gradients, its counts, and its frozen form."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tlgc_mp.errors import UsageError
from tlgc_mp.models import create_model
from tlgc_mp.nn import FullyLearnableGroupConv2d

SHAPES = [(4, 6, 2), (8, 4, 4), (6, 6, 1), (12, 18, 6), (16, 16, 16)]
"""(n, m, N); with as many groups as channels, some stay empty."""


def layer_and_input(n: int, m: int, groups: int, *, bias: bool = True) -> tuple[FullyLearnableGroupConv2d, Tensor]:
    torch.manual_seed(n + 100 * m + groups)
    layer = FullyLearnableGroupConv2d(
        n, m, 3, stride=2, padding=1, dilation=1, groups=groups, bias=bias, dtype=torch.float64
    )
    for param in layer.parameters():
        nn.init.normal_(param)
    return layer, torch.randn(2, n, 7, 6, dtype=torch.float64)


def mask_by_hand(layer: FullyLearnableGroupConv2d) -> Tensor:
    """1 where the filter and the channel have their largest entry in the same column."""
    mask = torch.zeros(layer.out_channels, layer.in_channels, dtype=torch.float64)
    for f, row in enumerate(layer.filter_selection.tolist()):
        for c, column in enumerate(layer.input_selection.tolist()):
            mask[f, c] = float(row.index(max(row)) == column.index(max(column)))
    return mask


@pytest.mark.parametrize(("n", "m", "groups"), SHAPES)
def test_each_filter_reads_the_channels_of_its_group(n: int, m: int, groups: int) -> None:
    layer, x = layer_and_input(n, m, groups)
    weight = layer.weight * mask_by_hand(layer)[:, :, None, None]
    torch.testing.assert_close(layer(x), F.conv2d(x, weight, layer.bias, stride=2, padding=1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("n", "m", "groups"), SHAPES)
def test_gradients_reach_the_selections_through_the_softmax(n: int, m: int, groups: int) -> None:
    layer, x = layer_and_input(n, m, groups)
    cotangent = torch.randn_like(layer(x))
    layer(x).backward(cotangent)

    mask = mask_by_hand(layer).requires_grad_()
    weight = layer.weight.detach().requires_grad_()
    F.conv2d(x, weight * mask[:, :, None, None], stride=2, padding=1).backward(cotangent)
    assert layer.weight.grad is not None and weight.grad is not None and mask.grad is not None
    torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=1e-10, atol=1e-12)

    hard = [F.one_hot(s.argmax(1), groups).double() for s in (layer.filter_selection, layer.input_selection)]
    by_matrix = {"filter_selection": mask.grad @ hard[1], "input_selection": mask.grad.t() @ hard[0]}
    for name, grad in by_matrix.items():
        selection = getattr(layer, name)
        soft = selection.detach().softmax(1)
        expected = soft * (grad - (grad * soft).sum(1, keepdim=True))  # the softmax's own Jacobian
        torch.testing.assert_close(selection.grad, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("n", "m", "groups"), SHAPES)
def test_effective_parameters_are_those_that_the_mask_leaves(n: int, m: int, groups: int) -> None:
    layer, _ = layer_and_input(n, m, groups)
    assert layer.effective_parameters == int(mask_by_hand(layer).sum()) * 9 + m
    assert layer.balanced_parameters == 9 * m * n // groups + m


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n", "m", "groups"), SHAPES)
def test_frozen_computes_the_same(n: int, m: int, groups: int, bias: bool, layout: torch.memory_format) -> None:
    layer, x = layer_and_input(n, m, groups, bias=bias)
    x = x.contiguous(memory_format=layout)
    frozen = layer.frozen()
    y = frozen(x)
    torch.testing.assert_close(y, layer(x), rtol=1e-12, atol=1e-12)
    assert y.is_contiguous(memory_format=layout)
    # In float32 small sums of large products hold the rounding of those, which is each backend's own.
    y, expected = frozen.float()(x.float()), layer.float()(x.float())
    assert (y - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_frozen_works_where_one_group_has_all_channels_and_none_of_the_filters() -> None:
    layer, x = layer_and_input(4, 6, 2)
    with torch.no_grad():
        layer.input_selection[:, 0], layer.input_selection[:, 1] = 1.0, 0.0
        layer.filter_selection[:, 0], layer.filter_selection[:, 1] = 0.0, 1.0
    assert layer.effective_parameters == 6  # the bias
    torch.testing.assert_close(layer.frozen()(x), layer(x))


def test_frozen_multiplies_by_no_more_than_the_largest_groups() -> None:
    layer, _ = layer_and_input(12, 18, 6)
    channels = layer.input_selection.argmax(1).bincount(minlength=6)
    filters = layer.filter_selection.argmax(1).bincount(minlength=6)
    assert layer.frozen().weight.numel() == 6 * int(channels.max()) * int(filters.max()) * 9


def test_frozen_shares_no_storage_and_survives_a_state_dict() -> None:
    layer, x = layer_and_input(8, 4, 4)
    frozen = layer.frozen()
    expected = frozen(x)
    other = copy.deepcopy(frozen)
    nn.init.zeros_(other.weight)
    other.load_state_dict(frozen.state_dict())
    nn.init.zeros_(layer.weight)
    torch.testing.assert_close(other(x), expected, rtol=0, atol=0)


def test_training_moves_channels_from_group_to_group() -> None:
    torch.manual_seed(0)
    layer = FullyLearnableGroupConv2d(8, 8, 1, groups=2)
    target = torch.randn(8, 8, 1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    before = layer.input_selection.argmax(1).clone()
    for _ in range(50):
        x = torch.randn(16, 8, 4, 4)
        loss = F.mse_loss(layer(x), F.conv2d(x, target))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (layer.input_selection.argmax(1) != before).any()


def test_a_model_of_it_trains_and_freezes() -> None:
    torch.manual_seed(3)
    model = create_model("wrn-10-1", conv="flgc", groups=4).eval()
    x = torch.randn(3, 3, 16, 16)
    expected = model(x)
    for name, module in list(model.named_modules()):
        if isinstance(module, FullyLearnableGroupConv2d):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.frozen())
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UsageError, match=r"^groups must be a divisor of in_channels=8, got 3; use one of 1, 2, 4$"):
        FullyLearnableGroupConv2d(8, 12, 3, groups=3)
