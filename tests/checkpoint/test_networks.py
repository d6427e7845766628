"""Checkpoints of networks that others wrote, and of one that holds whatever a network may: saved at one P, loaded at
another, at every ZeRO stage, they go on as the run that saved them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.networks import OWN, engine_of, sgd, train
from tests.parallel.common import assert_close
from tests.ranks import run_ranks
from tlgc_mp.checkpoint import load_checkpoint, save_checkpoint
from tlgc_mp.parallel import gather_state_dict

FIRST, LAST = 3, 5
TOLERANCE = 1e-5
Run = tuple[list[float], dict[str, Any]]


def _adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.002, eps=1e-4)


OPTIMIZERS = {"sgd": sgd, "adam": _adam}
SAVED = [
    *((ranks, "odd", stage, "sgd") for ranks in (1, 2) for stage in (0, 1, 2, 3)),
    *((ranks, name, 0, "adam") for ranks in (1, 2) for name in ("odd", "seldom")),
    *((1, "test_resnet", stage, "sgd") for stage in (0, 3)),
    *((2, "converted", stage, "sgd") for stage in (0, 2)),
    *((2, "joined", stage, "sgd") for stage in (0, 2)),
    *((1, name, 3, "sgd") for name in ("normed", "joined")),
]
"""(P, network, ZeRO stage, optimizer)"""


def _others(ranks: int) -> list[tuple[Any, int]]:
    """(what was saved, the ZeRO stage to load it at) for a world of ``ranks``: 1 -> 2, 2 -> 1 and 2 -> 4 ranks."""
    saved = [kind for kind in SAVED if kind[0] == (1 if ranks == 2 else 2)]
    if ranks == 4:
        saved = [kind for kind in saved if kind[2] in (0, 3)]
    return [(kind, kind[2] if kind[1] in OWN else (kind[2] + 1) % 4) for kind in saved]


def _go_on(engine: Any) -> Run:
    return train(engine, range(FIRST, LAST)), gather_state_dict(engine.module)


def _save(folder: str) -> dict[Any, tuple[Run, Run]]:
    """Of each kind, the run that went on, and the one that was loaded at its own shape."""
    found = {}
    for kind in SAVED:
        ranks, name, stage, optimizer = kind
        if ranks == dist.get_world_size():
            engine = engine_of(name, ranks, stage, OPTIMIZERS[optimizer])
            train(engine, range(FIRST))
            save_checkpoint(engine, f"{folder}/{kind}")
            whole = _go_on(engine)
            engine = engine_of(name, ranks, stage, OPTIMIZERS[optimizer])
            load_checkpoint(engine, f"{folder}/{kind}")
            found[kind] = whole, _go_on(engine)
    return found


def _load(folder: str) -> list[Run]:
    ranks, runs = dist.get_world_size(), []
    for kind, stage in _others(ranks):
        engine = engine_of(kind[1], ranks, stage, OPTIMIZERS[kind[3]])
        load_checkpoint(engine, f"{folder}/{kind}")
        runs.append(_go_on(engine))
    return runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def saved(folder: Path) -> dict[Any, tuple[Run, Run]]:
    return {kind: runs for ranks in (1, 2) for kind, runs in run_ranks(ranks, _save, str(folder))[0].items()}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", SAVED, ids=str)
def test_at_its_own_shape_bit_for_bit(saved: dict[Any, tuple[Run, Run]], kind: Any) -> None:
    (losses, state), (loaded_losses, loaded) = saved[kind]
    assert loaded_losses == losses
    assert loaded.keys() == state.keys()
    for name, value in state.items():
        same = torch.equal(loaded[name], value) if torch.is_tensor(value) else loaded[name] == value
        assert same, name


@pytest.mark.timeout(240)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_at_another_number_of_ranks_to_rounding(saved: dict[Any, tuple[Run, Run]], folder: Path, ranks: int) -> None:
    for runs in run_ranks(ranks, _load, str(folder)):
        for (kind, stage), (losses, state) in zip(_others(ranks), runs, strict=True):
            expected, theirs = saved[kind][0]
            assert losses == pytest.approx(expected, rel=TOLERANCE), (kind, stage)
            tensors = [name for name, value in theirs.items() if torch.is_tensor(value)]
            assert_close({n: state[n] for n in tensors}, {n: theirs[n] for n in tensors}, 1e-4, least=1e-2)
            assert all(state[name] == theirs[name] for name in theirs.keys() - set(tensors)), (kind, stage)
