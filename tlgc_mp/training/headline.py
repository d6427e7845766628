"""What rank 0 says of a run before it trains."""

from __future__ import annotations

import socket

import torch.distributed as dist

from tlgc_mp.checkpoint.folder import saved_run
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


def headline(settings: TrainSettings, counts: dict[str, int]) -> str:
    """What the run is, and where its ranks lie. Collective."""
    hosts = [""] * settings.topology.world
    dist.all_gather_object(hosts, socket.gethostname())
    topology = settings.topology
    groups = "" if settings.conv == "sc" else f", {settings.groups} groups"
    return (
        f"{settings.model}, {settings.conv}{groups}, {counts['total']:,} parameters on {topology.world} rank(s): "
        f"{topology.tensor_parallel} tensor-parallel x {topology.data_parallel} data-parallel"
        f"{', activation checkpointing' if settings.activation_checkpointing else ''}{across_hosts(topology, hosts)}"
    )
