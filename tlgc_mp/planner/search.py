"""Every way to lay a training step over ranks: what it takes, what it sends, how long it lasts, and which is best."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from tlgc_mp.engine.config import Config, read_config, tensor_parallel_size, zero_stage
from tlgc_mp.engine.recompute import Blocks
from tlgc_mp.errors import UsageError, divisors, is_count, one_of
from tlgc_mp.nn.arguments import check_module
from tlgc_mp.parallel.joins import fit_joins
from tlgc_mp.parallel.meta_pass import copy_on_meta
from tlgc_mp.parallel.plan import Placement
from tlgc_mp.parallel.plan import plan as plan_placements
from tlgc_mp.planner.candidates import Candidate, Plan
from tlgc_mp.planner.devices import DTYPES, Device, Network, find_device
from tlgc_mp.planner.holdings import MASTER, MakeOptimizer, Share, holdings, optimizer_of, partition
from tlgc_mp.planner.trace import BASES, CONVOLUTION, PRODUCT, Loss, Trace, Traces, trace
from tlgc_mp.planner.traffic import TENSOR_PARALLEL, collectives, host_seconds

SMALLEST_BUCKET = 5_000_000
"""Elements of the buckets in a plan, where no parameter is larger."""


def momentum_sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD as the paper's recipes have it."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)


def mean_loss(output: object) -> Tensor:
    """Cross-entropy of logits (B, classes); the sum of all floating-point outputs of a network that gives others."""
    if isinstance(output, Tensor) and output.dim() == 2:
        return F.cross_entropy(output.float(), torch.empty(output.shape[0], dtype=torch.long, device=output.device))
    sums = [leaf.float().sum() for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not sums:
        raise UsageError("model must give an output that depends on its parameters, got none; give loss=")
    return torch.stack(sums).sum()


def plan(
    model: nn.Module,
    sample_input: object,
    config: Config,
    *,
    ranks: int = 1,
    device: str | Device = "h200",
    memory: float | None = None,
    network: Network | None = None,
    optimizer: MakeOptimizer = momentum_sgd,
    loss: Loss = mean_loss,
    blocks: Blocks | None = None,
    dtype: str = "fp32",
) -> Plan:
    """Finds how ``model`` trains on ``ranks`` ranks: what fits, how fast it is, and what of it is fastest.

    The model runs forward and backward on the meta device as one rank holds it; nothing is allocated or sent.

    Args:
        model: a one-device model, on any device; it is left as it is.
        sample_input: a tensor, or a tuple of what ``model`` takes, whose first dimension is the batch's; only shapes
            and types are looked at.
        config: a DeepSpeed configuration, as a dict or a path, with ``train_batch_size``. What else it says of P, the
            ZeRO stage and the micro-batch is kept; the rest is searched.
        ranks: P x D.
        device: the name of a device or a :class:`~tlgc_mp.planner.devices.Device`.
        memory: bytes of a rank, where they are not the device's.
        network: how the ranks are joined; hosts of 8 where not given.
        optimizer: from parameters to a torch optimizer.
        loss: from the model's output to a scalar, on the meta device.
        blocks: classes of the blocks that :func:`tlgc_mp.checkpoint_activations` takes; the model's own where it says.
        dtype: ``fp32`` or ``bf16``.

    Raises:
        UsageError: an argument that cannot work, or a model that cannot be split or run without values.
    """
    check_module("model", model)
    if hasattr(model, "tlgc_region"):
        raise UsageError("model must be a one-device model, got one that is split; plan before it is")
    settings = read_config(config)
    batch = settings.get("train_batch_size")
    if not is_count(batch):
        raise UsageError(f"train_batch_size must be a number of samples, got {batch!r}; use e.g. 128")
    if not is_count(ranks):
        raise UsageError(f"ranks must be 1 or more, got {ranks!r}; use e.g. 8")
    if dtype not in DTYPES:
        raise UsageError(f"dtype must be {one_of(DTYPES)}, got {dtype!r}")
    if memory is not None and not 0 < memory < math.inf:
        raise UsageError(f"memory must be a number of bytes above 0, got {memory!r}; use e.g. 24 * 2**30")
    assert isinstance(batch, int)
    inputs = sample_input if isinstance(sample_input, tuple) else (sample_input,)
    if not any(isinstance(leaf, Tensor) and leaf.dim() for leaf in tree_leaves(inputs)):
        raise UsageError("sample_input must hold a tensor whose first dimension is the batch's, got none; give images")
    found = find_device(device) if isinstance(device, str) else device
    joined = network or Network(-(-ranks // 8), min(ranks, 8), 12.5e9)
    search = Search(
        Job(model, inputs, loss, optimizer, batch, blocks, dtype), found, joined, ranks, memory or found.memory
    )
    wanted = Wanted(
        tensor_parallel=tensor_parallel_size(settings),
        stage=zero_stage(settings) if "zero_optimization" in settings else None,
        micro_batch=cast("int | None", settings.get("train_micro_batch_size_per_gpu")),
    )
    return Plan(found, joined, dtype, in_order(search.candidates(wanted)))


@dataclass(frozen=True)
class Job:
    """What is to be trained.

    Attributes:
        batch: samples of a step, over all replicas.
        blocks: that checkpointing takes.
        groups: N, where the model was given by name.
    """

    model: nn.Module
    inputs: tuple[object, ...]
    loss: Loss
    optimizer: MakeOptimizer
    batch: int
    blocks: Blocks | None = None
    dtype: str = "fp32"
    groups: int | None = None

    @functools.cached_property
    def as_trained(self) -> nn.Module:
        """The model on the meta device, in its type."""
        twin = copy_on_meta(self.model, 1, None)
        return twin.to(torch.bfloat16) if self.dtype == "bf16" else twin

    def placements(self, tensor_parallel: int) -> dict[str, Placement]:
        """How the layers are split over P ranks."""
        found = plan_placements(self.model, tensor_parallel)
        return found if tensor_parallel == 1 else fit_joins(self.model, found, tensor_parallel, self.inputs)

    def has_blocks(self) -> bool:
        """Whether it is known what activation checkpointing takes."""
        return self.blocks is not None or getattr(self.model, "block_types", None) is not None


@dataclass(frozen=True)
class Wanted:
    """What is not to be searched, but is given."""

    tensor_parallel: int | None = None
    stage: int | None = None
    micro_batch: int | None = None


def in_order(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that fit, the fastest first, and then the others, the smallest first."""
    return sorted(candidates, key=lambda c: (not c.fits, c.step_seconds if c.fits else c.needed))


