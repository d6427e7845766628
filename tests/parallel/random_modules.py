"""What networks do with their layers and parameters besides calling them once, and pieces made of other pieces."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from tests.parallel.random_layers import (
    PIECES,
    Code,
    Shape,
    channels,
    feature_map,
    need,
    of_dims,
    piece,
    spread,
    tokens,
)


def conv(shape: Shape, out: int | None = None, kernel: int = 3, **options: Any) -> Any:
    """A convolution that keeps the size."""
    return of_dims("Conv", shape)(shape[1], out or shape[1], kernel, padding=kernel // 2, **options)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    function: Any = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    return function(x, weight, bias, **options)


def upsampled(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
    function: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[x.dim() - 3]
    return function(x, weight, **options)


# Layers used twice, and weights that other code reads.


@piece
def called_twice(r: random.Random, shape: Shape) -> nn.Module:
    return Code(lambda s, x: s.layer(s.layer(x).relu() + x), layer=conv(shape))


@piece
def weight_used_twice(r: random.Random, shape: Shape) -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        weight, bias = s.layer.weight, s.layer.bias
        return s.layer(x) + convolved(x, weight, bias, padding=2, dilation=2) + convolved(x, weight.flip(-1), padding=1)

    return Code(forward, layer=conv(shape))


@piece
def auto_encoder(r: random.Random, shape: Shape) -> nn.Module:
    return Code(lambda s, x: upsampled(s.layer(x).tanh(), s.layer.weight, padding=1), layer=conv(shape, channels(r)))


@piece
def tied(r: random.Random, shape: Shape) -> nn.Module:
    """Two layers of one parameter, cut alike or not."""
    first, second = nn.Linear(shape[1], shape[1]), nn.Linear(shape[1], shape[1], bias=False)
    second.weight = first.weight
    if r.random() < 0.5:
        other = conv(shape, kernel=1)
        other.bias = first.bias
        return Code(lambda s, x: s.b(s.a(x.movedim(1, -1)).relu()).movedim(-1, 1) + s.c(x), a=first, b=second, c=other)
    return Code(lambda s, x: s.b(s.a(x.movedim(1, -1)).relu()).movedim(-1, 1), a=first, b=second)


@piece
def standardized_weight(r: random.Random, shape: Shape) -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        weight = s.layer.weight
        dims = tuple(range(1, weight.dim()))
        weight = (weight - weight.mean(dims, keepdim=True)) / (weight.std(dims, keepdim=True) + 1e-3)
        return convolved(x, weight, s.layer.bias, padding=1)

    return Code(forward, layer=conv(shape, channels(r)))


@piece
def penalty_of_weights(r: random.Random, shape: Shape) -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.norm(s.layer(x))
        penalty = s.layer.weight.pow(2).sum() + s.norm.weight.abs().sum() + s.layer.bias.norm()
        return y + 0.01 * penalty * (s.layer.weight.shape[0] / 7)

    out = 12
    return Code(forward, layer=conv(shape, out), norm=of_dims("BatchNorm", shape)(out))


@piece
def fused_norm(r: random.Random, shape: Shape) -> nn.Module:
    """Folds running statistics into the filters, as deployment code does."""

    def forward(s: Any, x: Tensor) -> Tensor:
        scale = s.norm.weight / (s.norm.running_var + s.norm.eps).sqrt()
        weight = s.layer.weight * scale.view(-1, *[1] * (x.dim() - 1))
        bias = s.norm.bias + (s.layer.bias - s.norm.running_mean) * scale
        return convolved(x, weight, bias, padding=1)

    out = channels(r)
    return Code(forward, layer=conv(shape, out), norm=of_dims("BatchNorm", shape)(out))


@piece
def linear_by_hand(r: random.Random, shape: Shape) -> nn.Module:
    layer = nn.Linear(shape[1], channels(r))
    return Code(lambda s, x: feature_map(tokens(x) @ s.layer.weight.t() + s.layer.bias, x.shape), layer=layer)


# Parameters, buffers and layers held in other ways.


@piece
def scale_and_shift(r: random.Random, shape: Shape) -> nn.Module:
    ones = [1] * (len(shape) - 2)
    scale = nn.Parameter(torch.randn(1, shape[1], *ones))
    shift = nn.Parameter(torch.randn(shape[1], *ones))
    return Code(lambda s, x: x * s.scale + s.shift.sigmoid(), scale=scale, shift=shift)


@piece
def layer_scale(r: random.Random, shape: Shape) -> nn.Module:
    return Code(
        lambda s, x: x + s.layer(x) * spread(s.gamma, x), layer=conv(shape), gamma=nn.Parameter(torch.rand(shape[1]))
    )


@piece
def mixing_matrix(r: random.Random, shape: Shape) -> nn.Module:
    matrix = nn.Parameter(torch.randn(channels(r), shape[1]) / 3)
    return Code(lambda s, x: torch.einsum("bc...,dc->bd...", x, s.matrix), matrix=matrix)


@piece
def class_token(r: random.Random, shape: Shape) -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        t = torch.cat([s.token.expand(x.shape[0], -1, -1), tokens(x)], 1) + s.place
        t = s.norm(t)
        return feature_map(t[:, 1:] * t[:, :1].sigmoid(), x.shape)

    count = 1
    for side in shape[2:]:
        count *= side
    place = nn.Parameter(torch.randn(1, count + 1, shape[1]))
    return Code(forward, token=nn.Parameter(torch.randn(1, 1, shape[1])), place=place, norm=nn.LayerNorm(shape[1]))


@piece
def lists_of_parameters(r: random.Random, shape: Shape) -> nn.Module:
    scales = nn.ParameterList([nn.Parameter(torch.rand(shape[1])) for _ in range(2)])
    named = nn.ParameterDict({"shift": nn.Parameter(torch.rand(1))})
    return Code(lambda s, x: sum(x * spread(p, x) for p in s.scales) + s.named["shift"], scales=scales, named=named)


@piece
def layers_in_lists(r: random.Random, shape: Shape) -> nn.Module:
    """In a Python list and a dict beside the modules that register them."""
    layers = nn.ModuleList([conv(shape), of_dims("BatchNorm", shape)(shape[1])])
    made = Code(lambda s, x: s.table["second"](s.steps[0](x).relu()), layers=layers)
    made.steps = list(layers)  # type: ignore[assignment]
    made.table = {"second": layers[1]}  # type: ignore[assignment]
    return made


@piece
def running_centre(r: random.Random, shape: Shape) -> nn.Module:
    """Centres with a running mean of its own, as centre losses and codebooks do."""

    def forward(s: Any, x: Tensor) -> Tensor:
        if s.training:
            with torch.no_grad():
                s.centre.mul_(0.9).add_(x.mean((0, *range(2, x.dim()))), alpha=0.1)
                s.steps += 1
        return x - spread(s.centre, x) * s.steps

    return Code(forward, centre=torch.zeros(shape[1]), steps=torch.zeros(()))


@piece
def replaced_buffer(r: random.Random, shape: Shape) -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        s.last = x.detach().mean(tuple(range(2, x.dim())))[0]
        return x + spread(s.last, x) * 0.1

    return Code(forward, last=torch.zeros(shape[1]))


# Hooks.


@piece
def forward_hooks(r: random.Random, shape: Shape) -> nn.Module:
    layer = conv(shape)
    layer.register_forward_pre_hook(lambda module, args: (args[0] - args[0].mean(1, keepdim=True),))
    layer.register_forward_hook(lambda module, args, out: F.normalize(out) + args[0].softmax(1))
    return layer


@piece
def hooks_with_keywords(r: random.Random, shape: Shape) -> nn.Module:
    layer = conv(shape)
    layer.register_forward_hook(lambda m, args, kwargs, out: out.flip(1) * out.shape[1] ** -0.5, with_kwargs=True)
    return Code(lambda s, x: s.layer(input=x), layer=layer)


@piece
def backward_hooks(r: random.Random, shape: Shape) -> nn.Module:
    layer = nn.Sequential(conv(shape), nn.Tanh())
    layer.register_full_backward_pre_hook(lambda module, grads: (grads[0] - grads[0].mean(1, keepdim=True),))
    layer.register_full_backward_hook(lambda module, ins, outs: (ins[0].flip(1) + outs[0] * 0.1,))
    layer[0].register_full_backward_hook(lambda module, ins, outs: (ins[0] * outs[0].abs().mean(),))
    return layer


@piece
def gradient_hooks_of_parameters(r: random.Random, shape: Shape) -> nn.Module:
    scale, layer = nn.Parameter(torch.rand(shape[1])), conv(shape)
    scale.register_hook(lambda grad: grad - grad.mean())
    layer.weight.register_hook(lambda grad: grad / (grad.norm() + 0.1))
    return Code(lambda s, x: s.layer(x * spread(s.scale, x)), scale=scale, layer=layer)


# Weights that are computed.


@piece
def parametrized(r: random.Random, shape: Shape) -> nn.Module:
    apply: Callable[[Any], Any] = r.choice(
        [
            parametrizations.weight_norm,
            parametrizations.spectral_norm,
            parametrizations.orthogonal,
            nn.utils.weight_norm,
            nn.utils.spectral_norm,
            lambda layer: parametrize.register_parametrization(layer, "weight", Symmetric()),
        ]
    )
    kind = r.choice(["conv", "linear"])
    if kind == "linear":
        layer = apply(nn.Linear(shape[1], channels(r)))
        return Code(lambda s, x: s.layer(x.movedim(1, -1)).movedim(-1, 1), layer=layer)
    return apply(conv(shape, channels(r)))


class Symmetric(nn.Module):
    """Takes a weight's mean away, and adds it turned around."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight - weight.mean() + weight.flip(0) * 0.3


