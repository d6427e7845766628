"""What cannot be loaded or saved is said on every rank alike, at once, and no rank waits for another."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.checkpoint.engines import Shape, engine_of, train_steps
from tests.checkpoint.written import describe, reindex
from tests.ranks import run_ranks
from tlgc_mp import UsageError, load_checkpoint, save_checkpoint
from tlgc_mp.checkpoint.folder import sealed
from tlgc_mp.parallel import gather_state_dict

SHAPE = Shape(2, 1, 1)
STEM = "weights/0.weight"


def _put(*path: Any) -> Callable[[Path], None]:
    def change(description: Any) -> None:
        *way, last, value = path
        for key in way:
            description = description[key]
        description[last] = value

    return lambda checkpoint: describe(checkpoint, change)


def _reindexed(change: Callable[[Any, Any], Any]) -> Callable[[Path], None]:
    return lambda checkpoint: reindex(checkpoint, change)


def _no_schedule(checkpoint: Path) -> None:
    path = checkpoint / "scheduler.pt"
    path.write_bytes(b"not a pickle")
    describe(checkpoint, lambda description: description["files"].update({path.name: sealed(str(path))}))


def _flip(checkpoint: Path) -> None:
    path = checkpoint / "shard-01-00.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "one bit of one shard": (_flip, "shard-01-00.safetensors' is damaged: its checksum"),
    "no shard": (lambda path: (path / "shard-01-00.safetensors").unlink(), "shard-01-00.safetensors' is missing"),
    "no description": (lambda path: (path / "checkpoint.json").unlink(), "checkpoint must be one, or a folder"),
    "a description of nothing": (lambda path: (path / "checkpoint.json").write_text("{}"), "of format 1, got None"),
    "files a list": (_put("files", []), "names no files"),
    "no files": (_put("files", {}), "has no files of weights"),
    "client state null": (_put("client_state", None), "has no client_state"),
    "no optimizer": (_put("optimizer", None), "does not describe an optimizer"),
    "an optimizer without its groups": (_put("optimizer", "groups", 7), "does not describe the optimizer's groups"),
    "an optimizer of two groups": (_put("optimizer", "groups", [{}, {}]), "must have 1 parameter groups, got 2"),
    "scalars of no kind": (_put("optimizer", "scalars", [{"step": 1}]), "does not give the optimizer's step"),
    "another optimizer": (_put("optimizer", "type", "Adam"), "its optimizer must be SGD, got Adam"),
    "no steps": (_put("engine", {}), "does not count the engine's steps"),
    "steps before the first": (_put("engine", "global_steps", -1), "does not count the engine's steps"),
    "no index": (_reindexed(lambda tensors, index: {}), "does not say where its tensors belong"),
    "a part beyond the last": (_reindexed(lambda _, index: index[STEM].update(part=7)), "does not say where"),
    "a gap": (_reindexed(lambda _, index: index[STEM].update(start=3)), f"holds only a part of {STEM}"),
    "a tensor too many": (
        _reindexed(
            lambda tensors, index: [
                tensors.update({"weights/9.scale": torch.zeros(1)}),
                index.update({"weights/9.scale": {**index["weights/9.bias"], "shape": [1]}}),
            ]
        ),
        "it is of another model: only one of the two has 9.scale",
    ),
    "a schedule that is none": (_no_schedule, "checkpoint"),
}  # fmt: skip


def _said(act: Callable[[], Any]) -> str:
    try:
        act()
    except UsageError as error:
        return str(error)
    return "taken"


def refusals(folder: str) -> tuple[dict[str, str], bool]:
    """(what is said of each mistake, whether the engine then still loads the whole checkpoint)"""
    engine = engine_of(SHAPE)
    train_steps(engine, SHAPE, range(1))
    whole = Path(save_checkpoint(engine, f"{folder}/whole"))
    expected = gather_state_dict(engine.module)
    said = {}
    for number, (name, (spoil, _)) in enumerate(SPOILT.items()):
        copy = Path(folder) / str(number) / whole.name
        if dist.get_rank() == 0:
            shutil.copytree(whole, copy)
            spoil(copy)
        dist.barrier()
        said[name] = _said(functools.partial(load_checkpoint, engine, str(copy.parent)))
    # On rank 1 alone.
    path = "nowhere" if dist.get_rank() == 1 else str(whole)
    said["a path that one rank does not see"] = _said(lambda: load_checkpoint(engine, path))
    for name, call in {
        "path": lambda: load_checkpoint(engine, 5),  # type: ignore[arg-type]
        "engine": lambda: load_checkpoint(torch.nn.Linear(1, 1), str(whole)),
        "engine saved": lambda: save_checkpoint(None, folder),
        "folder": lambda: save_checkpoint(engine, None),  # type: ignore[arg-type]
        "tag": lambda: save_checkpoint(engine, folder, "../x"),
        "tag empty": lambda: save_checkpoint(engine, folder, ""),
        "tag partial": lambda: save_checkpoint(engine, folder, "x.partial"),
        "tag latest": lambda: save_checkpoint(engine, folder, "latest"),
        "keep": lambda: save_checkpoint(engine, folder, keep=0),
        "state": lambda: save_checkpoint(engine, folder, client_state=[1]),  # type: ignore[arg-type]
        "state of tensors": lambda: save_checkpoint(engine, folder, client_state={"x": torch.zeros(1)}),
    }.items():
        said[name] = _said(call)
    load_checkpoint(engine, str(whole))
    found = gather_state_dict(engine.module)
    return said, all(torch.equal(found[name], value) for name, value in expected.items())


ARGUMENTS = {
    "a path that one rank does not see": "holds one, got 'nowhere'; give",
    "path": "checkpoint must be a path, got 5",
    "engine": "engine must be the one that tlgc_mp.initialize returns, got Linear",
    "engine saved": "engine must be the one that tlgc_mp.initialize returns, got NoneType",
    "folder": "folder must be a path, got None",
    "tag": "tag must be the name of a folder, got '../x'",
    "tag empty": "tag must be the name of a folder, got ''",
    "tag partial": "use itself, got 'x.partial'",
    "tag latest": "use itself, got 'latest'",
    "keep": "keep must be 1 or more, got 0",
    "state": "client_state must be a dict that JSON can hold, got list",
    "state of tensors": "client_state must be what JSON can hold, got an error: Object of type Tensor",
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, str], bool]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    found: list[tuple[dict[str, str], bool]] = run_ranks(2, refusals, str(folder))
    assert sorted(os.listdir(folder)) == sorted(["whole", *(str(number) for number in range(len(SPOILT)))])
    return found


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", [*SPOILT, *ARGUMENTS])
def test_refused_on_every_rank(said: list[tuple[dict[str, str], bool]], name: str) -> None:
    first, second = (found[0][name] for found in said)
    assert first == second and first.isprintable()
    assert (SPOILT[name][1] if name in SPOILT else ARGUMENTS[name]) in first


@pytest.mark.timeout(180)
def test_the_engine_goes_on_after_refusals(said: list[tuple[dict[str, str], bool]]) -> None:
    assert [found[1] for found in said] == [True, True]
