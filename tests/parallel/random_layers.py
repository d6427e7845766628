"""Every layer of torch.nn that takes a feature map, with arguments drawn at random.

A piece of a network is made by a function of a source of random numbers and the shape of its input, (B, C, *spatial)
with one to three spatial dimensions, and gives a feature map again. It raises :class:`Unfit` for a shape that it does
not take; so does what it makes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Shape = Sequence[int]
Maker = Callable[[random.Random, Shape], nn.Module]

PIECES: dict[str, Maker] = {}
"""Name of each piece -> what makes it."""


class Unfit(Exception):
    """A piece does not take a feature map of this shape."""


def piece(function: Maker) -> Maker:
    """Registers a piece under the name of the function."""
    PIECES[function.__name__] = function
    return function


def need(condition: Any) -> None:
    if not condition:
        raise Unfit


class Code(nn.Module):
    """A forward pass with the parameters, layers and buffers that it reads from its first argument."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **held: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in held.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", "")


def channels(r: random.Random) -> int:
    """Of an output: mostly a number that two, three and four ranks divide."""
    return r.choice([12, 12, 24, 12, 8, 6, 16, 5, 10])


def divisor(r: random.Random, *totals: int) -> int:
    return r.choice([k for k in range(1, min(totals) + 1) if all(total % k == 0 for total in totals)])


def of_dims(name: str, shape: Shape) -> Any:
    """The class ``name`` of as many dimensions as the feature map has."""
    return getattr(nn, f"{name}{len(shape) - 2}d")


def distinct(x: Tensor) -> Tensor:
    """``x`` without equal values, of which rounding would decide which one is the largest."""
    spread = torch.arange(x.numel(), dtype=x.dtype).mul(0.6180339887).frac()
    return x + spread.mul(1e-2).view(x.shape)


def tokens(x: Tensor) -> Tensor:
    """(B, C, *spatial) -> (B, N, C)"""
    return x.flatten(2).transpose(1, 2)


def feature_map(y: Tensor, shape: Shape) -> Tensor:
    """(B, N, C) -> (B, C, *spatial)"""
    return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], *shape[2:])


