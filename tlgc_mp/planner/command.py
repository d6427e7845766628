"""What ``tlgc-mp plan`` does with its settings."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import nn

from tlgc_mp.errors import UsageError
from tlgc_mp.models.factory import create_meta_model
from tlgc_mp.models.names import NamedModel, library_model
from tlgc_mp.planner.candidates import Candidate, Plan
from tlgc_mp.planner.devices import LARGEST_RANKS, Network
from tlgc_mp.planner.holdings import MakeOptimizer
from tlgc_mp.planner.report import answer, describe, write
from tlgc_mp.planner.search import Job, Search, Wanted, in_order
from tlgc_mp.planner.settings import PlanSettings


def run(settings: PlanSettings) -> int:
    """Plans, says what was found, and writes it where a folder is named; the exit status: 1 where nothing fits."""
    plan = Plan(settings.device, settings.network, settings.dtype, candidates(settings))
    larger = None if plan.best is not None else _more_ranks(settings)
    said = answer(settings, plan, larger)
    print(f"{describe(plan)}\n\n{said}")
    if settings.output is not None:
        write(settings, plan, said, settings.output)
        print(f"Wrote plan.json, plan.md and plan.png to {settings.output}")
    return 0 if plan.best is not None else 1


def candidates(settings: PlanSettings) -> list[Candidate]:
    """All, in order, of every N."""
    found: list[Candidate] = []
    wanted = Wanted(tensor_parallel=settings.tensor_parallel)
    for groups in settings.groups:
        job = _job(settings, groups)
        search = Search(job, settings.device, settings.network, settings.ranks, settings.memory)
        found += search.candidates(wanted)
    return in_order(found)


def _job(settings: PlanSettings, groups: int) -> Job:
    arguments: NamedModel = {**settings.model, "groups": groups}
    name, size = arguments["name"], settings.image_size
    model = create_meta_model(**arguments)
    if library_model(name) is not None:
        from tlgc_mp.models.libraries import check_images

        check_images(name, size, 2)
    images = torch.empty(2, 3, size, size, device="meta").to(memory_format=torch.channels_last)
    return Job(model, (images,), _loss, _optimizer(settings), settings.batch_size, dtype=settings.dtype, groups=groups)


def _loss(logits: torch.Tensor) -> torch.Tensor:
    labels = torch.empty(logits.shape[0], dtype=torch.long, device=logits.device)
    return nn.functional.cross_entropy(logits, labels)


@functools.cache
def _make(name: str, momentum: float, weight_decay: float) -> MakeOptimizer:
    if name == "adamw":
        return functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=weight_decay)
    return functools.partial(torch.optim.SGD, lr=0.1, momentum=momentum, weight_decay=weight_decay)


def _optimizer(settings: PlanSettings) -> MakeOptimizer:
    return _make(settings.optimizer, settings.recipe.momentum, settings.recipe.weight_decay)


def _more_ranks(settings: PlanSettings) -> Candidate | None:
    """The best on the fewest ranks, twice as many each time, on which something fits."""
    hosts = settings.network.hosts
    while 2 * hosts * settings.network.ranks <= LARGEST_RANKS:
        hosts *= 2
        network = Network(hosts, settings.network.ranks, settings.network.bandwidth)
        try:
            found = candidates(replace(settings, network=network))
        except UsageError:  # so many ranks do not share the batch
            return None
        if found[0].fits:
            return found[0]
    return None
