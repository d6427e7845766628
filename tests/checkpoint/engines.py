"""Engines over P x D ranks that train a little, save, and go on, for the ranks of :func:`tests.ranks.run_ranks`."""

from __future__ import annotations

import datetime
import itertools
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import tlgc_mp.checkpoint.saver
from tlgc_mp.checkpoint import CheckpointSaver, SaveError, load_checkpoint, save_checkpoint
from tlgc_mp.checkpoint.folder import tags
from tlgc_mp.engine import initialize
from tlgc_mp.errors import UsageError
from tlgc_mp.nn import TwoLevelConv2d
from tlgc_mp.parallel import gather_state_dict
from tlgc_mp.parallel.topology import Topology

SEED, GROUPS, CLASSES = 3, 4, 5
MICRO_BATCHES, MICRO_BATCH = 4, 3  # of a step, over all replicas: BatchNorm sees the same images at every D

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=5e-4),
    "plain-sgd": lambda p: torch.optim.SGD(p, lr=0.02),
    "adam": lambda p: torch.optim.Adam(p, lr=0.002),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.002, betas=(0.8, 0.95)),
    "two-groups": lambda p: torch.optim.SGD(_two_groups(list(p)), lr=0.02, momentum=0.9),
}

VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    "offload": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
}


def _two_groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    """No weight decay for vectors, and another rate."""
    vectors = [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) < 2]
    rest = [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) >= 2]
    return [{"params": vectors, "lr": 0.03}, {"params": rest, "weight_decay": 5e-3}]


@dataclass(frozen=True)
class Shape:
    """How a run is split."""

    tensor_parallel: int
    data_parallel: int
    stage: int

    @property
    def world(self) -> int:
        return self.tensor_parallel * self.data_parallel

    def __str__(self) -> str:
        return f"{self.tensor_parallel}x{self.data_parallel}-zero{self.stage}"


def network() -> nn.Module:
    """A stem, two-level layers, BatchNorm and a head, smooth, with a frozen parameter; on the meta device."""
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.SiLU(),
            TwoLevelConv2d(16, 32, 3, padding=1, stride=2, groups=GROUPS, coarse_init="he"),
            nn.BatchNorm2d(32),
            nn.SiLU(),
            TwoLevelConv2d(32, 32, 1, groups=GROUPS, bias=True, coarse_init="he"),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, CLASSES),
        )
    model[4].weight.requires_grad_(False)
    return model


def engine_of(shape: Shape, optimizer: str = "sgd", variant: str = "fp32") -> Any:
    zero = {"stage": shape.stage, **VARIANTS[variant].get("zero_optimization", {})}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": MICRO_BATCHES // shape.data_parallel,
        "tensor_parallel": {"autotp_size": shape.tensor_parallel},
        "zero_allow_untested_optimizer": True,
        **VARIANTS[variant],
        "zero_optimization": zero,
    }
    return initialize(
        model=network(),
        optimizer=OPTIMIZERS[optimizer],
        lr_scheduler=lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [3, 5], 0.5),
        config=settings,
        seed=SEED,
    )[0]


def micro_batches(step: int) -> Iterator[tuple[Tensor, Tensor]]:
    drawn = torch.Generator().manual_seed(1000 + step)
    for _ in range(MICRO_BATCHES):
        images = torch.randn(MICRO_BATCH, 3, 8, 8, generator=drawn)
        yield images, torch.randint(CLASSES, (MICRO_BATCH,), generator=drawn)


def train_steps(engine: Any, shape: Shape, steps: range) -> list[float]:
    """The loss of each step, the mean over the micro-batches of all replicas."""
    topology = Topology(dist.get_world_size(), dist.get_rank(), shape.tensor_parallel)
    losses = []
    for step in steps:
        total = torch.zeros((), dtype=torch.float64)
        for number, (images, labels) in enumerate(micro_batches(step)):
            if number % shape.data_parallel == topology.dp_rank:
                loss = F.cross_entropy(engine(images).float(), labels)
                engine.backward(loss)
                engine.step()
                total += loss.detach()
        dist.all_reduce(total)
        losses.append(float(total) / MICRO_BATCHES / shape.tensor_parallel)
    return losses


@dataclass
class Run:
    """What came of a run: losses after the checkpoint, the rates then, and the whole model's state at the end."""

    losses: list[float]
    rate: float
    state: dict[str, Tensor]


def finish(engine: Any, shape: Shape, steps: range) -> Run:
    losses = train_steps(engine, shape, steps)
    return Run(losses, engine.optimizer.param_groups[0]["lr"], gather_state_dict(engine.module))


Kind = tuple[Shape, str, str]
"""Shape, optimizer, variant of the configuration."""


def save_and_go_on(kind: Kind, folder: str, first: int, last: int) -> Run:
    """Trains ``first`` steps, saves, and trains on to ``last``."""
    engine = engine_of(*kind)
    train_steps(engine, kind[0], range(first))
    path = save_checkpoint(engine, folder, client_state={"step": first})
    assert path.endswith(f"step-{first}"), path
    return finish(engine, kind[0], range(first, last))


def load_and_go_on(kind: Kind, folder: str, last: int) -> Run:
    engine = engine_of(*kind)
    first = load_checkpoint(engine, folder)["step"]
    return finish(engine, kind[0], range(first, last))


def save_and_load(kinds: list[Kind], folder: str, first: int, last: int) -> dict[Kind, tuple[Run, Run]]:
    """For each kind of run, (the one that went on, the one that was loaded)."""
    return {
        kind: (save_and_go_on(kind, f"{folder}/{kind}", first, last), load_and_go_on(kind, f"{folder}/{kind}", last))
        for kind in kinds
    }


