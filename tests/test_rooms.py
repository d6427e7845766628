"""Rooms import one way, and DeepSpeed's insides are known in one of them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import tlgc_mp

PACKAGE = Path(tlgc_mp.__file__).parent
ROOMS = (
    *(
        "__version__",
        "lazy",
        "json_types",
        "errors",
        "host",
        "figures",
        "nn",
        "models",
        "data",
        "parallel",
        "engine",
        "checkpoint",
    ),
    *("training", "resilience", "paper", "bench", "planner", "cli"),
)
"""Each imports from those before it only."""
PUBLIC = ("deepspeed", "deepspeed.accelerator", "deepspeed.comm")
"""What any room may know of DeepSpeed."""


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, and the names it imports from packages, dotted."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (f"{node.module}.{name.name}" for name in node.names)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


FILES = sorted(path for path in PACKAGE.rglob("*.py") if room_of(path) not in ("__init__", "__main__"))


def test_every_file_lies_in_a_room() -> None:
    assert {room_of(path) for path in FILES} <= set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room: str) -> None:
    below = set(ROOMS[: ROOMS.index(room) + 1])
    for path in (path for path in FILES if room_of(path) == room):
        for name in imports(path):
            if name.startswith("tlgc_mp."):
                assert name.split(".")[1] in below, f"{path.relative_to(PACKAGE)} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_deepspeeds_insides_are_the_engines(path: Path) -> None:
    used = [name for name in imports(path) if name.partition(".")[0] == "deepspeed"]
    if room_of(path) == "parallel":
        assert not used, "parallel/ works where DeepSpeed is not installed"
    elif room_of(path) != "engine":
        assert all(name in PUBLIC or name.rpartition(".")[0] in PUBLIC for name in used), used
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