class Search:
    """All candidates for one job on some ranks."""

    def __init__(self, job: Job, device: Device, network: Network, ranks: int, memory: float) -> None:
        self.job, self.device, self.network, self.ranks, self.memory = job, device, network, ranks, memory

    def candidates(self, wanted: Wanted) -> list[Candidate]:
        """All that share the batch evenly.

        Raises:
            UsageError: nothing does.
        """
        found = [
            self._candidate(tensor_parallel, share, micro_batch, checkpointing)
            for tensor_parallel in self._tensor_parallel(wanted)
            for micro_batch in self._micro_batches(self.ranks // tensor_parallel, wanted)
            for checkpointing in ((False, True) if self.job.has_blocks() else (False,))
            for share in self._shares(tensor_parallel, wanted)
        ]
        if not found:
            raise UsageError(
                f"the batch must be a multiple of the replicas of {self.ranks} ranks, got {self.job.batch}; "
                f"use {one_of(divisors(self.job.batch)[-4:])} ranks, or another batch"
            )
        return found

    def _tensor_parallel(self, wanted: Wanted) -> list[int]:
        if wanted.tensor_parallel is not None:
            if self.ranks % wanted.tensor_parallel:
                raise UsageError(
                    f"P must divide the {self.ranks} ranks, got {wanted.tensor_parallel}; "
                    f"use {one_of(divisors(self.ranks))}"
                )
            return [wanted.tensor_parallel]
        return [count for count in divisors(self.ranks) if self._splits(count)]

    def _splits(self, tensor_parallel: int) -> bool:
        """Whether P ranks hold less than P / 2 would: beyond that, ranks would all hold the same."""
        if tensor_parallel == 1:
            return True
        placements = self.job.placements(tensor_parallel)
        split = whole = 0
        for name, placement in placements.items():
            for key, param in self.job.model.get_submodule(name).named_parameters(recurse=False):
                if key in placement.dims:
                    split += param.numel()
                else:
                    whole += param.numel()
        return split > whole

    def _micro_batches(self, replicas: int, wanted: Wanted) -> Iterator[int]:
        if self.job.batch % replicas:
            return
        each = self.job.batch // replicas
        for micro_batch in divisors(each):
            if wanted.micro_batch in (None, micro_batch) and (micro_batch > 1 or each == 1):
                yield micro_batch

    def _shares(self, tensor_parallel: int, wanted: Wanted) -> list[Share]:
        replicas = self.ranks // tensor_parallel
        largest = max(self._traces(tensor_parallel, False).at(BASES[0]).sizes)
        bucket = max(largest, SMALLEST_BUCKET)
        bucket += bucket % 2
        stages = [wanted.stage] if wanted.stage is not None else [0, 1, 2, 3] if replicas > 1 else [0, 1]
        if self.job.dtype != "fp32":
            stages = [stage for stage in stages if stage]  # without ZeRO such an engine is refused
        offloads = (False, True) if self.device.accelerator else (False,)
        return [
            Share(stage, replicas, bucket, offload) for stage in stages for offload in offloads if stage or not offload
        ]

    @functools.cache  # noqa: B019  # a search lives as long as what it finds
    def _traces(self, tensor_parallel: int, checkpointing: bool) -> Traces:
        placements = self.job.placements(tensor_parallel)

        def resized(samples: int) -> Callable[[Tensor], Tensor]:
            def resize(tensor: Tensor) -> Tensor:
                if not tensor.dim():
                    return tensor
                last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
                dtype = torch.bfloat16 if self.job.dtype == "bf16" and tensor.is_floating_point() else tensor.dtype
                made = torch.empty((samples, *tensor.shape[1:]), dtype=dtype, device="meta")
                return made.to(memory_format=torch.channels_last) if last else made

            return resize

        def prepare(twin: nn.Module) -> None:
            if checkpointing:
                from tlgc_mp.engine.recompute import checkpoint_activations

                checkpoint_activations(twin, self.job.blocks)

        def make(samples: int) -> Trace:
            return trace(
                self.job.as_trained,
                tree_map_only(Tensor, resized(samples), self.job.inputs),
                self.job.loss,
                tensor_parallel=tensor_parallel,
                placements=placements,
                on_accelerator=self.device.accelerator,
                prepare=prepare,
            )

        return Traces(make)

    def _candidate(self, tensor_parallel: int, share: Share, micro_batch: int, checkpointing: bool) -> Candidate:
        job, device = self.job, self.device
        accumulation = job.batch // (share.replicas * micro_batch)
        found = self._traces(tensor_parallel, checkpointing).at(micro_batch)
        memory = replace(
            holdings(found, share, accumulation, job.optimizer, device.accelerator),
            workspace=device.compiled * found.convolutions,
        )
        sends = collectives(found, share, tensor_parallel, accumulation, self.network)
        spent = {each: each.seconds(device, self.network, tensor_parallel) for each in sends}
        part = partition(found.parameters, share.replicas) if share.stage else found.parameters
        sizes = (part,) if share.stage else found.sizes
        stepped = optimizer_of(job.optimizer, sizes, MASTER if share.stage else found.item, device.accelerator)
        seconds = {
            "computation": accumulation * compute_seconds(found, device, job.dtype),
            "tensor-parallel collectives": sum(t for each, t in spent.items() if each.ranks == TENSOR_PARALLEL),
            "replicas' collectives": sum(t for each, t in spent.items() if each.ranks != TENSOR_PARALLEL),
            "optimizer": stepped.moved / device.bandwidth + host_seconds(found, share, device),
        }
        return Candidate(
            groups=job.groups,
            tensor_parallel=tensor_parallel,
            data_parallel=share.replicas,
            share=share,
            micro_batch=micro_batch,
            accumulation=accumulation,
            checkpointing=checkpointing,
            memory=memory,
            collectives=sends,
            seconds=seconds,
            limit=self.memory,
            fixed=device.fixed + (device.zero if share.stage else 0),
            samples=job.batch,
        )


def compute_seconds(trace: Trace, device: Device, dtype: str) -> float:
    """Of a forward and a backward pass: each operator as long as its arithmetic or its memory takes."""
    rates = np.full(len(trace.kinds), np.inf)
    for kind, by_type in ((CONVOLUTION, device.convolution), (PRODUCT, device.product)):
        rates[trace.kinds == kind] = by_type[dtype]
    each = np.maximum(trace.flops / rates, trace.moved / device.bandwidth)
    return float(each.sum()) + device.overhead * int(np.count_nonzero(trace.moved))
