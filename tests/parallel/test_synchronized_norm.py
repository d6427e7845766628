"""SyncBatchNorm in a split model: each rank has a share of the channels, and statistics of all replicas.

torch's own refuses CPU tensors, so the layer here takes its place, with the same statistics over the same group.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parallel.common import SEED, assert_close, gather_gradients, run_ranks_once
from tlgc_mp import UsageError
from tlgc_mp.parallel import gather_state_dict, layout_report, shard

P, D, BATCH = 2, 2, 6


class _Sum(torch.autograd.Function):
    """Of a tensor over the ranks of a group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grad, ctx.group), None


class SyncBatchNormOnCPU(nn.SyncBatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        group = self.process_group or dist.group.WORLD
        values = x.numel() // x.shape[1] * dist.get_world_size(group)
        shape = [1, -1, *[1] * (x.dim() - 2)]
        dims = [dim for dim in range(x.dim()) if dim != 1]
        mean = _Sum.apply(x.sum(dims), group) / values
        centered = x - mean.view(shape)
        variance = _Sum.apply((centered * centered).sum(dims), group) / values
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * values / (values - 1), self.momentum)
            self.num_batches_tracked.add_(1)
        scaled = centered / (variance.view(shape) + self.eps).sqrt()
        return scaled * self.weight.view(shape) + self.bias.view(shape)


def _network(norm: Any) -> nn.Module:
    torch.manual_seed(SEED)
    layers = [nn.Conv2d(3, 8, 3), norm(8), nn.SiLU(), nn.Conv2d(8, 4, 3), norm(4), nn.Flatten(), norm(64)]
    return nn.Sequential(*layers, nn.Linear(64, 5)).double()


def _images() -> Tensor:
    return torch.randn(BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)


def _step(model: nn.Module, images: Tensor, own: slice) -> dict[str, Tensor]:
    out = model(images[own])
    F.cross_entropy(out, torch.arange(BATCH)[own] % 5, reduction="sum").backward()
    with torch.no_grad():
        return {"out": out.detach(), "evaluated": model.eval()(images)}


def _on_ranks() -> dict[str, Any]:
    world, rank = dist.get_world_size(), dist.get_rank()
    replicas = world // P
    groups = {
        "replica": [dist.new_group([r * P + i for i in range(P)]) for r in range(replicas)][rank // P],
        "share": [dist.new_group([r * P + i for r in range(replicas)]) for i in range(P)][rank % P],
    }
    refused = []
    for wrong in [None, "replica"] if replicas > 1 else ["replica"]:
        group = None if wrong is None else groups[wrong]
        try:
            shard(_network(SyncBatchNormOnCPU), groups["replica"], data_parallel_group=group)
        except UsageError as error:
            refused.append(str(error))
    given = {} if replicas == 1 else {"data_parallel_group": groups["share"]}
    model = shard(_network(SyncBatchNormOnCPU), groups["replica"], **given)
    size = BATCH // replicas
    own = slice(rank // P * size, (rank // P + 1) * size)
    found = _step(model, _images(), own)
    gradients = {f"{name}.grad": gradient for name, gradient in gather_gradients(model).items()}
    for gradient in gradients.values():
        dist.all_reduce(gradient, group=groups["share"])
    held = model[1].weight.share.shape
    return {"found": {**found, **gradients, **gather_state_dict(model)}, "own": own, "refused": refused, "held": held}


@pytest.mark.parametrize("replicas", [1, D])
def test_statistics_are_over_the_replicas(replicas: int) -> None:
    model = _network(lambda width: nn.BatchNorm1d(width) if width == 64 else nn.BatchNorm2d(width))
    expected = _step(model, _images(), slice(None))
    expected |= {f"{name}.grad": param.grad for name, param in model.named_parameters() if param.grad is not None}
    expected |= model.state_dict()
    for answer in run_ranks_once(P * replicas, _on_ranks):
        assert_close(answer["found"], {**expected, "out": expected["out"][answer["own"]]}, 1e-9, 1e-3)
        assert answer["held"] == (8 // P,)
        assert len(answer["refused"]) == (2 if replicas > 1 else 1)
        assert all(text.startswith("data_parallel_group must be ") for text in answer["refused"])


def test_it_is_measured() -> None:
    report = layout_report(_network(nn.SyncBatchNorm), _images(), tensor_parallel=P)
    assert [layer.kind for layer in report.layers].count("synchronized") == 3
    assert not sum(sum(layer.sent.values()) for layer in report.layers if layer.kind == "synchronized")
