"""A two-level layer is the operator A_2L of Equations (3.3) to (3.5), in values and in every gradient, and with r
representatives a group, kept apart or summed; of images, waveforms and volumes.

The reference writes A_2L as one dense matrix from (n H W) to (m h w), block by block, in float64, and lets autograd
differentiate the product. It uses no convolution.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tlgc_mp.nn import TwoLevelConv1d, TwoLevelConv2d, TwoLevelConv3d
from tlgc_mp.nn.two_level import COARSE_MODES, TwoLevelConvNd

Sizes = tuple[int, ...]

SEEDS = range(120)
LAYERS = {1: TwoLevelConv1d, 2: TwoLevelConv2d, 3: TwoLevelConv3d}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


@dataclass(frozen=True)
class Case:
    seed: int
    batch: int
    in_channels: int
    out_channels: int
    size: Sizes
    kernel: Sizes
    coarse_kernel: Sizes
    stride: Sizes
    padding: Sizes
    dilation: Sizes
    groups: int
    bias: bool
    memory_format: torch.memory_format
    weight_format: torch.memory_format
    coarse_channels: int
    coarse_sum: bool

    @property
    def dims(self) -> int:
        return len(self.size)

    @property
    def modes(self) -> list[str]:
        return list(COARSE_MODES) if self.coarse_kernel == self.kernel else ["overlapped"]

    def layer(self) -> TwoLevelConvNd:
        return LAYERS[self.dims](
            self.in_channels,
            self.out_channels,
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias,
            self.coarse_kernel,
            dtype=torch.float64,
            coarse_channels=self.coarse_channels,
            coarse_sum=self.coarse_sum,
        ).to(memory_format=self.weight_format)  # type: ignore[call-overload]


def random_case(seed: int, dims: int = 2) -> Case:
    draw = random.Random(seed)

    def drawn(*values: int) -> Sizes:
        first = draw.choice(values)
        return (first,) * dims if draw.random() < 0.5 else (first, *(draw.choice(values) for _ in range(dims - 1)))

    groups = draw.choice((1, 2, 3, 4))
    kernel, dilation, padding = drawn(1, 2, 3), drawn(1, 2), drawn(0, 1, 2)
    reach = [step * (d - 1) + 1 - 2 * p for step, d, p in zip(dilation, kernel, padding, strict=True)]
    coarse = [
        draw.choice([d0 for d0 in range(1, 6) if step * (d0 - d) % 2 == 0])
        for step, d in zip(dilation, kernel, strict=True)
    ]
    return Case(
        seed=seed,
        batch=draw.choice((1, 2, 3)),
        in_channels=groups * draw.choice((1, 2, 3)),
        out_channels=groups * draw.choice((1, 2, 3)),
        size=tuple(max(each, 1) + draw.randrange(5 if dims < 3 else 3) for each in reach),
        kernel=kernel,
        coarse_kernel=kernel if draw.random() < 0.5 else tuple(coarse),
        stride=drawn(1, 2),
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw.random() < 0.5,
        memory_format=draw.choice((CHANNELS_LAST.get(dims, torch.contiguous_format), torch.contiguous_format)),
        weight_format=draw.choice((CHANNELS_LAST.get(dims, torch.contiguous_format), torch.contiguous_format)),
        coarse_channels=draw.choice((1, 1, 2, 3)),
        coarse_sum=draw.random() < 0.4,
    )


def drawn(case: Case) -> tuple[TwoLevelConvNd, Tensor, Callable[..., Tensor]]:
    """The layer with normal parameters, a normal input, and what draws more of a shape."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    layer = case.layer()
    with torch.no_grad():
        for param in layer.parameters():
            param.copy_(normal(*param.shape))
    x = normal(case.batch, case.in_channels, *case.size).to(memory_format=case.memory_format)
    return layer, x.requires_grad_(), normal


def taps(size: int, out_size: int, kernel: int, stride: int, start: int, dilation: int) -> Tensor:
    """(out_size, kernel, size): 1 where tap ``a`` of output position ``i`` reads input position ``p``, 0 elsewhere."""
    table = torch.zeros(out_size, kernel, size, dtype=torch.float64)
    for i in range(out_size):
        for a in range(kernel):
            position = start + i * stride + a * dilation
            if 0 <= position < size:
                table[i, a, position] = 1.0
    return table


def block(filters: Tensor, case: Case, out_size: Sizes) -> Tensor:
    """[C_d] as a matrix (rows: channel, i, j; columns: channel, p, q), its kernel centred where the fine one is."""
    tables = []
    for axis in range(case.dims):
        kernel = filters.shape[2 + axis]
        twice_start = case.dilation[axis] * (case.kernel[axis] - kernel) - 2 * case.padding[axis]
        assert twice_start % 2 == 0
        start = twice_start // 2
        tables.append(
            taps(case.size[axis], out_size[axis], kernel, case.stride[axis], start, case.dilation[axis]),
        )
    products = {1: "oca,iap->oicp", 2: "ocab,iap,jbq->oijcpq", 3: "ocabe,iap,jbq,ket->oijkcpqt"}
    matrix = torch.einsum(products[case.dims], filters, *tables)
    return matrix.reshape(filters.shape[0] * math.prod(out_size), -1)