@piece
def pruned(r: random.Random, shape: Shape) -> nn.Module:
    layer = conv(shape, channels(r))
    torch.manual_seed(r.randrange(1000))
    kind = r.choice(["random", "structured", "l1", "removed"])
    if kind == "structured":
        return prune.ln_structured(layer, "weight", amount=0.3, n=2, dim=0)
    if kind == "l1":
        return prune.l1_unstructured(prune.random_unstructured(layer, "bias", amount=0.2), "weight", amount=0.3)
    prune.random_unstructured(layer, "weight", amount=0.3)
    return prune.remove(layer, "weight") if kind == "removed" else layer


# Blocks.


@piece
def squeeze_and_excite(r: random.Random, shape: Shape) -> nn.Module:
    layers = nn.Sequential(nn.Linear(shape[1], 4), nn.ReLU(), nn.Linear(4, shape[1]), nn.Sigmoid())
    return Code(lambda s, x: x * spread(s.layers(x.flatten(2).mean(2)), x), layers=layers)


@piece
def efficient_channel_attention(r: random.Random, shape: Shape) -> nn.Module:
    layer = nn.Conv1d(1, 1, 3, padding=1, bias=False)
    return Code(
        lambda s, x: x * spread(s.layer(x.flatten(2).mean(2).unsqueeze(1)).squeeze(1).sigmoid(), x), layer=layer
    )


