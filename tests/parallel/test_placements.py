"""Layers of every placement, whole ones included, in small networks: two steps of SGD, against one device. float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from tests.parallel.common import SEED, assert_close, gather_gradients, run_ranks_once
from tlgc_mp.nn import FullyLearnableGroupConv2d, ShuffleConv2d, TwoLevelConv2d
from tlgc_mp.parallel import gather_state_dict, shard
from tlgc_mp.parallel.plan import plan

RANKS = (2, 3)


def _images(*middle: nn.Module, width: int = 12, head: int = 12) -> nn.Module:
    """A stem of ``width`` channels, ``middle``, and a head that reads ``head`` channels."""
    stem = nn.Conv2d(3, width, 3, padding=1)
    return nn.Sequential(stem, nn.SiLU(), *middle, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(head, 5))


class _TiedLanguageModel(nn.Module):
    """Its head's weight is that of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(F.silu(self.hidden(self.embedding(tokens)))).mean(1)


class _AttentionThenRecurrence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.recurrent = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(self.recurrent(x + self.attention(x, x, x)[0])[0][:, -1])


class _Attention(nn.Module):
    """Attention as transformers of timm write it, over the pixels: one layer for queries, keys and values, or two."""

    def __init__(self, width: int, heads: int, fused: bool, flash: bool) -> None:
        super().__init__()
        self.heads, self.fused, self.flash = heads, fused, flash
        if fused:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q = nn.Linear(width, width, bias=False)
            self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[2]
        x = x.flatten(2).transpose(1, 2)  # images, pixels, channels
        images, pixels, width = x.shape
        if self.fused:
            q, k, v = self.qkv(x).reshape(images, pixels, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q = self.q(x).reshape(images, pixels, self.heads, -1).transpose(1, 2)
            k, v = self.kv(x).reshape(images, pixels, 2, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.flash:
            seen = F.scaled_dot_product_attention(q, k, v)
        else:
            seen = ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(-1) @ v
        return self.proj(seen.transpose(1, 2).reshape(images, pixels, width)).transpose(1, 2).unflatten(2, (height, -1))


class _AttentionOfTorch(nn.Module):
    """nn.MultiheadAttention, as a layer of an encoder, with its weights, and with keys of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.TransformerEncoderLayer(12, 6, 24, dropout=0.1, batch_first=True)
        self.attend = nn.MultiheadAttention(12, 6, add_bias_kv=True)
        self.look = nn.MultiheadAttention(12, 6, dropout=0.1, kdim=6, vdim=18, bias=False)
        self.key, self.value = nn.Linear(12, 6), nn.Linear(12, 18)

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[2]
        y = self.encode(x.flatten(2).transpose(1, 2)).transpose(0, 1)
        y, weights = self.attend(y, y, y)
        y = self.look(y, self.key(y), self.value(y), need_weights=False)[0] * weights.amax((1, 2))[None, :, None]
        return y.permute(1, 2, 0).unflatten(2, (height, -1))


def _tied_alike() -> nn.Module:
    first, second = (nn.Conv2d(12, 12, 3, padding=1) for _ in range(2))
    second.weight = first.weight
    return _images(first, nn.SiLU(), second)


def _frozen_statistics() -> nn.Module:
    norm = nn.BatchNorm2d(12, momentum=None)
    return _images(norm, nn.BatchNorm2d(12, affine=False), nn.BatchNorm2d(12, track_running_stats=False))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "two linear layers": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 24), nn.SiLU(), nn.Linear(24, 5)),
    "linear layers that do not divide": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(192, 7), nn.SiLU(), nn.Linear(7, 5)
    ),
    "GroupNorm": lambda: _images(nn.GroupNorm(3, 12), nn.GroupNorm(12, 12), nn.GroupNorm(1, 12)),
    "LayerNorm": lambda: _images(nn.LayerNorm([12, 8, 8]), nn.LayerNorm(8), nn.LayerNorm([8, 8], bias=False)),
    "InstanceNorm": lambda: _images(nn.InstanceNorm2d(12, affine=True, track_running_stats=True)),
    "BatchNorm": _frozen_statistics,
    "PReLU": lambda: _images(nn.PReLU(12), nn.PReLU()),
    "ConvTranspose": lambda: _images(
        nn.ConvTranspose2d(12, 6, 2, stride=2),
        nn.ConvTranspose2d(6, 18, 2, stride=2),
        nn.ConvTranspose2d(18, 12, 3, groups=6, bias=False),
    ),
    "widths that do not divide": lambda: _images(
        nn.Conv2d(12, 7, 3),
        nn.BatchNorm2d(7),
        nn.ReLU(inplace=True),
        nn.Conv2d(7, 12, 3),
        TwoLevelConv2d(12, 10, 3, groups=2, coarse_init="he", bias=True),
        ShuffleConv2d(10, 10, 1, groups=5),
        FullyLearnableGroupConv2d(10, 12, 1, groups=2),
    ),
    "groups that do not divide": lambda: _images(
        nn.Conv2d(12, 60, 3, padding=1, bias=False),
        nn.BatchNorm2d(60),
        nn.ReLU(inplace=True),
        nn.Conv2d(60, 30, 3, groups=5),  # its input in another layout, its output cut
        nn.SiLU(),
        nn.Conv2d(30, 25, 1, groups=5, bias=False),  # its output whole
        head=25,
    ),
    "shuffled": lambda: _images(ShuffleConv2d(12, 12, 1, groups=6), ShuffleConv2d(12, 6, 3, groups=6), head=6),
    "row convolutions": lambda: _images(nn.Conv2d(12, 6, 3, stride=2), nn.Conv2d(6, 2, 1, bias=False), head=2),
    "a grouped stem": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3, groups=3), nn.Flatten(), nn.Linear(216, 24), nn.Dropout(0.3), nn.Linear(24, 5)
    ),
    "dropout everywhere": lambda: nn.Sequential(
        nn.Dropout(0.3), _images(nn.Dropout2d(0.3), nn.AlphaDropout(0.2), nn.RReLU()), nn.Dropout(0.3)
    ),
    "channels mixed": lambda: _images(
        nn.ChannelShuffle(3), nn.LocalResponseNorm(3), nn.Softmax2d(), nn.PixelShuffle(2), head=3
    ),
    "tied convolutions": _tied_alike,
    "embedding tied to the head": _TiedLanguageModel,
    "attention, then recurrence": _AttentionThenRecurrence,
    "fused attention": lambda: _images(_Attention(12, 6, True, False), _Attention(12, 6, True, True)),
    "attention by two layers": lambda: _images(_Attention(12, 6, False, True), _Attention(12, 6, False, False)),
    "heads that do not divide": lambda: _images(_Attention(12, 1, True, False), _Attention(12, 4, True, True)),
    "attention of torch": lambda: _images(_AttentionOfTorch()),
    "weights that are computed": lambda: _images(
        weight_norm(nn.Conv2d(12, 12, 3)), spectral_norm(nn.Conv2d(12, 12, 3))
    ),
}


def _model(name: str) -> nn.Module:
    torch.manual_seed(SEED)
    return NETWORKS[name]().double()


def _steps(model: nn.Module) -> dict[str, Tensor]:
    """Outputs of two steps of training, and one in evaluation."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
    if any(isinstance(module, nn.Embedding) for module in model.modules()):
        x = torch.randint(0, 12, (4, 6), generator=generator)
    labels = torch.randint(0, 2, (4,), generator=generator)
    torch.manual_seed(SEED)  # of what is dropped
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    outputs = {}
    for step in range(2):
        optimizer.zero_grad()
        out = model(x)
        F.cross_entropy(out, labels).backward()
        optimizer.step()
        outputs[f"output {step}"] = out.detach()
    with torch.no_grad():
        outputs["evaluated"] = model.eval()(x)
    assert all(type(out) is Tensor for out in outputs.values())
    return outputs


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}


def _on_ranks() -> dict[str, dict[str, Tensor]]:
    answers = {}
    for name in NETWORKS:
        model = shard(_model(name))
        outputs = _steps(model)
        gradients = {f"{key}.grad": grad for key, grad in gather_gradients(model).items()}
        answers[name] = {**outputs, **gradients, **gather_state_dict(model)}
    return answers


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("ranks", RANKS)
def test_two_steps(ranks: int, name: str) -> None:
    model = _model(name)
    expected: dict[str, Any] = {**_steps(model), **_gradients(model), **model.state_dict()}
    for answers in run_ranks_once(ranks, _on_ranks):
        found = {key.removeprefix("."): value for key, value in answers[name].items()}
        again = set(found) - set(expected)  # a tied parameter's second name
        assert all(key.endswith(".grad") for key in again) and bool(again) == ("tied" in name)
        # Some are zero but for rounding: what stands before a BatchNorm, or after a softmax, needs no bias.
        assert_close({key: found[key] for key in expected}, expected, 1e-9, 1e-3)


def test_every_kind_of_placement_is_there() -> None:
    kinds = {placement.kind for name in NETWORKS for p in RANKS for placement in plan(_model(name), p).values()}
    assert kinds == {"column", "row", "grouped", "two-level", "shuffle", "channels", "heads", "dropout", "whole"}
