"""Offloaded optimizers, activation checkpointing and frozen parameters under ZeRO 1 to 3, over P x D = 2 x 2 ranks:
against the engine without ZeRO, and against one device. float32."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from tests.parallel.common import (
    SEED,
    SmoothBlock,
    TrainingRun,
    assert_close,
    assert_trained,
    batches,
    run_ranks_once,
    sgd,
    smooth_network,
    train_one_device,
)
from tests.ranks import run_ranks
from tlgc_mp import UsageError
from tlgc_mp.engine import checkpoint_activations, initialize
from tlgc_mp.parallel import gather_state_dict
from tlgc_mp.parallel.topology import Topology

RANKS, REPLICAS, BATCH, STEPS = 2, 2, 16, 6
TOLERANCE = 1e-5
STATE_TOLERANCE = 2e-5
CLIP = 0.2
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


@dataclass(frozen=True)
class Variant:
    """What a run does besides training; the ``zero`` settings are left out where there is no ZeRO."""

    zero: dict[str, Any] = field(default_factory=dict)
    checkpointed: bool = False
    frozen: tuple[str, ...] = ()
    accumulation: int = 1


VARIANTS = {
    "offload": Variant(OFFLOAD),
    "checkpointing": Variant(checkpointed=True),
    "both, two micro-batches": Variant(OFFLOAD, checkpointed=True, accumulation=2),
    # A whole layer, the first one, and one that every rank holds whole.
    "frozen": Variant(frozen=("0.", "4.", "8.bias")),
}
"""All with the gradient clipped, which tells how often each rank counts each parameter."""
STAGES = (0, 1, 2, 3)


def _model(variant: Variant, device: str) -> nn.Module:
    model = smooth_network(device)
    for name, param in model.named_parameters():
        if name.startswith(variant.frozen):
            param.requires_grad_(False)
    return model


def _one_engine(topology: Topology, variant: Variant, stage: int) -> tuple[TrainingRun, bool]:
    """One rank's training run, and whether its optimizer is offloaded."""
    config = {
        "train_batch_size": BATCH,
        "gradient_accumulation_steps": variant.accumulation,
        "gradient_clipping": CLIP,
        "tensor_parallel": {"autotp_size": topology.tensor_parallel},
        "zero_optimization": {"stage": stage, **(variant.zero if stage else {})},
        "zero_allow_untested_optimizer": True,
    }
    model = _model(variant, "meta")
    if variant.checkpointed and stage:
        checkpoint_activations(model, SmoothBlock)
    engine, *_ = initialize(model=model, optimizer=sgd, config=config, seed=SEED)
    run = TrainingRun(losses=[[]])
    micro_batches = topology.data_parallel * variant.accumulation
    mine = slice(topology.dp_rank, None, topology.data_parallel)
    for images, labels in batches(STEPS, BATCH, torch.float32):
        for part, part_labels in zip(images.chunk(micro_batches)[mine], labels.chunk(micro_batches)[mine], strict=True):
            loss = F.cross_entropy(engine(part), part_labels)
            engine.backward(loss)
            engine.step()
            run.losses[0].append(loss.item())
        if stage:
            run.norms.append(float(engine.get_global_grad_norm()))
    run.states = [gather_state_dict(engine.module)]
    offloaded = [getattr(engine.optimizer, name, False) for name in ("cpu_offload", "offload_optimizer")]
    return run, any(offloaded)


def _every_run() -> dict[tuple[str, int], tuple[TrainingRun, bool]]:
    topology = Topology(dist.get_world_size(), dist.get_rank(), RANKS)
    return {
        (name, stage): _one_engine(topology, variant, stage) for name, variant in VARIANTS.items() for stage in STAGES
    }


@functools.cache
def _one_device(name: str) -> TrainingRun:
    variant = VARIANTS[name]
    return train_one_device(
        _model(variant, "cpu"),
        batches(STEPS, BATCH, torch.float32),
        sgd,
        replicas=REPLICAS,
        accumulation=variant.accumulation,
        clip=CLIP,
    )


@pytest.mark.parametrize("stage", STAGES[1:])
@pytest.mark.parametrize("name", VARIANTS)
def test_losses_norms_and_parameters(name: str, stage: int) -> None:
    expected = _one_device(name)
    assert min(expected.norms) > 2 * CLIP, "nothing was clipped"
    assert_trained(expected)
    for rank, runs in enumerate(run_ranks_once(RANKS * REPLICAS, _every_run)):
        (run, offloaded), (plain, _) = runs[name, stage], runs[name, 0]
        assert offloaded == (VARIANTS[name].zero == OFFLOAD)
        replica = rank // RANKS
        assert run.losses[0] == pytest.approx(plain.losses[0], rel=TOLERANCE)
        assert run.losses[0] == pytest.approx(expected.losses[replica], rel=TOLERANCE)
        assert run.norms == pytest.approx(expected.norms, rel=TOLERANCE)
        assert_close(run.states[0], plain.states[0], STATE_TOLERANCE)
        assert_close(run.states[0], expected.states[replica], STATE_TOLERANCE)


def test_what_is_frozen_stays() -> None:
    before = smooth_network("cpu").state_dict()
    names = [name for name, _ in smooth_network("meta").named_parameters()]
    for runs in run_ranks_once(RANKS * REPLICAS, _every_run):
        for stage in STAGES:
            after = runs["frozen", stage][0].states[0]
            frozen = {name for name in names if torch.equal(before[name], after[name])}
            assert frozen == {name for name in names if name.startswith(VARIANTS["frozen"].frozen)}


def _refused() -> str:
    config = {
        "train_batch_size": BATCH,
        "zero_optimization": {"stage": 1, **OFFLOAD},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": True,
    }
    with pytest.raises(UsageError) as refused:
        initialize(model=nn.Linear(2, 2), optimizer=sgd, config=config)
    return str(refused.value)


def test_only_deepspeeds_optimizer_where_it_is_asked_for() -> None:
    (said,) = run_ranks(1, _refused)
    assert (
        said.startswith("deepspeed_config must be one that DeepSpeed accepts, got an error: ")
        and "zero_force_ds_cpu_optimizer" in said
    )