@piece
def attention_over_space(r: random.Random, shape: Shape) -> nn.Module:
    layer = of_dims("Conv", shape)(2, 1, 3, padding=1)

    def forward(s: Any, x: Tensor) -> Tensor:
        return x * s.layer(torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)).sigmoid()

    return Code(forward, layer=layer)


@piece
def filters_per_image(r: random.Random, shape: Shape) -> nn.Module:
    """Makes filters of each image, and convolves the batch as groups."""
    layer = nn.Linear(shape[1], shape[1] * 3)

    def forward(s: Any, x: Tensor) -> Tensor:
        b, c = x.shape[:2]
        weight = s.layer(x.flatten(2).mean(2)).view(b * c, 1, 3, *[1] * (x.dim() - 3))
        y = convolved(x.reshape(1, b * c, *x.shape[2:]), weight, groups=b * c, padding=(1, *[0] * (x.dim() - 3)))
        return y.view(x.shape)

    return Code(forward, layer=layer)


@piece
def dense_block(r: random.Random, shape: Shape) -> nn.Module:
    need(shape[1] <= 12)
    layers = nn.ModuleList([of_dims("Conv", shape)(shape[1] + 4 * i, 4, 3, padding=1) for i in range(2)])

    def forward(s: Any, x: Tensor) -> Tensor:
        features = [x]
        for layer in s.layers:
            features.append(layer(torch.cat(features, 1)).relu())
        return torch.cat(features, 1)

    return Code(forward, layers=layers)


@piece
def capsule(r: random.Random, shape: Shape) -> nn.Module:
    need(shape[1] % 4 == 0)
    layer = conv(shape, groups=2 if shape[1] % 2 == 0 else 1)

    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.layer(x).unflatten(1, (4, -1))
        square = y.pow(2).sum(2, keepdim=True)
        return (y * square / (1 + square) / (square + 1e-3).sqrt()).flatten(1, 2)

    return Code(forward, layer=layer)


def _inner(r: random.Random, shape: Shape) -> nn.Module:
    name = r.choice([name for name in PIECES if name not in _OUTER])
    return PIECES[name](r, shape)


@piece
def residual(r: random.Random, shape: Shape) -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.inner(x)
        return x + y if y.shape == x.shape else y

    return Code(forward, inner=_inner(r, shape))


@piece
def branches(r: random.Random, shape: Shape) -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        found = [s.first(x * 1), s.second(x * 1)]
        same = found[0].shape[2:] == found[1].shape[2:]
        return torch.cat(found, 1)[:, :16] if same else found[0] + found[1].mean()

    return Code(forward, first=_inner(r, shape), second=_inner(r, shape))


@piece
def checkpointed(r: random.Random, shape: Shape) -> nn.Module:
    reentrant = r.random() < 0.5
    return Code(lambda s, x: checkpoint(s.inner, x * 1, use_reentrant=reentrant), inner=conv(shape, channels(r)))


@piece
def checkpointed_code(r: random.Random, shape: Shape) -> nn.Module:
    reentrant = r.random() < 0.5

    def inner(layer: Any, x: Tensor) -> Tensor:
        return F.normalize(layer(F.dropout(x, 0.2))) * x.abs().max()

    return Code(lambda s, x: checkpoint(inner, s.layer, x, use_reentrant=reentrant), layer=conv(shape, channels(r)))


_OUTER = ("residual", "branches")
