"""Passes that leave parameters out, and several backward passes before a step, in engines: as on one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parallel.common import SEED, batches, relative_error, run_ranks_once
from tlgc_mp import UsageError
from tlgc_mp.engine import initialize
from tlgc_mp.parallel import gather_state_dict

BATCH, ACCUMULATION, CLIP, TOLERANCE = 8, 2, 0.1, 2e-5
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
SETTINGS: dict[str, dict[str, Any]] = {
    **{f"ZeRO {stage}": {"stage": stage} for stage in range(4)},
    **{f"ZeRO {stage}, offloaded": {"stage": stage, **OFFLOAD} for stage in (1, 2, 3)},
}
LAYOUTS = ((2, 1), (1, 2))
"""(P, D)"""

BRANCHES = "aababbabccaaabb"
"""Of each micro-batch: ways are left out by a whole step, by its last micro-batch or by its first. Where a step would
end with "c", its gradients are given up, and the next micro-batch takes its place."""


class Branches(nn.Module):
    """Takes one of several ways, and leaves out the parameters of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3)
        self.ways = nn.ModuleDict({way: nn.Conv2d(12, 12, 3, groups=2) for way in "abc"})
        self.heads = nn.ModuleDict({way: nn.Linear(12, 10) for way in "abc"})

    def forward(self, x: Tensor, way: str) -> Tensor:
        y = F.silu(self.ways[way](F.silu(self.stem(x))))
        return self.heads[way](y.mean((2, 3)))


def _network() -> Branches:
    torch.manual_seed(SEED)
    return Branches()


def _engine(layout: tuple[int, int], zero: dict[str, Any], **settings: Any) -> Any:
    config = {
        "train_batch_size": BATCH * settings.get("gradient_accumulation_steps", 1),
        "tensor_parallel": {"autotp_size": layout[0]},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        **settings,
    }
    return initialize(model=_network(), optimizer=_sgd, config=config, collective_timeout=30)[0]


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def _data(count: int) -> list[tuple[Tensor, Tensor]]:
    return batches(count, BATCH, torch.float32)


def _moves(model: nn.Module, whole: dict[str, Tensor]) -> None:
    for name, start in model.state_dict().items():
        if "c" not in name.split("."):
            assert relative_error(whole[name], start) > 1e-3, f"{name} has not moved"


def _one_device() -> dict[str, Tensor]:
    model = _network()
    optimizer = _sgd(model.parameters())
    micro_batches = 0
    for way, (images, labels) in zip(BRANCHES, _data(len(BRANCHES)), strict=True):
        (F.cross_entropy(model(images, way), labels) / ACCUMULATION).backward()
        is_last = micro_batches % ACCUMULATION == ACCUMULATION - 1
        if is_last and way == "c":
            optimizer.zero_grad()
            continue
        micro_batches += 1
        if is_last:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    _moves(_network(), model.state_dict())
    return model.state_dict()


def _on_ranks(layout: tuple[int, int]) -> dict[str, dict[str, Tensor]]:
    found = {}
    replica = dist.get_rank() // layout[0]
    for name, zero in SETTINGS.items():
        engine = _engine(layout, zero, gradient_clipping=CLIP, gradient_accumulation_steps=ACCUMULATION)
        for way, (images, labels) in zip(BRANCHES, _data(len(BRANCHES)), strict=True):
            own, own_labels = images.chunk(layout[1])[replica], labels.chunk(layout[1])[replica]
            engine.backward(F.cross_entropy(engine(own, way), own_labels))
            if way == "c" and engine.is_gradient_accumulation_boundary():
                (engine if zero["stage"] == 0 else engine.optimizer).zero_grad()
            else:
                engine.step()
        found[name] = gather_state_dict(engine.module)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SETTINGS)
def test_what_a_pass_leaves_out_is_not_stepped(layout: tuple[int, int], name: str) -> None:
    """ZeRO 3, and an offloaded optimizer, took the gradient of an earlier step, or lost one of this step."""
    expected = _one_device()
    for found in run_ranks_once(2, _on_ranks, layout):
        off = {key: relative_error(value, expected[key]) for key, value in found[name].items()}
        assert max(off.values()) < TOLERANCE, off


def _several_backward_passes(layout: tuple[int, int]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    replica = dist.get_rank() // layout[0]
    for managed in (True, False):
        for stage in range(4):
            engine = _engine(layout, {"stage": stage}, managed_gradient_accumulation=managed)
            try:
                for index, (images, labels) in enumerate(_data(4)):
                    own, own_labels = images.chunk(layout[1])[replica], labels.chunk(layout[1])[replica]
                    engine.backward(F.cross_entropy(engine(own, "a"), own_labels))
                    if index % 2:
                        engine.step()
                found[f"{managed} {stage}"] = gather_state_dict(engine.module)
            except UsageError as error:
                found[f"{managed} {stage}"] = str(error)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("managed", [True, False])
def test_several_backward_passes_before_a_step(layout: tuple[int, int], managed: bool) -> None:
    """ZeRO 1 and 2 lost the gradients of all but the last, without a word."""
    model = _network()
    optimizer = _sgd(model.parameters())
    for index, (images, labels) in enumerate(_data(4)):
        F.cross_entropy(model(images, "a"), labels).backward()
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()
    expected = model.state_dict()
    for found in run_ranks_once(2, _several_backward_passes, layout):
        for stage in range(4):
            outcome = found[f"{managed} {stage}"]
            if managed and stage in (1, 2):
                assert outcome.startswith("engine.backward must be called once before each engine.step at ZeRO 1 and 2")
            else:
                assert max(relative_error(value, expected[key]) for key, value in outcome.items()) < TOLERANCE, stage
