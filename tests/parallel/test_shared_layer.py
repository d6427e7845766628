"""A layer that a model uses under two names is split once, and stays one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parallel.common import SEED, assert_close, batches, gather_gradients, run_ranks_once
from tlgc_mp.nn import TwoLevelConv2d
from tlgc_mp.parallel import shard


def _model() -> nn.Module:
    torch.manual_seed(SEED)
    shared = TwoLevelConv2d(8, 8, 3, padding=1, groups=2, coarse_init="he")
    stem, head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 10)
    return nn.Sequential(stem, shared, nn.SiLU(), shared, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).double()


def _pass(model: nn.Module) -> Tensor:
    images, labels = batches(1, 4, torch.float64)[0]
    logits = model(images)
    F.cross_entropy(logits, labels).backward()
    return logits.detach()


def _on_ranks() -> tuple[bool, dict[str, Tensor]]:
    model = shard(_model())
    logits = _pass(model)
    one = model.get_submodule("1") is model.get_submodule("3")
    return one, {"logits": logits, **gather_gradients(model)}


def test_it_computes_what_one_device_does() -> None:
    model = _model()
    expected = {"logits": _pass(model)}
    expected |= {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    for one, found in run_ranks_once(2, _on_ranks):
        assert one
        assert_close(found, expected, 1e-11)
