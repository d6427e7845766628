"""One two-level layer split over P ranks, and the BatchNorm after it, against the same layer on one device.

It takes whole tensors, and what each of the two layers gives looks whole, and lies in shares of channels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.parallel.common import SEED, assert_close, gather_gradients, run_ranks_once
from tlgc_mp.nn import BalancedConv2d, TwoLevelConv2d
from tlgc_mp.parallel import gather_state_dict, shard
from tlgc_mp.parallel.split_tensor import SplitTensor, whole

SPLITS = [(1, 4), (2, 2), (2, 4), (2, 6), (3, 3), (4, 4), (4, 8)]
"""(P, N)"""

LAYERS: dict[str, dict[str, Any]] = {
    "fused": dict(kernel_size=3, padding=1),
    "fused, bias": dict(kernel_size=3, padding=1, bias=True),
    "fused, stride 2": dict(kernel_size=3, padding=1, stride=2),
    "1x1, stride 2": dict(kernel_size=1, stride=2),
    "d0 < d, bias, stride 2": dict(kernel_size=3, padding=1, stride=2, bias=True, coarse_kernel_size=1),
    "d0 > d": dict(kernel_size=1, coarse_kernel_size=3),
    **{
        f"{mode}, r = {count}, {'summed' if summed else 'apart'}": dict(
            kernel_size=3, padding=1, bias=True, coarse_mode=mode, coarse_channels=count, coarse_sum=summed
        )
        for mode in ("fused", "overlapped")
        for count, summed in ((1, True), (2, False), (2, True), (3, False), (3, True))
    },
    "balanced, bias, stride 2": dict(kind=BalancedConv2d, kernel_size=3, padding=1, stride=2, bias=True),
    "balanced, 1x1": dict(kind=BalancedConv2d, kernel_size=1),
    "d0 < d, r = 3, apart": dict(kernel_size=3, padding=1, coarse_kernel_size=1, coarse_channels=3),
    "d0 > d, r = 2, summed": dict(kernel_size=1, coarse_kernel_size=3, coarse_channels=2, coarse_sum=True),
}
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-5}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def _case(groups: int, layer: str, dtype: torch.dtype, layout: str) -> tuple[nn.Module, Tensor]:
    """The whole layer with a BatchNorm after it, and its whole input; the same wherever it is called."""
    torch.manual_seed(SEED)
    arguments = dict(LAYERS[layer])
    mode, kind = arguments.pop("coarse_mode", None), arguments.pop("kind", TwoLevelConv2d)
    convolution = kind(2 * groups, 3 * groups, groups=groups, **arguments)
    if mode is not None:
        convolution.coarse_mode = mode
    model = nn.Sequential(convolution, nn.BatchNorm2d(3 * groups))
    for param in model.parameters():
        nn.init.normal_(param)
    images = torch.randn(3, 2 * groups, 7, 6)
    return model.to(dtype), images.to(dtype).contiguous(memory_format=FORMATS[layout])


def _forward_and_backward(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Outputs of both layers and the input's gradient.

    The loss weighs every output of the convolution and of the BatchNorm at random, so that no gradient cancels.
    """
    conv, norm = model
    x = x.requires_grad_()
    y = conv(x)
    z = norm(y)
    weights = torch.randn((2, *y.shape), generator=torch.Generator().manual_seed(SEED)).to(x.dtype)
    (weights[0] * y + weights[1] * z).sum().backward()
    assert type(x.grad) is Tensor, "that of a plain tensor is plain"
    return {"output": y.detach(), "normalized": z.detach(), "input gradient": x.grad}


def _on_ranks(groups_of_cases: tuple[int, ...]) -> dict[Any, tuple[dict[str, Tensor], bool]]:
    answers = {}
    for groups in groups_of_cases:
        for layer in LAYERS:
            for dtype in TOLERANCES:
                for layout, memory_format in FORMATS.items():
                    model, x = _case(groups, layer, dtype, layout)
                    model = shard(model)
                    found = _forward_and_backward(model, x)
                    for key in ("output", "normalized"):
                        value = found[key]
                        if dist.get_world_size() > 1:  # else there is nothing to split
                            assert isinstance(value, SplitTensor) and value.cut.dim == 1
                            value = value.share
                        assert value.is_contiguous(memory_format=memory_format)
                    kept = all(value.is_contiguous(memory_format=memory_format) for value in found.values())
                    answers[groups, layer, dtype, layout] = (
                        {**whole(found), **gather_gradients(model), **_statistics(gather_state_dict(model))},
                        kept,
                    )
    return answers


def _statistics(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if "running" in key}


def _by_rank(ranks: int) -> list[Any]:
    return run_ranks_once(ranks, _on_ranks, tuple(groups for p, groups in SPLITS if p == ranks))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("ranks", "groups"), SPLITS)
def test_split_layer_computes_what_the_whole_one_does(ranks: int, groups: int, layer: str, dtype: torch.dtype) -> None:
    for layout in FORMATS:
        model, x = _case(groups, layer, dtype, layout)
        expected = _forward_and_backward(model, x)
        expected |= {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
        expected |= _statistics(model.state_dict())
        for answers in _by_rank(ranks):
            assert_close(answers[groups, layer, dtype, layout][0], expected, TOLERANCES[dtype])


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("ranks", "groups"), SPLITS)
def test_memory_format_of_the_input_is_kept(ranks: int, groups: int, layout: str) -> None:
    for answers in _by_rank(ranks):
        lost = [key for key, (_, kept) in answers.items() if key[0] == groups and key[3] == layout and not kept]
        assert not lost
