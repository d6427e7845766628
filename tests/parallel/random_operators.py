"""Operators of torch that networks apply to feature maps, (B, C, *spatial) -> a feature map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parallel.random_layers import distinct, feature_map, idiom, need, spread, tokens

# Products and reductions.


@idiom
def einsum_over_channels(x: Tensor) -> Tensor:
    return x * torch.einsum("bc...,bc...->b...", x, x).unsqueeze(1) * 0.1


@idiom
def gram(x: Tensor) -> Tensor:
    f = x.flatten(2)
    return torch.bmm(torch.matmul(f, f.transpose(1, 2)).softmax(-1), f).view_as(x)


@idiom
def non_local(x: Tensor) -> Tensor:
    f = x.flatten(2)
    weights = (f.transpose(1, 2) @ f * x.shape[1] ** -0.5).softmax(-1)
    return x + (f @ weights).view_as(x)


@idiom
def scaled_dot_product(x: Tensor) -> Tensor:
    need(x.shape[1] % 2 == 0)
    q = tokens(x).unflatten(-1, (2, -1)).transpose(1, 2)
    y = F.scaled_dot_product_attention(q, q.flip(2), q)
    return feature_map(y.transpose(1, 2).flatten(2), x.shape)


@idiom
def normalized(x: Tensor) -> Tensor:
    return F.normalize(x) + F.normalize(x, dim=-1)


@idiom
def divided_by_its_norm(x: Tensor) -> Tensor:
    return x / (x.norm(dim=1, keepdim=True) + 0.1) + x / torch.linalg.vector_norm(x)


@idiom
def standardized(x: Tensor) -> Tensor:
    std, mean = torch.std_mean(x, dim=(0, *range(2, x.dim())), keepdim=True)
    return (x - mean) / (std + 0.1) + x.var() + x.std(1, keepdim=True)


@idiom
def layer_norm_function(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[1:]) + F.group_norm(x, 1)


@idiom
def minus_logsumexp(x: Tensor) -> Tensor:
    return x - torch.logsumexp(x, 1, keepdim=True) + x.softmax(1)


@idiom
def extremes(x: Tensor) -> Tensor:
    y = distinct(x)
    value, index = y.max(1, keepdim=True)
    return y / (1 + y.abs().max()) + value * index + y.amin((1, -1), keepdim=True)


@idiom
def cumulated(x: Tensor) -> Tensor:
    return (x.cumsum(1) * 0.1).tanh() + x.cumsum(-1) * 0.05


@idiom
def of_many_kinds(x: Tensor) -> Tensor:
    middle = distinct(x).median(1, keepdim=True).values + distinct(x).quantile(0.3, 1, keepdim=True)
    return x + middle + x.abs().clamp_min(0.2).prod(-1, keepdim=True)


@idiom
def distances(x: Tensor) -> Tensor:
    f = x.mean(-1).flatten(2) if x.dim() > 3 else x
    return x + spread(torch.cdist(f, f.detach() + 1).mean(-1), x)


@idiom
def solved(x: Tensor) -> Tensor:
    f = x.flatten(2)
    gram = f @ f.transpose(1, 2) / f.shape[2] + torch.eye(f.shape[1], dtype=x.dtype)
    return torch.linalg.solve(gram, f).view_as(x) + torch.logdet(gram).mean() * 0.1


@idiom
def transformed(x: Tensor) -> Tensor:
    spectrum = torch.fft.rfft(x, dim=-1)
    spectrum = spectrum * torch.fft.fftfreq(spectrum.shape[-1]).to(x.dtype).add(1)
    return torch.fft.irfft(spectrum, n=x.shape[-1], dim=-1) + torch.fft.fft(x, dim=1).real * 0.1


# Order and choice.


@idiom
def best_channels(x: Tensor) -> Tensor:
    score = distinct(x.mean(tuple(range(2, x.dim()))))
    return x * spread((score >= score.topk(2, 1).values[:, -1:]).to(x.dtype), x)


@idiom
def sorted_channels(x: Tensor) -> Tensor:
    values, order = distinct(x).sort(1)
    return 1.1 * values + torch.gather(x, 1, order.flip(1))  # not its own mirror image, which would have equal values


@idiom
def selected(x: Tensor) -> Tensor:
    order = torch.tensor([2, 0, 1, 1])
    return torch.index_select(x, 1, order) + x[:, order.flip(0)] + x[:, torch.arange(4)]


@idiom
def scattered(x: Tensor) -> Tensor:
    index = torch.arange(x.shape[1]).remainder(3)
    y = torch.zeros_like(x).index_add(1, index, x)
    return y.scatter_add(1, torch.zeros_like(x, dtype=torch.long), x * 0.1)


@idiom
def rectified_by_hand(x: Tensor) -> Tensor:
    return x * (x > 0) + torch.where(x > x.mean(), x * 0.1, torch.zeros_like(x))


@idiom
def some_values(x: Tensor) -> Tensor:
    chosen = x[x > 0.1]
    return x + chosen.mean() * 0.1 if len(chosen) else x


@idiom
def positions(x: Tensor) -> Tensor:
    where = (x.detach() > 1).nonzero()
    return x * (1 + 0.01 * where.shape[0])


@idiom
def sampled(x: Tensor) -> Tensor:
    need(x.dim() == 4)
    turn = torch.tensor([[0.9, 0.1, 0.0], [-0.1, 0.9, 0.1]], dtype=x.dtype).expand(x.shape[0], 2, 3)
    return F.grid_sample(x, F.affine_grid(turn, list(x.shape), align_corners=False), align_corners=False)


@idiom
def resized(x: Tensor) -> Tensor:
    need(max(x.shape[2:]) <= 12)
    return F.interpolate(x, size=[side + 1 for side in x.shape[2:]]) + F.adaptive_avg_pool1d(x.flatten(2), 1).mean()