def idiom(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Registers code that needs nothing but its input."""

    def make(r: random.Random, shape: Shape) -> Code:
        return Code(named)

    def named(s: Any, x: Tensor) -> Tensor:
        return function(x)

    named.__name__ = function.__name__
    PIECES[function.__name__] = make
    return function


def spread(v: Tensor, x: Tensor) -> Tensor:
    """A value a channel, (C) or (B, C), in the shape of the feature map."""
    return v.reshape(*v.shape, *[1] * (x.dim() - 2))


# Convolutions.


@piece
def convolution(r: random.Random, shape: Shape) -> nn.Module:
    out = channels(r)
    kernel = r.choice([1, 3, 3, 2])
    mode = r.choice(["zeros", "zeros", "zeros", "reflect", "replicate", "circular"])
    stride = r.choice([1, 1, 2])
    padding: Any = r.choice([kernel // 2, "same"]) if stride == 1 else kernel // 2
    groups = r.choice([1, 1, divisor(r, shape[1], out)])
    options = {"bias": r.random() < 0.7, "groups": groups, "dilation": r.choice([1, 1, 2]), "padding_mode": mode}
    return of_dims("Conv", shape)(shape[1], out, kernel, stride, padding, **options)


@piece
def depthwise(r: random.Random, shape: Shape) -> nn.Module:
    options = {"padding": 1, "groups": shape[1], "bias": r.random() < 0.5}
    return of_dims("Conv", shape)(shape[1], shape[1] * r.choice([1, 1, 2]), 3, **options)


@piece
def transposed_convolution(r: random.Random, shape: Shape) -> nn.Module:
    need(max(shape[2:]) <= 12)
    out, stride = channels(r), r.choice([1, 2])
    options = {"groups": r.choice([1, divisor(r, shape[1], out)]), "output_padding": stride - 1}
    return of_dims("ConvTranspose", shape)(shape[1], out, 3, stride, 1, bias=r.random() < 0.7, **options)


@piece
def linear(r: random.Random, shape: Shape) -> nn.Module:
    """Over channels, moved to the end and back."""
    layer = nn.Linear(shape[1], channels(r), bias=r.random() < 0.7)
    return Code(lambda s, x: s.layer(x.movedim(1, -1)).movedim(-1, 1), layer=layer)


@piece
def linear_over_space(r: random.Random, shape: Shape) -> nn.Module:
    return nn.Linear(shape[-1], r.choice([shape[-1], 6]))


@piece
def bilinear(r: random.Random, shape: Shape) -> nn.Module:
    return Code(
        lambda s, x: feature_map(s.layer(tokens(x), tokens(x).flip(1)), x.shape),
        layer=nn.Bilinear(shape[1], shape[1], channels(r)),
    )


@piece
def unfold_and_fold(r: random.Random, shape: Shape) -> nn.Module:
    need(len(shape) == 4)
    return nn.Sequential(nn.Unfold(3, padding=1), nn.Dropout(0.1), nn.Fold(tuple(shape[2:]), 3, padding=1))


# Normalizations.


@piece
def batch_norm(r: random.Random, shape: Shape) -> nn.Module:
    options = {"affine": r.random() < 0.8, "track_running_stats": r.random() < 0.9, "momentum": r.choice([0.1, None])}
    return of_dims("BatchNorm", shape)(shape[1], **options)


@piece
def instance_norm(r: random.Random, shape: Shape) -> nn.Module:
    need(shape[-1] * shape[2] > 3)
    layer = of_dims("InstanceNorm", shape)(shape[1], affine=r.random() < 0.5, track_running_stats=r.random() < 0.5)
    return Code(lambda s, x: _Contiguous.apply(s.layer(x)), layer=layer)


class _Contiguous(torch.autograd.Function):
    """As it is; its gradient as a contiguous one, without which torch's instance norm may be wrong
    (``test_placements.py``)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.contiguous()


@piece
def group_norm(r: random.Random, shape: Shape) -> nn.Module:
    return nn.GroupNorm(divisor(r, shape[1]), shape[1], affine=r.random() < 0.8)


@piece
def layer_norm(r: random.Random, shape: Shape) -> nn.Module:
    return r.choice([nn.LayerNorm, nn.RMSNorm])(list(shape[r.choice([1, 2]) :]))


@piece
def layer_norm_of_channels(r: random.Random, shape: Shape) -> nn.Module:
    layer = r.choice([nn.LayerNorm, nn.RMSNorm])(shape[1])
    return Code(lambda s, x: s.layer(x.movedim(1, -1)).movedim(-1, 1), layer=layer)


@piece
def response_norm(r: random.Random, shape: Shape) -> nn.Module:
    return nn.CrossMapLRN2d(3, 0.1) if len(shape) == 4 and r.random() < 0.3 else nn.LocalResponseNorm(3, 0.1)


# Pools, paddings and other sizes.


@piece
def pool(r: random.Random, shape: Shape) -> nn.Module:
    need(min(shape[2:]) >= 4)
    name = r.choice(["MaxPool", "AvgPool", "LPPool"])
    layer = of_dims(name, shape)(2.0, 2) if name == "LPPool" else of_dims(name, shape)(r.choice([2, 3]), 2, 1)
    return Code(lambda s, x: s.layer(distinct(x).abs() if name == "LPPool" else distinct(x)), layer=layer)


@piece
def adaptive_pool(r: random.Random, shape: Shape) -> nn.Module:
    layer = of_dims(r.choice(["AdaptiveAvgPool", "AdaptiveMaxPool"]), shape)(r.choice([3, 4, 5]))
    return Code(lambda s, x: s.layer(distinct(x)), layer=layer)


@piece
def fractional_pool(r: random.Random, shape: Shape) -> nn.Module:
    need(len(shape) > 3 and min(shape[2:]) >= 4)
    layer = of_dims("FractionalMaxPool", shape)(2, output_ratio=0.7)
    return Code(lambda s, x: s.layer(distinct(x)), layer=layer)


@piece
def unpool(r: random.Random, shape: Shape) -> nn.Module:
    need(min(shape[2:]) >= 4)
    pooling = of_dims("MaxPool", shape)(2, return_indices=True)

    def forward(s: Any, x: Tensor) -> Tensor:
        y, indices = s.pool(distinct(x))
        return s.unpool(y, indices, output_size=x.shape)

    return Code(forward, pool=pooling, unpool=of_dims("MaxUnpool", shape)(2))


@piece
def padding(r: random.Random, shape: Shape) -> nn.Module:
    need(min(shape[2:]) > 2)
    name = r.choice(["ReflectionPad", "ReplicationPad", "ZeroPad", "ConstantPad", "CircularPad"])
    sides = tuple(r.choice([0, 1, 2]) for _ in range(2 * (len(shape) - 2)))
    return of_dims(name, shape)(sides, *([0.3] if name == "ConstantPad" else []))


@piece
def upsample(r: random.Random, shape: Shape) -> nn.Module:
    need(max(shape[2:]) <= 8)
    smooth = {3: "linear", 4: "bilinear", 5: "trilinear"}[len(shape)]
    mode = r.choice(["nearest", "nearest-exact", smooth, *(["bicubic"] if len(shape) == 4 else [])])
    corners = r.random() < 0.5 if mode not in ("nearest", "nearest-exact") else None
    if len(shape) == 4 and r.random() < 0.3:
        return r.choice([nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d])(scale_factor=2)
    return nn.Upsample(scale_factor=r.choice([2, 1.5]), mode=mode, align_corners=corners)


@piece
def pixel_shuffle(r: random.Random, shape: Shape) -> nn.Module:
    need(len(shape) == 4)
    if r.random() < 0.5:
        need(shape[1] % 4 == 0 and shape[1] >= 16 and shape[2] <= 8)
        return nn.PixelShuffle(2)
    need(shape[2] % 2 == 0 and shape[3] % 2 == 0 and shape[1] <= 12)
    return nn.PixelUnshuffle(2)


@piece
def channel_shuffle(r: random.Random, shape: Shape) -> nn.Module:
    return nn.ChannelShuffle(divisor(r, shape[1]))


@piece
def flatten(r: random.Random, shape: Shape) -> nn.Module:
    if len(shape) == 3 or r.random() < 0.5:
        return nn.Sequential(nn.Flatten(), nn.Unflatten(1, tuple(shape[1:])))
    return nn.Sequential(nn.Flatten(1, 2), nn.Unflatten(1, tuple(shape[1:3])))


# Activations and dropout.

ACTIVATIONS = [
    *(nn.ELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardtanh, nn.Hardswish, nn.LeakyReLU, nn.LogSigmoid, nn.ReLU),
    *(nn.ReLU6, nn.RReLU, nn.SELU, nn.CELU, nn.GELU, nn.Sigmoid, nn.SiLU, nn.Mish, nn.Softplus, nn.Softshrink),
    *(nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Identity),
]
IN_PLACE = (nn.ELU, nn.Hardtanh, nn.Hardswish, nn.LeakyReLU, nn.ReLU, nn.ReLU6, nn.RReLU, nn.SELU, nn.CELU, nn.SiLU)
DROPOUTS = [nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout]


@piece
def activation(r: random.Random, shape: Shape) -> nn.Module:
    kind = r.choice(ACTIVATIONS)
    return kind(inplace=True) if kind in IN_PLACE and r.random() < 0.3 else kind()


@piece
def threshold(r: random.Random, shape: Shape) -> nn.Module:
    return nn.Threshold(0.1, 0.2, inplace=r.random() < 0.3)


@piece
def prelu(r: random.Random, shape: Shape) -> nn.Module:
    return nn.PReLU(r.choice([1, shape[1]]))


@piece
def gated(r: random.Random, shape: Shape) -> nn.Module:
    dim = r.choice([i for i in range(1, len(shape)) if shape[i] % 2 == 0] or [0])
    need(dim == 1 or (dim > 1 and shape[dim] > 4))
    return nn.GLU(dim)


@piece
def softmax(r: random.Random, shape: Shape) -> nn.Module:
    if len(shape) == 4 and r.random() < 0.3:
        return nn.Softmax2d()
    return r.choice([nn.Softmax, nn.Softmin, nn.LogSoftmax])(r.choice([1, -1, 2]))


@piece
def dropout(r: random.Random, shape: Shape) -> nn.Module:
    kind = r.choice([*DROPOUTS, of_dims("Dropout", shape)])
    return kind(r.choice([0.1, 0.3]), inplace=r.random() < 0.2)


# Layers of sequences.


@piece
def attention(r: random.Random, shape: Shape) -> nn.Module:
    need(shape[2:].numel() <= 128 if isinstance(shape, torch.Size) else True)
    heads = r.choice([k for k in (1, 2, 3, 4) if shape[1] % k == 0])
    layer = nn.MultiheadAttention(shape[1], heads, dropout=r.choice([0.0, 0.1]), batch_first=True)
    first, need_weights = r.choice([True, False]), r.random() < 0.5

    def forward(s: Any, x: Tensor) -> Tensor:
        t = tokens(x)
        y, weights = s.layer(t, t if first else t.flip(1), t, need_weights=need_weights)
        return feature_map(y if weights is None else y * weights.mean(), x.shape)

    return Code(forward, layer=layer)


@piece
def transformer(r: random.Random, shape: Shape) -> nn.Module:
    heads = r.choice([k for k in (1, 2, 3) if shape[1] % k == 0])
    kind = r.choice([nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
    layer = kind(shape[1], heads, 24, 0.1, batch_first=True, norm_first=r.random() < 0.5)
    two = kind is nn.TransformerDecoderLayer
    return Code(lambda s, x: feature_map(s.layer(tokens(x), *[tokens(x)] * two), x.shape), layer=layer)


@piece
def recurrent(r: random.Random, shape: Shape) -> nn.Module:
    kind = r.choice([nn.RNN, nn.LSTM, nn.GRU])
    both = r.random() < 0.3
    layer = kind(shape[1], channels(r), num_layers=r.choice([1, 2]), dropout=0.1, bidirectional=both, batch_first=True)
    return Code(lambda s, x: feature_map(s.layer(tokens(x))[0], x.shape), layer=layer)


@piece
def recurrent_cell(r: random.Random, shape: Shape) -> nn.Module:
    kind = r.choice([nn.RNNCell, nn.LSTMCell, nn.GRUCell])

    def forward(s: Any, x: Tensor) -> Tensor:
        state, found = None, []
        for step in tokens(x)[:, :6].unbind(1):
            state = s.cell(step, state)
            found.append(state[0] if isinstance(state, tuple) else state)
        y = torch.stack(found, 2)
        return y.view(*y.shape[:2], *[1] * (x.dim() - 3), len(found)).expand(-1, -1, *x.shape[2:-1], -1)

    return Code(forward, cell=kind(shape[1], channels(r)))


@piece
def embedding(r: random.Random, shape: Shape) -> nn.Module:
    """Of the channel that is the largest at each position."""
    layer = nn.Embedding(shape[1], channels(r))
    return Code(lambda s, x: s.layer(distinct(x).argmax(1)).movedim(-1, 1) * x.mean(1, keepdim=True), layer=layer)


@piece
def embedding_bag(r: random.Random, shape: Shape) -> nn.Module:
    layer = nn.EmbeddingBag(shape[1], shape[1], mode=r.choice(["sum", "mean", "max"]))

    def forward(s: Any, x: Tensor) -> Tensor:
        bags = s.layer(distinct(x).flatten(2).argmax(1))
        return x * bags.view(*bags.shape, *[1] * (x.dim() - 2))

    return Code(forward, layer=layer)


@piece
def similarity(r: random.Random, shape: Shape) -> nn.Module:
    kind = r.choice([nn.CosineSimilarity(1), nn.PairwiseDistance(2)])
    if isinstance(kind, nn.CosineSimilarity):
        return Code(lambda s, x: x * s.layer(x, x.flip(1)).unsqueeze(1), layer=kind)
    return Code(lambda s, x: x / (1 + s.layer(x, x.roll(1, 1)).unsqueeze(-1)), layer=kind)
