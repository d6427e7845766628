"""Engines beside and after one another in one process, and what the user's own code in ``initialize`` shows and raises.

Four ranks train four engines in turns, with 2, 1, 4 and 2 tensor-parallel ranks, each against one device.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from tests.parallel.common import (
    TrainingRun,
    assert_close,
    assert_trained,
    batches,
    run_ranks_once,
    sgd,
    smooth_network,
    train_one_device,
)
from tlgc_mp.engine import initialize
from tlgc_mp.errors import UsageError
from tlgc_mp.parallel import gather_state_dict
from tlgc_mp.parallel.topology import Topology

WORLD, STEPS, BATCH = 4, 4, 16
SPLITS = (2, 1, 4, 2)
STAGES = (0, 1, 3)
CLIP = 0.2
TOLERANCE = 2e-5


def _config(ranks: int, stage: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_batch_size": BATCH,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    if ranks > 1:
        config["tensor_parallel"] = {"autotp_size": ranks}
    return config


def _side_by_side(folder: str) -> dict[tuple[int, int], tuple[TrainingRun, list[str]]]:
    """(ZeRO stage, index of the engine) -> its run, and the names of the files of its checkpoint."""
    found = {}
    for stage in STAGES:
        engines = [
            initialize(model=smooth_network("cpu"), optimizer=sgd, config=_config(ranks, stage))[0] for ranks in SPLITS
        ]
        runs = [TrainingRun(losses=[[]]) for _ in SPLITS]
        for images, labels in batches(STEPS, BATCH, torch.float32):
            losses = []
            for ranks, engine, run in zip(SPLITS, engines, runs, strict=True):
                topology = Topology(WORLD, dist.get_rank(), ranks)
                part, part_labels = (
                    whole.chunk(topology.data_parallel)[topology.dp_rank] for whole in (images, labels)
                )
                losses.append(F.cross_entropy(engine(part), part_labels))
                run.losses[0].append(losses[-1].item())
            for engine, loss in zip(engines, losses, strict=True):
                engine.backward(loss)
            for engine in reversed(engines):
                engine.step()
        for index, (engine, run) in enumerate(zip(engines, runs, strict=True)):
            run.states = [gather_state_dict(engine.module)]
            place = Path(folder, f"{stage}-{index}")
            engine.save_checkpoint(str(place), tag="last")
            dist.barrier()
            found[stage, index] = run, sorted(path.name for path in Path(place, "last").iterdir())
    return found


@pytest.fixture(scope="module")
def side_by_side(
    tmp_path_factory: pytest.TempPathFactory,
) -> list[dict[tuple[int, int], tuple[TrainingRun, list[str]]]]:
    return run_ranks_once(WORLD, _side_by_side, str(tmp_path_factory.mktemp("checkpoints")))


@functools.cache
def _one_device(replicas: int) -> TrainingRun:
    data = batches(STEPS, BATCH, torch.float32)
    return train_one_device(smooth_network("cpu"), data, sgd, replicas=replicas, clip=CLIP)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("index", range(len(SPLITS)))
def test_engines_of_several_splits_train_side_by_side(side_by_side: list[Any], index: int, stage: int) -> None:
    expected = _one_device(WORLD // SPLITS[index])
    assert_trained(expected)
    assert min(expected.norms) > 2 * CLIP, "nothing was clipped"
    for rank, found in enumerate(side_by_side):
        run, _ = found[stage, index]
        replica = rank // SPLITS[index]
        assert run.losses[0] == pytest.approx(expected.losses[replica], rel=TOLERANCE)
        assert_close(run.states[0], expected.states[replica], TOLERANCE)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("index", range(len(SPLITS)))
def test_each_saves_a_file_of_the_model_for_every_share(side_by_side: list[Any], index: int, stage: int) -> None:
    for found in side_by_side:
        _, names = found[stage, index]
        shares = [f"mp_rank_{share:02d}_model_states.pt" for share in range(SPLITS[index])]
        assert [name for name in names if name.endswith("model_states.pt")] == shares


_kept: list[dist.Store] = []


def _one_after_another() -> list[list[float]]:
    """The losses of three lives of torch.distributed in one process, with a store that outlives them, as torchrun's."""
    dist.destroy_process_group()
    port, rank = int(os.environ["MASTER_PORT"]), _launched_rank()
    _kept.append(dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    lives = []
    for life in range(3):
        if life:
            dist.destroy_process_group()
            time.sleep(0.5 * (1 - rank))  # rank 0 comes late: what the store still has of it must not be read
        engine, *_ = initialize(model=smooth_network("cpu"), optimizer=sgd, config=_config(2 if life else 1, life))
        losses = []
        for images, labels in batches(2, BATCH, torch.float32):
            parts = 2 // (2 if life else 1)
            part, part_labels = images.chunk(parts)[rank % parts], labels.chunk(parts)[rank % parts]
            loss = F.cross_entropy(engine(part), part_labels)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        lives.append(losses)
    return lives


def _launched_rank() -> int:
    """The rank that the launcher gave, also while no group is up."""
    return int(os.environ["RANK"])


def test_engines_after_the_process_group_was_destroyed() -> None:
    data = batches(2, BATCH, torch.float32)
    for rank, lives in enumerate(run_ranks_once(2, _one_after_another)):
        for life, losses in enumerate(lives):
            replicas = 1 if life else 2
            expected = train_one_device(smooth_network("cpu"), data, sgd, replicas=replicas, clip=CLIP)
            assert losses == pytest.approx(expected.losses[rank % replicas], rel=TOLERANCE), f"life {life}"


class _Own(Exception):
    pass


def _users_code() -> dict[str, Any]:
    found: dict[str, Any] = {}

    def made(**arguments: Any) -> Any:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 10))
        given = {"optimizer": sgd, "config": {"train_batch_size": 2}, **arguments}
        return initialize(model=model, **given)

    def raised(**arguments: Any) -> BaseException | None:
        try:
            made(**arguments)
        except Exception as error:
            return error
        return None

    def speaking(parameters: Any) -> torch.optim.Optimizer:
        print("optimizer speaks")
        logging.getLogger("mine").warning("optimizer warns")
        return sgd(parameters)

    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        print("schedule speaks")
        return torch.optim.lr_scheduler.ConstantLR(optimizer)

    def own_error(_: Any) -> Any:
        raise _Own("mine")

    def parameters() -> Any:
        yield from ()
        raise KeyError("no such layer")

    errors = {
        "optimizer": raised(optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentun=0.9)),  # type: ignore[call-arg]
        "lr_scheduler": raised(lr_scheduler=lambda optimizer: {}["warmup"]),
        "model_parameters": raised(model_parameters=parameters()),
        "own": raised(optimizer=own_error),
        "configuration": raised(config={"train_batch_size": 3, "train_micro_batch_size_per_gpu": 2}),
        "a class": raised(optimizer=torch.optim.Adam),
    }
    found["errors"] = {name: (type(error), str(error)) for name, error in errors.items()}
    log, out = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(log)
    logging.root.addHandler(handler)
    with contextlib.redirect_stdout(out):
        made(optimizer=speaking, lr_scheduler=schedule)
        print("afterwards")
    logging.root.removeHandler(handler)
    found["printed"], found["logged"] = out.getvalue(), log.getvalue()
    return found


def test_errors_of_the_users_code_come_through_unchanged() -> None:
    (found,) = run_ranks_once(1, _users_code)
    errors = found["errors"]
    assert errors["optimizer"][0] is TypeError
    assert "momentun" in errors["optimizer"][1]
    assert "refused" not in errors["optimizer"][1]
    assert errors["lr_scheduler"] == (KeyError, "'warmup'")
    assert errors["model_parameters"] == (KeyError, "'no such layer'")
    assert errors["own"] == (_Own, "mine")
    assert errors["a class"][0] is type(None)
    assert errors["configuration"][0] is UsageError
    assert "deepspeed_config must be one that DeepSpeed accepts" in errors["configuration"][1]


def test_what_the_users_code_prints_and_logs_shows() -> None:
    (found,) = run_ranks_once(1, _users_code)
    assert found["printed"].splitlines() == ["optimizer speaks", "schedule speaks", "afterwards"]
    assert found["logged"].splitlines() == ["optimizer warns"]
