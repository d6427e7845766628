"""TwoLevelConv2d takes torch.nn.Conv2d's arguments, refuses those that cannot work, and prints itself."""

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tlgc_mp.errors import UsageError
from tlgc_mp.nn import TwoLevelConv2d
from tlgc_mp.nn.two_level import COARSE_MODES, WIDE_GROUP, WIDE_SHARE

SEED = 7

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"in_channels": 0}, "in_channels must be 1 or more, got 0"),
    ({"out_channels": -8}, "out_channels must be 1 or more, got -8"),
    ({"groups": 3}, "groups must be a divisor of in_channels=8, got 3; use one of 1, 2, 4"),
    (
        {"in_channels": 6, "out_channels": 16, "groups": 3},
        "groups must be a divisor of out_channels=16, got 3; use one of 1, 2",
    ),
    ({"groups": 8}, "groups must be a divisor of out_channels=12, got 8; use one of 1, 2, 4"),
    ({"groups": 0}, "groups must be a divisor of in_channels=8, got 0; use one of 1, 2, 4"),
    ({"groups": -2}, "groups must be a divisor of in_channels=8, got -2; use one of 1, 2, 4"),
    ({"kernel_size": 0}, "kernel_size must be a positive int or a pair of them, got 0"),
    ({"kernel_size": (3, 3, 3)}, "kernel_size must be a positive int or a pair of them, got (3, 3, 3)"),
    ({"kernel_size": 3.0}, "kernel_size must be a positive int or a pair of them, got 3.0"),
    ({"stride": (1, 0)}, "stride must be a positive int or a pair of them, got (1, 0)"),
    ({"dilation": 0}, "dilation must be a positive int or a pair of them, got 0"),
    ({"coarse_kernel_size": 0}, "coarse_kernel_size must be a positive int or a pair of them, got 0"),
    ({"padding": -1}, "padding must be a non-negative int, a pair of them, 'same' or 'valid', got -1"),
    ({"padding": "full"}, "padding must be a non-negative int, a pair of them, 'same' or 'valid', got 'full'"),
    (
        {"padding": "same", "stride": 2},
        "padding must be given in numbers unless stride is 1 and dilation * (kernel_size - 1) is even, got "
        "'same' with stride=(2, 2), kernel_size=(3, 3), dilation=(1, 1)",
    ),
    (
        {"padding": "same", "kernel_size": (3, 2)},
        "padding must be given in numbers unless stride is 1 and dilation * (kernel_size - 1) is even, got "
        "'same' with stride=(1, 1), kernel_size=(3, 2), dilation=(1, 1)",
    ),
    (
        {"coarse_kernel_size": (3, 2), "dilation": 1},
        "coarse_kernel_size must have the parity of kernel_size=3 to be centred on it with dilation=1, got 2",
    ),
    *(
        (
            {"coarse_channels": count},
            f"coarse_channels must be 1 to 10000 representatives of a group, got {count!r}; use 1, or conv='gc' for no "
            "coarse level",
        )
        for count in (0, -1, 1.5, True, "2", 10_001)
    ),
    ({"coarse_sum": 1}, "coarse_sum must be True or False, got 1; use one of them"),
]


