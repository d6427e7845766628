"""Layers, split models and the engine on the accelerator of this machine, against the same in float64 on the CPU.

Where the machine has fewer accelerators than a test has ranks, the ranks share one and talk through Gloo.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.nn.test_dense_matrix import SEEDS, drawn, random_case
from tests.parallel.common import (
    TrainingRun,
    assert_close,
    assert_trained,
    batches,
    seeded_model,
    sgd,
    smooth_network,
    train_one_device,
)
from tests.ranks import run_ranks
from tlgc_mp.engine import initialize
from tlgc_mp.nn import TwoLevelConv2d
from tlgc_mp.nn.two_level import COARSE_MODES, DENSE_BELOW
from tlgc_mp.parallel import gather_state_dict, shard
from tlgc_mp.parallel.topology import Topology

pytestmark = pytest.mark.skipif(not torch.accelerator.is_available(), reason="this machine has no accelerator")

STEPS, BATCH, GROUPS = 20, 16, 4
ENGINES = [((1, 1), stage) for stage in (0, 1, 2, 3)] + [
    ((2, 1), 0),
    ((2, 1), 1),
    ((2, 1), 3),
    ((4, 1), 0),
    ((2, 2), 2),
]
"""((P, D), ZeRO stage)"""


def _device() -> torch.device:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    return device


def _full_precision() -> None:
    """float32 is float32: convolutions compute in TF32 otherwise."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def _compare_with_the_cpu(layer: TwoLevelConv2d, x: Tensor, modes: Iterable[str]) -> Tensor:
    """Outputs and all gradients of ``layer`` there and here, in float64; returns the last output there."""
    twin, x_there = copy.deepcopy(layer).to(_device()), x.detach().to(_device()).requires_grad_()
    for mode in modes:
        layer.coarse_mode = twin.coarse_mode = mode
        expected, actual = layer(x), twin(x_there)
        cotangent = torch.randn_like(expected)
        grads = torch.autograd.grad(expected, (x, *layer.parameters()), cotangent)
        grads_there = torch.autograd.grad(actual, (x_there, *twin.parameters()), cotangent.to(_device()))
        for got, want in zip((actual, *grads_there), (expected, *grads), strict=True):
            torch.testing.assert_close(got.cpu(), want, rtol=1e-10, atol=1e-10)
    return actual


@pytest.mark.parametrize("seed", SEEDS)
def test_layer_is_that_of_the_cpu(seed: int) -> None:
    case = random_case(seed)
    layer, x, _ = drawn(case)
    torch.manual_seed(seed)
    actual = _compare_with_the_cpu(layer, x, case.modes)
    if 1 not in (case.in_channels, *case.size):  # such a tensor is of both formats
        assert actual.is_contiguous(memory_format=case.memory_format)


def test_layer_of_many_positions() -> None:
    """On an accelerator a sum over them is made in parts."""
    torch.manual_seed(0)
    layer = TwoLevelConv2d(32, 64, 3, stride=2, padding=1, groups=4, dtype=torch.float64, coarse_init="he")
    x = torch.randn(16, 32, 32, 32, dtype=torch.float64, requires_grad=True)
    _compare_with_the_cpu(layer, x, COARSE_MODES)


def test_narrow_groups_of_one_accelerator_are_dense() -> None:
    narrow = TwoLevelConv2d(64, 64, 3, groups=4, device=_device())
    assert narrow.coarse_mode == "dense"
    assert TwoLevelConv2d(64, 4 * DENSE_BELOW, 3, groups=4, device=_device()).coarse_mode == "overlapped"
    narrow.local_groups = 2
    assert narrow.coarse_mode == "fused"


@pytest.mark.parametrize("mode", COARSE_MODES)
def test_autocast_computes_in_bfloat16(mode: str) -> None:
    torch.manual_seed(0)
    layer = TwoLevelConv2d(64, 64, 3, padding=1, groups=4, coarse_init="he").to(_device())
    layer.coarse_mode = mode
    x = torch.randn(8, 64, 16, 16, device=_device())
    expected = layer(x)
    with torch.autocast(_device().type, dtype=torch.bfloat16):
        actual = layer(x)
    assert actual.dtype == torch.bfloat16
    error = ((actual.float() - expected).norm() / expected.norm()).item()
    assert 1e-5 < error < 2e-2


def _split_models_on_ranks(convs: tuple[str, ...]) -> dict[str, TrainingRun]:
    device = _device()
    runs = {}
    for conv in convs:
        model = shard(seeded_model(conv, GROUPS if conv != "sc" else 1, torch.float64, "meta"), device=device)
        optimizer = sgd(model.parameters())
        losses = []
        for images, labels in batches(STEPS, BATCH, torch.float64):
            loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        state = {name: value.cpu() for name, value in gather_state_dict(model).items()}
        runs[conv] = TrainingRun(losses=[losses], states=[state])
    return runs


@pytest.mark.parametrize("ranks", [2, 4])
def test_split_models_train_as_one_device(ranks: int) -> None:
    convs = ("gc-2l", "gc", "gc-2l-proto", "shuffle", "sc")
    answers = run_ranks(ranks, _split_models_on_ranks, convs, timeout=240.0, on_accelerator=True)
    for conv in convs:
        model = seeded_model(conv, GROUPS if conv != "sc" else 1, torch.float64, "cpu")
        expected = train_one_device(model, batches(STEPS, BATCH, torch.float64), sgd)
        for runs in answers:
            assert runs[conv].losses[0] == pytest.approx(expected.losses[0], rel=1e-9), conv
            assert_close(runs[conv].states[0], expected.states[0], 1e-8)


def _engine_on_ranks(ranks: int, stage: int) -> tuple[TrainingRun, dict[str, Any]]:
    _full_precision()
    topology = Topology(dist.get_world_size(), dist.get_rank(), ranks)
    config = {
        "train_batch_size": BATCH,
        "tensor_parallel": {"autotp_size": ranks},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = initialize(model=smooth_network("meta"), optimizer=sgd, config=config, seed=20260)
    run = TrainingRun(losses=[[]])
    for images, labels in batches(STEPS, BATCH, torch.float32):
        images = images.chunk(topology.data_parallel)[topology.dp_rank].to(engine.device)
        labels = labels.chunk(topology.data_parallel)[topology.dp_rank].to(engine.device)
        loss = F.cross_entropy(engine(images).float(), labels)
        engine.backward(loss)
        engine.step()
        run.losses[0].append(loss.item())
    run.states = [{name: value.cpu() for name, value in gather_state_dict(engine.module).items()}]
    where = {str(param.device) for param in engine.module.parameters()}
    return run, {"where": where, "backend": dist.get_backend()}


@pytest.mark.parametrize(("split", "stage"), ENGINES)
def test_engine_trains_as_one_device(split: tuple[int, int], stage: int) -> None:
    ranks, replicas = split
    expected = train_one_device(smooth_network("cpu"), batches(STEPS, BATCH, torch.float32), sgd, replicas=replicas)
    assert_trained(expected)
    answers = run_ranks(ranks * replicas, _engine_on_ranks, ranks, stage, timeout=240.0, on_accelerator=True)
    devices = torch.accelerator.device_count()
    for rank, (run, found) in enumerate(answers):
        index = rank if devices >= ranks * replicas else 0
        assert found["where"] == {f"{_device().type}:{index}"}
        assert run.losses[0] == pytest.approx(expected.losses[rank // ranks], rel=1e-4)
        assert_close(run.states[0], expected.states[rank // ranks], 1e-4)
