"""What rank 0 says of a run before it trains."""

from __future__ import annotations

import socket

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from tlgc_mp.checkpoint.folder import saved_run
from tlgc_mp.data import Datasets
from tlgc_mp.engine.config import dtype_of, zero_stage
from tlgc_mp.parallel.topology import across_hosts
from tlgc_mp.training.settings import TrainSettings


def respread(settings: TrainSettings) -> str:
    """What a resumed run says where it is spread over ranks otherwise than the run that was saved."""
    assert settings.resume_from is not None
    saved, now = saved_run(*settings.resume_from), settings.description()
    spread = [
        f"{run['tensor_parallel']} tensor-parallel x {run['data_parallel']} data-parallel at ZeRO {run['zero_stage']}"
        for run in (saved, now)
    ]
    micro = [run["batch_size"] // (run["accumulation"] * run["data_parallel"]) for run in (saved, now)]
    said = []
    if spread[0] != spread[1]:
        said.append(f"It was saved as {spread[0]}, and goes on as {spread[1]}")
    if micro[0] != micro[1]:
        said.append(f"BatchNorm now sees {micro[1]} images at once, where it saw {micro[0]}: the losses will differ")
    return "; ".join(said)


def headline(settings: TrainSettings, counts: dict[str, int], data: Datasets, steps: int) -> str:
    """What the run is, where its ranks lie, and what it trains on in epochs of ``steps`` steps. Collective."""
    hosts = [""] * settings.topology.world
    dist.all_gather_object(hosts, socket.gethostname())
    topology, config = settings.topology, settings.deepspeed_config
    groups = "" if settings.conv == "sc" else f", {settings.groups} groups"
    shares = [
        f"{count} {what}"
        for count, what in ((topology.data_parallel, "replicas"), (settings.accumulation, "micro-batches"))
        if count > 1
    ]
    divided = f" ({' x '.join([*shares, str(settings.micro_batch)])})" if shares else ""
    return (
        f"{settings.model}, {settings.conv}{groups}, {counts['total']:,} parameters on {topology.world} rank(s): "
        f"{topology.tensor_parallel} tensor-parallel x {topology.data_parallel} data-parallel"
        f"{', activation checkpointing' if settings.activation_checkpointing else ''}{across_hosts(topology, hosts)}\n"
        f"{len(data.train):,} images of {data.num_classes} classes, {data.image_size} x {data.image_size} pixels, "
        f"batch {settings.batch_size}{divided}, {count_of(steps, 'step')} an epoch, "
        f"{count_of(settings.epochs, 'epoch')}; {_device()}, "
        f"{dtype_of(config)}, ZeRO {zero_stage(config)}; output in {settings.output_dir}"
    )


def average_note(settings: TrainSettings, steps: int) -> str:
    """What is to be known of an average that reaches back to where it began; empty where that is forgotten."""
    decay, total = settings.method.ema, settings.epochs * steps
    if decay is None or decay**total < 0.01:
        return ""
    return (
        f"Of the average that is tested, {100 * decay**total:.0f} % will be the weights it began with when all "
        f"{count_of(total, 'step')} are done; --ema {max(0.5, 1 - 10 / total):.2g} forgets them sooner"
    )


def count_of(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _device() -> str:
    """What rank 0 trains on, by name."""
    name = str(get_accelerator().device_name())
    return f"{name} ({torch.cuda.get_device_name()})" if name == "cuda" else name