def dense_matrix(layer: TwoLevelConvNd, case: Case, out_size: Sizes) -> Tensor:
    """A_2L = sum_k R~_k^T A_k R_k + R0bar^T R_0, Equation (3.5). Where representatives are summed, R0bar^T has
    the same columns for each group."""
    fine = layer.weight.unflatten(0, (case.groups, -1))  # N, m/N, n/N, d, d
    coarse = layer.restriction.unflatten(0, (case.groups, -1))  # N, r, n/N, d0, d0
    group_convolution = torch.block_diag(*[block(filters, case, out_size) for filters in fine])
    restriction = torch.block_diag(*[block(filters, case, out_size) for filters in coarse])
    positions = torch.eye(math.prod(out_size), dtype=torch.float64)
    prolongation = layer.prolongation.repeat(1, case.groups) if case.coarse_sum else layer.prolongation
    return group_convolution + torch.kron(prolongation, positions) @ restriction


def reference(layer: TwoLevelConvNd, x: Tensor, case: Case) -> Tensor:
    reach = [step * (d - 1) + 1 for step, d in zip(case.dilation, case.kernel, strict=True)]
    windows = zip(case.size, case.padding, reach, case.stride, strict=True)
    sizes = tuple((length + 2 * padding - reached) // stride + 1 for length, padding, reached, stride in windows)
    y = x.flatten(1) @ dense_matrix(layer, case, sizes).t()
    y = y.view(case.batch, case.out_channels, *sizes)
    return y if layer.bias is None else y + layer.bias.view(1, -1, *[1] * case.dims)


@pytest.mark.parametrize("dims", LAYERS)
@pytest.mark.parametrize("seed", SEEDS)
def test_output_and_gradients(seed: int, dims: int) -> None:
    case = random_case(seed, dims)
    layer, x, normal = drawn(case)
    expected = reference(layer, x, case)
    inputs = {"input": x, **dict(layer.named_parameters())}
    cotangent = normal(*expected.shape)
    expected_grads = torch.autograd.grad(expected, inputs.values(), cotangent)
    for layer.coarse_mode in case.modes:
        actual = layer(x)
        where = f"{layer.coarse_mode}, {case}"
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10, msg=lambda m, w=where: f"output: {m}\n{w}")
        actual_grads = torch.autograd.grad(actual, inputs.values(), cotangent)
        for name, got, want in zip(inputs, actual_grads, expected_grads, strict=True):
            torch.testing.assert_close(
                got, want, rtol=1e-10, atol=1e-10, msg=lambda m, w=f"{name}, {where}": f"gradient of {w}: {m}"
            )


KINDS: dict[str, Callable[[Case], bool]] = {
    "one group": lambda c: c.groups == 1,
    "more than two groups": lambda c: c.groups > 2,
    "n != m": lambda c: c.in_channels != c.out_channels,
    "d0 = d": lambda c: c.coarse_kernel == c.kernel,
    "d0 > d": lambda c: all(d0 > d for d0, d in zip(c.coarse_kernel, c.kernel, strict=True)),
    "d0 < d, coarse kernel reads less than the padding": lambda c: (
        c.coarse_kernel[0] < c.kernel[0] and c.padding[0] >= c.dilation[0]
    ),
    "d0 < d, no padding": lambda c: c.coarse_kernel[0] < c.kernel[0] and c.padding[0] == 0,
    "d0 > d along one axis and d0 < d along the other": lambda c: (
        (c.coarse_kernel[0] - c.kernel[0]) * (c.coarse_kernel[-1] - c.kernel[-1]) < 0
    ),
    "even kernel": lambda c: c.kernel[0] == 2,
    "1x1": lambda c: max(c.kernel + c.coarse_kernel) == 1,
    "rectangular kernel": lambda c: c.kernel[0] != c.kernel[-1],
    "rectangular image": lambda c: c.size[0] != c.size[-1],
    "stride 2": lambda c: min(c.stride) == 2,
    "stride by axis": lambda c: c.stride[0] != c.stride[-1],
    "dilation 2": lambda c: min(c.dilation) == 2 and c.kernel[0] > 1,
    "no padding": lambda c: max(c.padding) == 0 and c.kernel[0] > 1,
    "bias": lambda c: c.bias,
    "no bias": lambda c: not c.bias,
    "channels_last": lambda c: c.memory_format != torch.contiguous_format and c.in_channels > 1,
    "weights channels_last": lambda c: c.weight_format != torch.contiguous_format and c.in_channels > c.groups,
    "weights contiguous": lambda c: c.weight_format == torch.contiguous_format and c.in_channels > c.groups,
    **{
        f"r = {r}, {'summed' if summed else 'apart'}": lambda c, r=r, summed=summed: (  # type: ignore[misc]
            c.coarse_channels == r and c.coarse_sum == summed and c.groups > 1 and c.coarse_kernel == c.kernel
        )
        for r in (1, 2, 3)
        for summed in (False, True)
    },
    "r = 2, d0 != d": lambda c: c.coarse_channels == 2 and c.coarse_kernel != c.kernel and not c.coarse_sum,
    "summed, d0 != d": lambda c: c.coarse_channels > 1 and c.coarse_kernel != c.kernel and c.coarse_sum,
    "contiguous": lambda c: c.memory_format == torch.contiguous_format and c.in_channels > 1,
}


KINDS_OF_IMAGES = {key for key in KINDS if "axis" in key or "rectangular" in key or "channels_last" in key}
"""Waveforms have no such cases."""


@functools.cache
def cases(dims: int) -> list[Case]:
    return [random_case(seed, dims) for seed in SEEDS]


@pytest.mark.parametrize("dims", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_cases_include(kind: str, dims: int) -> None:
    assert any(map(KINDS[kind], cases(dims))) is not (dims == 1 and kind in KINDS_OF_IMAGES)