@pytest.mark.parametrize(("wrong", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_refusal(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        TwoLevelConv2d(**{"in_channels": 8, "out_channels": 12, "kernel_size": 3, **wrong})
    assert str(caught.value) == message


def test_arguments_are_those_of_conv2d() -> None:
    ours = inspect.signature(TwoLevelConv2d).parameters
    theirs = inspect.signature(nn.Conv2d).parameters
    shared = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias"]
    assert list(ours)[:8] == list(theirs)[:8] == shared
    for name in (*shared[:-1], "device", "dtype"):
        assert ours[name].default == theirs[name].default, name
    assert ours["bias"].default is False


def test_dtype_and_device() -> None:
    layer = TwoLevelConv2d(8, 12, 3, groups=2, bias=True, coarse_kernel_size=1, device="meta", dtype=torch.float64)
    assert {name: tuple(param.shape) for name, param in layer.named_parameters()} == {
        "weight": (12, 4, 3, 3),
        "restriction": (2, 4, 1, 1),
        "prolongation": (12, 2),
        "bias": (12,),
    }
    assert all(param.is_meta and param.dtype == torch.float64 for param in layer.parameters())


@pytest.mark.parametrize(
    ("group_width", "kernel_size", "coarse_kernel_size", "local_groups", "mode"),
    [
        (WIDE_GROUP - 1, 3, None, 4, "fused"),
        (WIDE_GROUP, 3, None, 4, "overlapped"),
        (WIDE_SHARE - 1, 3, None, 2, "fused"),
        (WIDE_SHARE, 3, None, 2, "overlapped"),
        (3, 3, 1, 4, "overlapped"),
        (26, 3, (3, 3), 4, "fused"),
        (3, 1, None, 4, "dense"),
        (3, 1, None, 2, "fused"),
        (16, 1, 3, 4, "overlapped"),
    ],
)
def test_which_mode_is_chosen(
    group_width: int, kernel_size: int, coarse_kernel_size: Any, local_groups: int, mode: str
) -> None:
    shape = (256, 4 * group_width, kernel_size)
    layer = TwoLevelConv2d(*shape, groups=4, coarse_kernel_size=coarse_kernel_size, device="meta")
    layer.local_groups = local_groups
    assert layer.coarse_mode == mode


def test_a_coarse_mode_that_is_none_is_refused() -> None:
    layer = TwoLevelConv2d(8, 12, 3, groups=4, coarse_kernel_size=1)
    with pytest.raises(
        UsageError,
        match=r"coarse_mode must be one of overlapped for a layer of coarse_kernel_size=\(1, 1\)",
    ):
        layer.coarse_mode = "fused"
    assert layer.coarse_mode == "overlapped"


def test_the_dense_mode_is_of_layers_that_hold_all_groups() -> None:
    layer = TwoLevelConv2d(8, 12, 3, groups=4)
    layer.coarse_mode = "dense"
    layer.local_groups = 2
    assert layer.coarse_mode == "fused"
    with pytest.raises(
        UsageError,
        match=r"coarse_mode must be one of overlapped, fused for a layer of .* 2 of 4 groups here",
    ):
        layer.coarse_mode = "dense"


@pytest.mark.parametrize("mode", COARSE_MODES)
@pytest.mark.parametrize("frozen", ["weight", "restriction", "prolongation", "bias", "input"])
def test_what_is_frozen_gets_no_gradient_and_all_else_its_own(frozen: str, mode: str) -> None:
    torch.manual_seed(SEED)
    layer = TwoLevelConv2d(8, 12, 3, groups=4, bias=True, dtype=torch.float64, coarse_init="he")
    layer.coarse_mode = mode
    tensors = {"input": torch.randn(2, 8, 5, 5, dtype=torch.float64), **dict(layer.named_parameters())}

    def gradients() -> dict[str, torch.Tensor]:
        trained = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
        return dict(zip(trained, torch.autograd.grad(layer(tensors["input"]).sum(), trained.values()), strict=True))

    tensors["input"].requires_grad_()
    expected = gradients()
    tensors[frozen].requires_grad_(False)
    found = gradients()
    assert set(found) == set(expected) - {frozen}
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, name=name: f"{name}, seed {SEED}: {m}")


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize(("kernel_size", "dilation"), [(3, 1), ((5, 1), 1), (3, 2), (2, 2), (1, 1)])
def test_padding_by_name_is_torchs(padding: str, kernel_size: int | tuple[int, int], dilation: int) -> None:
    torch.manual_seed(SEED)
    layer = TwoLevelConv2d(
        8, 12, kernel_size, padding=padding, dilation=dilation, groups=4, dtype=torch.float64, coarse_init="he"
    )
    x = torch.randn(2, 8, 7, 6, dtype=torch.float64)
    fine = F.conv2d(x, layer.weight, padding=padding, dilation=dilation, groups=4)
    coarse = F.conv2d(x, layer.restriction, padding=padding, dilation=dilation, groups=4)
    expected = fine + F.conv2d(coarse, layer.prolongation[:, :, None, None])
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12, msg=lambda m: f"seed {SEED}: {m}")


def test_repr() -> None:
    assert repr(TwoLevelConv2d(8, 12, 3, groups=4)) == (
        "TwoLevelConv2d(8, 12, kernel_size=(3, 3), stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=4, "
        "bias=False)"
    )
    layer = TwoLevelConv2d(8, 12, (3, 5), 2, "valid", (1, 2), 2, True, 1)
    assert repr(layer) == (
        "TwoLevelConv2d(8, 12, kernel_size=(3, 5), stride=(2, 2), padding=(0, 0), dilation=(1, 2), groups=2, "
        "coarse_kernel_size=(1, 1), bias=True)"
    )
    assert "groups=4, coarse_channels=3, coarse_sum=True, bias=False" in repr(
        TwoLevelConv2d(8, 12, 3, groups=4, coarse_channels=3, coarse_sum=True)
    )
    layer.local_groups = 1
    assert "groups=2, coarse_kernel_size=(1, 1), local_groups=1, bias=True" in repr(layer)