def load_all(kinds: list[Kind], others: list[Shape], folder: str, last: int) -> list[Run]:
    """Each kind's checkpoint, loaded at another shape."""
    return [
        load_and_go_on((other, *kind[1:]), f"{folder}/{kind}", last) for kind, other in zip(kinds, others, strict=True)
    ]


# Saves that go wrong, and what stands then.


def save_until_killed(folder: str, after_first: float) -> None:
    """Saves again and again, and is killed that many seconds after the first checkpoint stands."""
    engine = engine_of(Shape(1, 1, 0))
    train_steps(engine, Shape(1, 1, 0), range(1))
    saver = CheckpointSaver(engine, folder, keep=2)
    saver.save("save-0", {"number": 0})
    saver.wait()
    killer = threading.Timer(after_first, os.kill, (os.getpid(), signal.SIGKILL))
    killer.start()
    for number in itertools.count(1):
        saver.save(f"save-{number}", {"number": number})


def fill_the_disk(folder: str) -> list[str]:
    """What saving says on each rank when rank 1 may write no more, and what its folder holds then."""
    shape = Shape(1, 2, 1)
    engine = engine_of(shape)
    train_steps(engine, shape, range(1))
    saver = CheckpointSaver(engine, folder)
    saver.save("good", {})
    saver.wait()
    saver.save("better", {})
    saver.wait()
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))  # leaves room for the ranks' store
    saver.save("bad", {}, {"ballast": torch.zeros(1 << 19)})
    said = []
    for _ in range(2):
        try:
            saver.wait()
        except SaveError as error:
            said.append(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return said


def save_where_a_file_is(folder: str) -> str:
    engine = engine_of(Shape(1, 1, 0))
    try:
        save_checkpoint(engine, folder)
    except SaveError as error:
        return str(error)
    return ""


def train_on_while_it_is_written(folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the weights when the save began, those that a fresh engine loads), the writing held up until steps were made."""
    shape = Shape(1, 1, 0)
    engine = engine_of(shape)
    train_steps(engine, shape, range(2))
    go_on = threading.Event()
    write = tlgc_mp.checkpoint.saver.save_file

    def held_up(*arguments: Any, **options: Any) -> None:
        assert go_on.wait(60.0)
        write(*arguments, **options)

    tlgc_mp.checkpoint.saver.save_file = held_up
    before = gather_state_dict(engine.module)
    saver = CheckpointSaver(engine, folder)
    saver.save("first", {})
    train_steps(engine, shape, range(2, 4))
    assert not os.path.exists(os.path.join(folder, "latest"))
    go_on.set()
    saver.wait()
    tlgc_mp.checkpoint.saver.save_file = write
    fresh = engine_of(shape)
    load_checkpoint(fresh, folder)
    return before, gather_state_dict(fresh.module)


def save_several(folder: str, keep: int, tags: list[str], best: str) -> None:
    engine = engine_of(Shape(1, 1, 0))
    saver = CheckpointSaver(engine, folder, keep=keep)
    for tag in tags:
        saver.save(tag, {})
        if tag == best:
            saver.mark_best()
    saver.wait()


class _Rule:
    """What a schedule may hold and pickle would have to run."""


class _Stateless:
    """A schedule of one's own that trains, and that no checkpoint can hold."""

    def step(self) -> None:
        pass


def save_odd_schedules(folder: str) -> list[str]:
    """What is said of each when it is to be saved, and before anything is trained."""
    engine = engine_of(Shape(1, 1, 0))
    scheduler, said = engine.lr_scheduler, []
    for rule in (_Rule(), lambda step: 0.5**step, None):
        scheduler.rule = rule
        engine.lr_scheduler = _Stateless() if rule is None else scheduler
        for refused in (lambda: save_checkpoint(engine, folder), lambda: CheckpointSaver(engine, folder)):
            try:
                refused()
            except UsageError as error:
                said.append(str(error))
    return said


# What saving asks of the ranks' store.


class _Counted:
    """A store that counts what is asked of it."""

    def __init__(self, store: Any) -> None:
        self.store, self.calls = store, 0

    def __getattr__(self, name: str) -> Any:
        self.calls += 1
        return getattr(self.store, name)


def save_while_others_use_the_store(folder: str, saves: int) -> tuple[list[str], int, int]:
    """(checkpoints, calls of the store, keys left in it) of a rank whose saver waits for a rank that is late: it writes
    only when the store has been used beside that wait."""
    rank, world = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method="env://", rank=rank, world_size=world)  # its store is a TCPStore
    engine = engine_of(Shape(1, world, 0))
    train_steps(engine, Shape(1, world, 0), range(1))
    shared = dist.distributed_c10d._get_default_store()
    write = tlgc_mp.checkpoint.saver.save_file

    def held_up(*arguments: Any, **options: Any) -> None:
        if rank == 0:
            shared.wait([f"tests/{saver.path}"], datetime.timedelta(seconds=20.0))
        write(*arguments, **options)

    tlgc_mp.checkpoint.saver.save_file = held_up
    saver = CheckpointSaver(engine, folder)
    counted = saver._store = _Counted(saver._store)
    dist.barrier()
    before = shared.num_keys()
    for number in range(saves):
        saver.save(f"save-{number}", {})
        if rank == 1:
            time.sleep(1.0)
            shared.set(f"tests/{saver.path}", "")
            shared.wait([f"tests/{saver.path}"], datetime.timedelta(seconds=20.0))
        saver.wait()
    dist.barrier()
    tlgc_mp.checkpoint.saver.save_file = write
    return tags(folder), counted.calls, shared.num_keys() - before - saves
