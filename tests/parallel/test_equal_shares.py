"""Parameters that code has drawn or broadcast share by share are found by name in the second pass in training."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.parallel.against_one_device import SEED
from tests.parallel.common import run_ranks_once
from tlgc_mp.errors import UsageError
from tlgc_mp.parallel import shard


def _network(repeated: bool = False) -> nn.Sequential:
    torch.manual_seed(SEED)
    convolutions = [layer for _ in range(20) for layer in (nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12))]
    model = nn.Sequential(nn.Conv2d(3, 12, 3), *convolutions, nn.Flatten(), nn.Linear(48, 5))
    if repeated:
        with torch.no_grad():
            for conv in model[1:-2:2]:
                conv.weight.copy_(torch.randn(12, 2, 3, 3).repeat(1, 6, 1, 1))  # as often in every share
    return model


def _drawn(model: nn.Sequential) -> None:
    for param in model.parameters():
        if param.dim() > 1:
            nn.init.xavier_uniform_(param)


def _broadcast(model: nn.Sequential) -> None:
    for param in model.parameters():
        dist.broadcast(param.data, 0)


def _drawn_head(model: nn.Sequential) -> None:
    for param in model[-1].parameters():
        param.data.normal_()


def _written_whole(model: nn.Sequential) -> None:
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)


def _written_alike(model: nn.Sequential) -> None:
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            nn.init.dirac_(layer.weight, 6)


WRONG: list[tuple[str, Callable[[nn.Sequential], None]]] = [("0", _drawn), ("0", _broadcast), ("42", _drawn_head)]
RIGHT: list[Callable[[nn.Sequential], None]] = [_written_whole, _written_alike, lambda model: None]


def _said() -> tuple[list[str], list[str]]:
    def trained(change: Callable[[nn.Sequential], None], repeated: bool) -> str:
        model = _network(repeated)
        shard(model)
        change(model)
        images = torch.ones(2, 3, 4, 4)
        model(images)
        try:
            model(images)
        except UsageError as error:
            return str(error)
        return ""

    return [trained(change, False) for _, change in WRONG], [
        trained(change, repeated) for change in RIGHT for repeated in (False, True)
    ]


@pytest.mark.parametrize("ranks", [2, 3])
def test_equal_shares_are_refused(ranks: int) -> None:
    for wrong, right in run_ranks_once(ranks, _said):
        for (layer, _), said in zip(WRONG, wrong, strict=True):
            assert said.startswith(f"{layer}.weight must be written whole, got the same share"), said
        assert right == [""] * 6
