"""Name of a strategy -> one training step of it, as its users run it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tlgc_mp.bench.scaling.flops import layer_flops
from tlgc_mp.bench.scaling.layer_pipeline import LayerPipeline
from tlgc_mp.bench.settings import IMAGE_SIZE, NUM_CLASSES, STRATEGIES, Memory, Steps
from tlgc_mp.engine import checkpoint_activations, initialize
from tlgc_mp.engine.memory import engine_memory
from tlgc_mp.json_types import JsonObject
from tlgc_mp.models import create_model
from tlgc_mp.models.wide_resnet import WideResNet
from tlgc_mp.nn import TwoLevelConv2d
from tlgc_mp.parallel.sharded import ShardedLayer

MakeOptimizer: TypeAlias = Callable[[Iterable[Tensor]], torch.optim.Optimizer]

SEED = 1
LEARNING_RATE = 1e-3
"""Small: the images are noise, and numbers that are none take another time to compute with."""
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4

ZERO3_LIMITS = {
    "stage3_max_live_parameters": 120_000_000,
    "stage3_max_reuse_distance": 120_000_000,
    "reduce_bucket_size": 60_000_000,
    "sub_group_size": 60_000_000,
}
"""In parameters: room for two of the widest layer at w = 40, and one in a bucket. DeepSpeed's own are a gigabyte and
more each, which leaves every parameter of that network whole on every replica."""


@dataclass
class Workload:
    """What one rank trains.

    Attributes:
        step: one training step, collective.
        model: this rank's part of the network.
        memory: ``parameter_bytes``, ``gradient_bytes`` and ``optimizer_bytes`` as they are when it is called; between
            backward and the optimizer's step all are as large as they get.
        flops: that a step needs on this rank.
        coarse_groups: names of the process groups of the coarse level.
        coarse_kinds: of the collectives there that are its own.
    """

    step: Callable[[], object]
    model: nn.Module
    memory: Callable[[], Memory]
    flops: int
    coarse_groups: frozenset[str]
    coarse_kinds: tuple[str, ...] = ("all_gather", "reduce_scatter", "send", "receive")


def build(request: Steps, ranks: int, rank: int, device: torch.device) -> Workload:
    """The workload of one of ``ranks`` ranks of a measurement; ``torch.distributed`` is up. Collective."""
    name = f"wrn-{request.depth}-{request.width}"
    conv, groups = STRATEGIES[request.strategy], request.groups
    model = create_model(
        name,
        conv=conv,
        groups=groups,
        num_classes=NUM_CLASSES,
        device="meta",
        coarse_channels=request.coarse_channels,
        coarse_sum=request.coarse_sum,
    )
    flops = layer_flops(name, conv, groups, request.batch_size, request.coarse_channels, request.coarse_sum)
    generator = torch.Generator().manual_seed(SEED)
    batch_size = request.batch_size
    images = torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    labels = torch.randint(0, NUM_CLASSES, (batch_size,), generator=generator)
    if request.strategy == "zero3":
        images, labels = images.chunk(ranks)[rank], labels.chunk(ranks)[rank]
    images = images.to(device, memory_format=torch.channels_last)
    labels = labels.to(device)

    def optimizer(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            parameters, lr=LEARNING_RATE, momentum=MOMENTUM if request.momentum else 0.0, weight_decay=WEIGHT_DECAY
        )

    if request.strategy in ("naive-mp", "pipeline"):
        assert isinstance(model, WideResNet)
        return _pipeline(model, optimizer, images, labels, request, flops)
    # Each of P ranks does as much of each layer, and each of D replicas all layers for as much of the batch.
    return _engine(model, optimizer, images, labels, request, ranks, sum(flops.values()) // ranks)


def _pipeline(
    model: WideResNet, optimizer: MakeOptimizer, images: Tensor, labels: Tensor, request: Steps, flops: dict[str, int]
) -> Workload:
    pipeline = LayerPipeline(
        model,
        optimizer,
        micro_batches=request.micro_batches,
        batch_size=request.batch_size,
        seed=SEED,
        device=images.device,
        autocast_dtype=torch.bfloat16 if request.dtype == "bf16" else None,
        update_in_backward=request.update_in_backward,
    )

    def memory() -> Memory:
        parameters = list(pipeline.parameters())
        return {
            "parameter_bytes": _bytes(parameters),
            "gradient_bytes": _bytes(parameter.grad for parameter in parameters),
            "optimizer_bytes": sum(_state_bytes(optimizer) for optimizer in pipeline.optimizers),
        }

    own = sum(flops.get(name, 0) for name, _ in pipeline.stage.named_modules())
    return Workload(lambda: pipeline.train_step(images, labels), pipeline.stage, memory, own, frozenset())


def _engine(
    model: nn.Module, optimizer: MakeOptimizer, images: Tensor, labels: Tensor, request: Steps, ranks: int, flops: int
) -> Workload:
    zero3 = request.strategy == "zero3"
    config: JsonObject = {
        "train_batch_size": request.batch_size,
        "zero_optimization": {"stage": 3, **ZERO3_LIMITS} if zero3 else {"stage": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
    }
    if not zero3 and ranks > 1:
        config["tensor_parallel"] = {"autotp_size": ranks}
    if request.dtype == "bf16":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    _, _, coarse_mode = request.strategy.partition("gc-2l-")
    if coarse_mode:
        for module in model.modules():
            if isinstance(module, TwoLevelConv2d):
                module.coarse_mode = coarse_mode
    if request.activation_checkpointing:
        checkpoint_activations(model)
    engine, *_ = initialize(model=model, optimizer=optimizer, config=config, seed=SEED)

    def step() -> None:
        engine.backward(F.cross_entropy(engine(images).float(), labels))
        engine.step()

    def memory() -> Memory:
        held = engine_memory(engine)
        return {
            "parameter_bytes": held["parameter_bytes"],
            "gradient_bytes": held["gradient_bytes"],
            "optimizer_bytes": held["state_bytes"] + held["master_bytes"],
        }

    coarse = {m.tlgc_region.ranks.group_name for m in engine.module.modules() if isinstance(m, ShardedLayer)}
    work = Workload(
        step, engine.module, memory, flops, frozenset(coarse if STRATEGIES[request.strategy] == "gc-2l" else ())
    )
    if request.coarse_sum:
        work.coarse_kinds = ("all_reduce",)
    return work


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of the tensors that an optimizer keeps from step to step."""
    return _bytes(value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
