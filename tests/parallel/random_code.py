"""What the code of networks does with a feature map between their layers: idioms of all kinds.

Each function here takes a feature map (B, C, *spatial) and gives one; operators are in ``random_operators.py``, and
what holds parameters or layers in ``random_modules.py``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parallel.random_layers import idiom, need

# Joining and cutting.


@idiom
def joined(x: Tensor) -> Tensor:
    return torch.cat([x, x.sigmoid()], 1)


@idiom
def joined_with_plain(x: Tensor) -> Tensor:
    ramp = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype).expand(x.shape[0], 2, *x.shape[2:])
    return torch.cat([ramp, x], dim=1)


@idiom
def joined_unevenly(x: Tensor) -> Tensor:
    return torch.cat([x[:, :1], x, x.mean(1, keepdim=True), x[:, 1:2]], 1)


@idiom
def joined_over_space(x: Tensor) -> Tensor:
    return torch.cat([x, x.flip(-1) * 2], -1)[..., 1 : x.shape[-1] + 1]


@idiom
def stacked(x: Tensor) -> Tensor:
    return torch.stack([x, x.tanh()], 2).flatten(1, 2)


@idiom
def chunked(x: Tensor) -> Tensor:
    first, *others = x.chunk(3, 1)
    return torch.cat([first.relu(), *others[::-1]], 1)


@idiom
def cut_unevenly(x: Tensor) -> Tensor:
    a, b = torch.split(x, [2, x.shape[1] - 2], dim=1)
    return b + a.sum(1, keepdim=True)


@idiom
def unbound(x: Tensor) -> Tensor:
    return torch.stack([p if i % 2 else p.sin() for i, p in enumerate(x.unbind(1))], 1)


@idiom
def sliced(x: Tensor) -> Tensor:
    return x[:, 1:] - x[:, :-1]


@idiom
def every_second(x: Tensor) -> Tensor:
    return x[:, ::2] + x[:, -1:]


@idiom
def padded_channels(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0) * (x.dim() - 2) + (1, 2))


@idiom
def shortcut_of_option_a(x: Tensor) -> Tensor:
    y = x.repeat_interleave(2, 1)
    return F.relu(y + F.pad(x, (0, 0) * (x.dim() - 2) + (0, y.size(1) - x.size(1))))


@idiom
def flipped(x: Tensor) -> Tensor:
    return x.flip(1) + x.roll(1, 1) + x.roll(2, -1)


@idiom
def shuffled_by_view(x: Tensor) -> Tensor:
    b, c = x.shape[:2]
    need(c % 4 == 0)
    return x.view(b, 4, c // 4, *x.shape[2:]).transpose(1, 2).reshape(x.shape)


@idiom
def folded_into_batch(x: Tensor) -> Tensor:
    b, c = x.shape[:2]
    y = x.reshape(b * c, 1, *x.shape[2:])
    return (y * y.abs().mean()).view(b, c, *x.shape[2:])


@idiom
def space_to_depth(x: Tensor) -> Tensor:
    need(x.shape[-1] % 2 == 0 and x.shape[1] <= 12)
    return torch.cat([x[..., ::2], x[..., 1::2]], 1)


@idiom
def repeated(x: Tensor) -> Tensor:
    return x.repeat(1, 2, *[1] * (x.dim() - 2)) * 0.5


@idiom
def windows(x: Tensor) -> Tensor:
    need(x.shape[-1] >= 3)
    return x.unfold(-1, 3, 1).amax(-1).contiguous() + x.unfold(1, 2, 1)[:, :1, ..., 0][..., :-2]


@idiom
def strided(x: Tensor) -> Tensor:
    y = x.contiguous()
    return y.as_strided(y.size(), y.stride()) * 2


# In place.


@idiom
def added_in_place(x: Tensor) -> Tensor:
    y = x * 2
    y += 1
    y.mul_(0.5).clamp_(-2, 2)
    return y


@idiom
def channels_assigned(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = 0.5
    y[:, 1:3] = x[:, :2] * 2
    y[:, -1] += y[:, 2]
    return y


@idiom
def written_through_a_view(x: Tensor) -> Tensor:
    y = x * 1
    half = y.narrow(1, 1, y.shape[1] // 2)
    half.mul_(3)
    y.view(y.shape[0], -1)[:, :3] = 0
    return y + half.mean()


@idiom
def swapped_in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, [0, 1]] = y[:, [1, 0]]
    return y


@idiom
def filled_by_mask(x: Tensor) -> Tensor:
    y = x + 0
    y[y > 0.5] = 0.1
    y.masked_fill_(y < -0.5, -0.2)
    return y


@idiom
def written_into_zeros(x: Tensor) -> Tensor:
    y = torch.zeros(x.shape[0], x.shape[1] + 2, *x.shape[2:], dtype=x.dtype)
    y[:, 1:-1] = x
    return y


@idiom
def new_of_the_input(x: Tensor) -> Tensor:
    y = x.new_zeros(x.shape)
    y.copy_(x)
    return y + torch.ones_like(x) + x.new_full((1, x.shape[1], *[1] * (x.dim() - 2)), 0.3)


@idiom
def out_argument(x: Tensor) -> Tensor:
    with torch.no_grad():
        where = torch.empty_like(x)
        torch.mul(x, 0.5, out=where)
    return x + where


@idiom
def squeezed_in_place(x: Tensor) -> Tensor:
    return x.unsqueeze(1).squeeze_(1).transpose(1, 2).transpose_(1, 2)


# Values that steer Python.


@idiom
def branched(x: Tensor) -> Tensor:
    if x.mean().item() > 0.123:
        return x.relu()
    return x * 2 if x.abs().max() > 1 else x.sigmoid()


@idiom
def scaled_by_a_number(x: Tensor) -> Tensor:
    return x / (1 + float(x.detach().abs().max())) + max(x.shape) * 0.01 + int((x > 0).sum()) * 1e-3


@idiom
def quantized(x: Tensor) -> Tensor:
    step = x.detach().abs().max() / 7.3
    return x + ((x / step).round() * step - x).detach()


@idiom
def shapes(x: Tensor) -> Tensor:
    b, c, *_ = x.shape
    place = torch.arange(c, dtype=x.dtype).view(1, c, *[1] * (x.dim() - 2)) / c
    return x * c**-0.5 + place * (x.numel() // b) ** -0.5 + (x.size(1) % 5) * 0.1 + x.stride(0) * 1e-4


@idiom
def through_numpy(x: Tensor) -> Tensor:
    return x * float(x.detach().cpu().numpy().std() + 0.5) + torch.as_tensor(x.detach().numpy()).mean()


@idiom
def lists(x: Tensor) -> Tensor:
    rows = x.detach().mean(tuple(range(2, x.dim()))).tolist()
    return x * torch.tensor(rows, dtype=x.dtype).view(*x.shape[:2], *[1] * (x.dim() - 2)) + len(x)


@idiom
def per_image(x: Tensor) -> Tensor:
    return torch.stack([image * (1 + 0.1 * index) - image.mean(0) for index, image in enumerate(x)])


@idiom
def formats(x: Tensor) -> Tensor:
    y = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()
    y = y if y.is_contiguous() else y.contiguous()
    return y.to(x.device).type_as(x).float().double() * 0.5 + y.to(torch.float64)


# Random numbers.


@idiom
def noisy(x: Tensor) -> Tensor:
    return x + 0.1 * torch.randn_like(x) + 0.1 * torch.rand(x.shape[1], *[1] * (x.dim() - 2), dtype=x.dtype)


@idiom
def dropped_functionally(x: Tensor) -> Tensor:
    return F.dropout(x, 0.2) + F.dropout1d(x.flatten(2), 0.2).view_as(x) + F.alpha_dropout(x, 0.1, training=True)


@idiom
def dropped_path(x: Tensor) -> Tensor:
    keep = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(0.7).div_(0.7)
    return x + x.tanh() * keep


@idiom
def permuted_at_random(x: Tensor) -> Tensor:
    return x[:, torch.randperm(x.shape[1])] + torch.bernoulli(torch.full_like(x, 0.5)) * 0.1


@idiom
def softmax_of_gumbel(x: Tensor) -> Tensor:
    return x * F.gumbel_softmax(x, dim=1) + F.rrelu(x, training=True)


# Gradients inside of a forward pass.


@idiom
def detached_part(x: Tensor) -> Tensor:
    with torch.no_grad():
        centre = x.mean(1, keepdim=True)
    return x - centre + (x.sign() - x.tanh()).detach() * 0.1 + x.tanh()


@idiom
def gradient_of_an_energy(x: Tensor) -> Tensor:
    with torch.enable_grad():
        y = x if x.requires_grad else x.detach().requires_grad_()
        (slope,) = torch.autograd.grad((y.tanh() ** 2).sum(), y, create_graph=True)
    return x - 0.1 * slope


@idiom
def own_gradient(x: Tensor) -> Tensor:
    return _Straight.apply(x)


class _Straight(torch.autograd.Function):
    """Its sign, with the gradient of a clipped identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x.sign() * x.abs().mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad * (x.abs() < 1)


@idiom
def hooked_tensor(x: Tensor) -> Tensor:
    y = x * 1
    if y.requires_grad:
        y.register_hook(lambda grad: grad - grad.mean(1, keepdim=True))
    return y


@idiom
def mapped(x: Tensor) -> Tensor:
    return torch.func.vmap(lambda image: image / (1 + image.abs().sum(0)))(x)
