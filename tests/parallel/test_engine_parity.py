"""The DeepSpeed engine over P x D ranks, at every ZeRO stage, against one device on the same whole batches.

float32, and so without ReLUs: most runs train a smooth network, and the WideResNet has another activation here.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from tests.parallel.common import (
    SEED,
    TrainingRun,
    assert_close,
    assert_trained,
    batches,
    run_ranks_once,
    seeded_model,
    sgd,
    smooth_activations,
    smooth_network,
    train_one_device,
)
from tlgc_mp.engine import initialize
from tlgc_mp.nn import TwoLevelConv2d
from tlgc_mp.parallel import gather_state_dict
from tlgc_mp.parallel.topology import Topology

STEPS, BATCH, GROUPS = 20, 16, 4
TOLERANCE = 2e-5
BF16_TOLERANCE = 2e-2
CLIP = 0.2

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"gradient_clipping": 0.0},  # DeepSpeed clips at 1 where nothing is said
    "clipped": {"gradient_clipping": CLIP},
    "accumulated": {"gradient_clipping": 0.0, "gradient_accumulation_steps": 2},
    "bf16": {"gradient_clipping": 0.0, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    "composed": {"gradient_clipping": 0.0},  # every layer that can be is one dense convolution, as on an accelerator
}
DIALS: dict[str, dict[str, Any]] = {
    "r = 3": {"coarse_channels": 3},
    "r = 2, summed": {"coarse_channels": 2, "coarse_sum": True},
}
"""Variants of the network."""
VARIANTS |= dict.fromkeys(DIALS, VARIANTS["plain"])
PLAIN = [((p, d), "plain", stage) for p, d in ((2, 1), (1, 2), (2, 2), (4, 1)) for stage in (0, 1, 2, 3)]
CLIPPED = [((2, 1), "clipped", stage) for stage in (0, 1, 2, 3)] + [((2, 2), "clipped", stage) for stage in (0, 3)]
ACCUMULATED = [((2, 1), "accumulated", 0), *(((2, 2), "accumulated", stage) for stage in (1, 2, 3))]
BF16 = [((2, 1), "bf16", stage) for stage in (0, 2, 3)]
COMPOSED = [((1, 2), "composed", stage) for stage in (0, 1, 2, 3)]
DIALLED = [((2, 2), variant, stage) for variant in DIALS for stage in (0, 1, 2, 3)]
RUNS = PLAIN + CLIPPED + ACCUMULATED + BF16 + COMPOSED + DIALLED
"""((P, D), variant, ZeRO stage)"""

WIDE_RESNET_STAGES = (0, 1, 2, 3)


def _one_engine(topology: Topology, variant: str, stage: int, model: nn.Module) -> tuple[TrainingRun, set[torch.dtype]]:
    """One rank's training run, and the types of BatchNorm's parameters and statistics after it."""
    config = {
        "train_batch_size": BATCH,
        "tensor_parallel": {"autotp_size": topology.tensor_parallel},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        **VARIANTS[variant],
    }
    layers = [module for module in model.modules() if isinstance(module, TwoLevelConv2d)]
    if variant == "composed":
        for layer in layers:
            if layer.coarse_kernel_size == layer.kernel_size:
                layer.coarse_mode = "dense"
        assert sum(layer.coarse_mode == "dense" for layer in layers) == 2
    engine, *_ = initialize(model=model, optimizer=sgd, config=config, seed=SEED)
    accumulation = engine.gradient_accumulation_steps()
    run = TrainingRun(losses=[[]])
    for images, labels in batches(STEPS, BATCH, torch.float32):
        parts = slice(topology.dp_rank, None, topology.data_parallel)
        micro_batches = topology.data_parallel * accumulation
        for part, part_labels in zip(
            images.chunk(micro_batches)[parts], labels.chunk(micro_batches)[parts], strict=True
        ):
            loss = F.cross_entropy(engine(part).float(), part_labels)
            engine.backward(loss)
            engine.step()
            run.losses[0].append(loss.item())
        if variant == "clipped" and stage > 0:
            run.norms.append(float(engine.get_global_grad_norm()))
    run.states = [gather_state_dict(engine.module)]
    norms = [module for module in engine.module.modules() if isinstance(module, nn.BatchNorm2d)]
    types = {tensor.dtype for norm in norms for tensor in (*norm.parameters(), norm.running_mean, norm.running_var)}
    return run, types


def _engines_on_ranks(ranks: int, runs: tuple[tuple[str, int], ...]) -> dict[Any, Any]:
    topology = Topology(dist.get_world_size(), dist.get_rank(), ranks)
    return {
        (variant, stage): _one_engine(topology, variant, stage, smooth_network("meta", **DIALS.get(variant, {})))
        for variant, stage in runs
    }


def _wide_resnets_on_ranks(ranks: int) -> dict[int, TrainingRun]:
    topology = Topology(dist.get_world_size(), dist.get_rank(), ranks)
    runs = {}
    for stage in WIDE_RESNET_STAGES:
        with smooth_activations():
            runs[stage], _ = _one_engine(topology, "plain", stage, seeded_model("gc-2l", GROUPS, torch.float32, "meta"))
    return runs


def _engines(split: tuple[int, int]) -> list[Any]:
    """By rank, every run at these P and D: DeepSpeed keeps one P a process, and takes any number of engines."""
    ranks, replicas = split
    runs = tuple((variant, stage) for where, variant, stage in RUNS if where == split)
    return run_ranks_once(ranks * replicas, _engines_on_ranks, ranks, runs)


@functools.cache
def _one_device(replicas: int, variant: str) -> TrainingRun:
    return train_one_device(
        smooth_network("cpu", **DIALS.get(variant, {})),
        batches(STEPS, BATCH, torch.float32),
        sgd,
        replicas=replicas,
        accumulation=VARIANTS[variant].get("gradient_accumulation_steps", 1),
        clip=VARIANTS[variant]["gradient_clipping"] or float("inf"),
    )


@pytest.mark.parametrize(("split", "variant", "stage"), PLAIN + CLIPPED + ACCUMULATED + COMPOSED + DIALLED)
def test_losses_and_final_parameters(split: tuple[int, int], variant: str, stage: int) -> None:
    expected = _one_device(split[1], variant)
    assert_trained(expected)
    for rank, answers in enumerate(_engines(split)):
        run, _ = answers[variant, stage]
        replica = rank // split[0]
        assert run.losses[0] == pytest.approx(expected.losses[replica], rel=TOLERANCE)
        assert_close(run.states[0], expected.states[replica], TOLERANCE)


@functools.cache
def _one_device_wide_resnet(replicas: int) -> TrainingRun:
    model = seeded_model("gc-2l", GROUPS, torch.float32, "cpu")
    with smooth_activations():
        return train_one_device(model, batches(STEPS, BATCH, torch.float32), sgd, replicas=replicas)


@pytest.mark.parametrize("stage", WIDE_RESNET_STAGES)
@pytest.mark.parametrize("split", [(2, 1), (2, 2)])
def test_wide_resnet(split: tuple[int, int], stage: int) -> None:
    ranks, replicas = split
    expected = _one_device_wide_resnet(replicas)
    assert expected.losses[0][0] != pytest.approx(expected.losses[0][-1], rel=0.01), "nothing was trained"
    for rank, runs in enumerate(run_ranks_once(ranks * replicas, _wide_resnets_on_ranks, ranks)):
        run, replica = runs[stage], rank // ranks
        assert run.losses[0] == pytest.approx(expected.losses[replica], rel=TOLERANCE)
        assert_close(run.states[0], expected.states[replica], TOLERANCE)


@pytest.mark.parametrize(("split", "variant", "stage"), [run for run in CLIPPED if run[2] > 0])
def test_gradient_norm_is_that_of_the_whole_model(split: tuple[int, int], variant: str, stage: int) -> None:
    expected = _one_device(split[1], variant).norms
    assert min(expected) > 2 * CLIP, "nothing was clipped"
    for answers in _engines(split):
        run, _ = answers[variant, stage]
        assert run.norms == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize(("split", "variant", "stage"), BF16)
def test_bf16_autocast(split: tuple[int, int], variant: str, stage: int) -> None:
    expected = _one_device(split[1], "plain").losses[0]
    for answers in _engines(split):
        run, norm_types = answers[variant, stage]
        assert run.losses[0][:3] == pytest.approx(expected[:3], rel=BF16_TOLERANCE)
        assert run.losses[0][0] != pytest.approx(expected[0], rel=1e-6), "autocast is off"
        assert norm_types == {torch.float32}
