"""A checkpoint whose files are not as they were written is refused by name, or gives the weights that it held."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.checkpoint.written import MODEL, TAG, describe, reindex, split, write
from tlgc_mp.checkpoint import export_checkpoint, load_model, reshard_checkpoint
from tlgc_mp.checkpoint.folder import find_checkpoint
from tlgc_mp.cli.main import _parser
from tlgc_mp.errors import UsageError
from tlgc_mp.parallel.topology import Launch
from tlgc_mp.training.settings import resolve

ANY = settings(derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
STEM, BIAS = "weights/stem.weight", "weights/head.bias"


@functools.cache
def original() -> tuple[Path, dict[str, Tensor]]:
    run = Path(tempfile.mkdtemp(prefix="tlgc-mp-test-"))
    return run, write(run)


@pytest.fixture(scope="module", autouse=True)
def _clear() -> Iterator[None]:
    yield
    shutil.rmtree(original()[0])


@contextlib.contextmanager
def a_copy() -> Iterator[Path]:
    """A run's folder that holds the checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(shutil.copytree(original()[0], Path(folder) / "run"))


def exported(run: Path) -> bool:
    """Whether ``run`` gave the weights that it was written with; else it was refused in a line, and left as it was."""
    before, out = sorted(run.rglob("*")), run.parent / "out.safetensors"
    try:
        export_checkpoint(str(run), str(out))
    except UsageError as error:
        assert str(run) in str(error) and str(error).isprintable()
        assert sorted(run.rglob("*")) == before and list(run.parent.iterdir()) == [run]
        return False
    found, expected = load_file(out), original()[1]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    return True


def test_as_it_was_written(tmp_path: Path) -> None:
    with a_copy() as run:
        assert exported(run)
        model = load_model(str(run.parent / "out.safetensors"))
        assert all(torch.equal(value, original()[1][name]) for name, value in model.state_dict().items())
        reshard_checkpoint(str(run), str(tmp_path / "cut"), 4)
        assert exported(run) and find_checkpoint(str(tmp_path / "cut"))[1] == TAG


FILES = (f"{TAG}/checkpoint.json", f"{TAG}/shard-00-00.safetensors", f"{TAG}/shard-01-00.safetensors", "latest")


@settings(ANY, max_examples=100)
@given(
    name=st.sampled_from(FILES),
    how=st.sampled_from(["flip", "flip", "flip", "cut", "put", "gone", "folder", "swap", "longer"]),
    at=st.integers(0, 2**30),
    content=st.binary(min_size=1, max_size=12),
)
def test_any_damage_to_any_file(name: str, how: str, at: int, content: bytes) -> None:
    with a_copy() as run:
        path = run / "checkpoints" / name
        old = path.read_bytes()
        at %= len(old) if at % 2 else min(len(old), 300)  # headers too
        if how == "flip":
            path.write_bytes(old[:at] + bytes([old[at] ^ (content[0] or 1)]) + old[at + 1 :])
        elif how == "put":
            path.write_bytes(old[:at] + content + old[at + len(content) :])
        elif how == "cut":
            path.write_bytes(old[:at])
        elif how == "longer":
            path.write_bytes(old + content)
        elif how == "swap":
            path.write_bytes((run / "checkpoints" / FILES[at % len(FILES)]).read_bytes())
        else:
            path.unlink()
            if how == "folder":
                path.mkdir()
        whole = exported(run)
        changed = not path.is_file() or path.read_bytes() != old
        assert whole or changed
        if "shard" in name and changed:
            assert not whole
        if "json" in name and whole:
            assert json.loads(path.read_bytes()) == json.loads(old)  # white space may come and go


@pytest.mark.parametrize("key", ["saved", "engine", "sha256"])
def test_a_description_that_reads_well_and_is_not_as_written(key: str) -> None:
    with a_copy() as run:
        path = run / "checkpoints" / TAG / "checkpoint.json"
        content = json.loads(path.read_text())
        changes = {"saved": 1.0, "engine": {**content["engine"], "global_steps": 9}, "sha256": "0" * 64}
        assert content[key] != changes[key]
        path.write_text(json.dumps({**content, key: changes[key]}))
        with pytest.raises(UsageError, match=r"checkpoint\.json' is damaged: its checksum does not match"):
            export_checkpoint(str(run), str(run.parent / "out"))
        assert list(run.parent.iterdir()) == [run]


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.sampled_from([0, 1, -1])),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


@settings(ANY, max_examples=100)
@given(data=st.data())
def test_any_value_in_the_description(data: st.DataObject) -> None:
    def change(description: Any) -> Any:
        where = description
        while True:
            key = data.draw(st.sampled_from(list(where) if isinstance(where, dict) else range(len(where))))
            if not isinstance(where[key], dict | list) or not where[key] or data.draw(st.integers(0, 3)) == 0:
                break
            where = where[key]
        if data.draw(st.booleans()):
            where[key] = data.draw(VALUES)
        else:
            del where[key]

    with a_copy() as run:
        describe(run / "checkpoints" / TAG, change)
        exported(run)
        flags = ["--dataset", "synthetic", "--model", "wrn-10-1", "--groups", "4", "--resume", str(run)]
        options = _parser().parse_args(["train", *flags, "--output-dir", str(run.parent / "new")])
        with contextlib.suppress(UsageError):
            resolve(options, Launch())


def _drop(*path: str) -> Callable[[Any], None]:
    def change(description: Any) -> None:
        *way, last = path
        for key in way:
            description = description[key]
        del description[last]

    return change


def _put(*path: Any) -> Callable[[Any], None]:
    def change(description: Any) -> None:
        *way, last, value = path
        for key in way:
            description = description[key]
        description[last] = value

    return change


DESCRIPTIONS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a list": (lambda _: [], "does not describe a checkpoint"),
    "null": (lambda _: {"format": None}, "must be of format 1, got None"),
    "no format": (_drop("format"), "must be of format 1, got None"),
    "format true": (_put("format", True), "must be of format 1, got True"),
    "files a list": (_put("files", []), "names no files"),
    "no files": (_put("files", {}), "has no files of weights"),
    "a file without an entry": (
        _put("files", "scheduler.pt", None),
        "it gives no size and checksum for 'scheduler.pt'",
    ),
    "a file without its size": (_put("files", "scheduler.pt", {"sha256": ""}), "it gives no size and checksum"),
    "a size as text": (_put("files", "scheduler.pt", {"bytes": "1", "sha256": ""}), "it gives no size and checksum"),
    "a file elsewhere": (_put("files", "../../x", {"bytes": 1, "sha256": ""}), "it gives no size and checksum"),
    "client state null": (_put("client_state", None), "which has no client_state"),
    "no run": (_put("client_state", "run", None), "must be one that tlgc-mp train saved"),
    "a run without a model": (_drop("client_state", "run", "model"), "which has no model"),
    "no batch": (_put("client_state", "run", "batch_size", 0), "which has no batch_size"),
    "a batch that does not divide": (_put("client_state", "run", "accumulation", 3), "whose batch_size is not valid"),
    "coarse everywhere as text": (
        _put("client_state", "run", "coarse_everywhere", "yes"),
        "which has no coarse_everywhere",
    ),
    "no progress": (_put("client_state", "progress", None), "which has no progress"),
    "a step before the first": (_put("client_state", "progress", "step", -1), "which has no progress"),
    "a model that is none": (_put("client_state", "run", "model", "resnet50"), "got 'resnet50'; use e.g. wrn-28-10"),
    "another model": (_put("client_state", "run", "model", "wrn-16-1"), "is not of its model wrn-16-1: "),
    "other groups": (_put("client_state", "run", "groups", 2), "is not of its model wrn-10-1: "),
    "other classes": (_put("client_state", "num_classes", 11), "head.weight is (10, 64), not (11, 64)"),
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_a_description_that_does_not_fit(name: str) -> None:
    change, said = DESCRIPTIONS[name]
    with a_copy() as run:
        describe(run / "checkpoints" / TAG, change)
        with pytest.raises(UsageError) as caught:
            export_checkpoint(str(run), str(run.parent / "out"))
        assert said in str(caught.value) and str(run) in str(caught.value)
        with pytest.raises(UsageError):
            reshard_checkpoint(str(run), str(run.parent / "cut"), 2)
        assert list(run.parent.iterdir()) == [run]


def _entry(name: str, **changes: Any) -> Callable[[Any, Any], None]:
    return lambda tensors, index: index[name].update(changes)


UNSAID = "shard-00-00.safetensors' does not say where its tensors belong"
INDICES: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "no metadata": (lambda tensors, index: {}, UNSAID),
    "no index": (lambda tensors, index: {"format": "pt"}, UNSAID),
    "an index that is no JSON": (lambda tensors, index: {"index": "{"}, UNSAID),
    "a deep index": (lambda tensors, index: {"index": "[" * 100_000}, UNSAID),
    "an index that is a list": (lambda tensors, index: {"index": "[]"}, UNSAID),
    "a tensor that is not there": (lambda tensors, index: [tensors.pop(STEM)], UNSAID),
    "a tensor that is not told of": (lambda tensors, index: [index.pop(STEM)], UNSAID),
    "an entry of nothing": (lambda tensors, index: index[STEM].clear(), UNSAID),
    "a shape as text": (_entry(STEM, shape="8"), UNSAID),
    "a part beyond the last": (_entry(STEM, part=2), UNSAID),
    "parts of what is whole": (_entry(BIAS, parts=2), UNSAID),
    "no parts": (_entry(STEM, parts=0), UNSAID),
    "a dimension too many": (_entry(STEM, dim=4), UNSAID),
    "a start before the first": (_entry(STEM, start=-1), UNSAID),
    "a start in numbers with a point": (_entry(STEM, start=0.0), UNSAID),
    "a gap": (_entry(STEM, start=8), f"holds only a part of {STEM}"),
    "a shape too large": (_entry(BIAS, shape=[11]), f"holds only a part of {BIAS}"),
    "a shape too small": (_entry(BIAS, shape=[9]), f"holds only a part of {BIAS}"),
    "half of it": (lambda tensors, index: split(tensors, index, BIAS), f"holds only a part of {BIAS}"),
    "a part twice": (_entry(STEM, part=1), f"holds only a part of {STEM}"),
    "parts of another size": (_entry(STEM, shape=[4, 3, 3, 3]), f"holds {STEM} in parts that do not fit together"),
    "a replica too many": (
        _entry("buffers/bn.running_mean", replica=1),
        "holds only a part of buffers/bn.running_mean",
    ),
    "a tensor too few": (
        lambda tensors, index: [tensors.pop(BIAS), index.pop(BIAS)],
        "is not of its model wrn-10-1: only one of the two has head.bias",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INDICES)
def test_an_index_that_lies(name: str) -> None:
    change, said = INDICES[name]

    with a_copy() as run:
        reindex(run / "checkpoints" / TAG, change)
        with pytest.raises(UsageError) as caught:
            export_checkpoint(str(run), str(run.parent / "out"))
        assert said in str(caught.value) and str(run) in str(caught.value)
        with pytest.raises(UsageError):
            reshard_checkpoint(str(run), str(run.parent / "cut"), 2)
        assert list(run.parent.iterdir()) == [run]


def test_pieces_that_overlap_are_told() -> None:
    def whole(tensors: Any, index: Any) -> None:
        index[BIAS] = {"shape": [10], "dim": None, "part": 0, "parts": 1, "start": 0, "replica": 1}
        tensors[BIAS] = torch.zeros(10)

    with a_copy() as run:
        reindex(run / "checkpoints" / TAG, whole, rank=1)
        with pytest.raises(UsageError, match=f"holds a part of {BIAS} twice"):
            export_checkpoint(str(run), str(run.parent / "out"))


def _contiguous() -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in original()[1].items()}


WRITTEN = {"tlgc_mp": json.dumps(MODEL)}
MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "not there": (lambda path: None, "path must be a safetensors file, got "),
    "a folder": (lambda path: path.mkdir(), "path must be a safetensors file, got "),
    "empty": (lambda path: path.write_bytes(b""), "path must be a safetensors file, got "),
    "text": (lambda path: path.write_text("weights"), "path must be a safetensors file, got "),
    "a header that promises too much": (
        lambda path: path.write_bytes(b"\xff" * 8 + b"{}"),
        "path must be a safetensors file, got ",
    ),
    "no metadata": (lambda path: save_file({"x": torch.zeros(1)}, path), "does not say which model"),
    "a list": (lambda path: save_file({}, path, {"tlgc_mp": "[]"}), "does not say which model"),
    "null": (lambda path: save_file({}, path, {"tlgc_mp": "null"}), "does not say which model"),
    "deep": (lambda path: save_file({}, path, {"tlgc_mp": "[" * 100_000}), "does not say which model"),
    "arguments missing": (lambda path: save_file({}, path, {"tlgc_mp": '{"name": "wrn-10-1"}'}), "does not say which"),
    "no such model": (
        lambda path: save_file({}, path, {"tlgc_mp": json.dumps({**MODEL, "name": "x"})}),
        "': model must be wrn-",
    ),
    "a model of another kind": (
        lambda path: save_file({}, path, {"tlgc_mp": json.dumps({**MODEL, "groups": [4]})}),
        "got [4]; use one of",
    ),
    "no weights": (lambda path: save_file({}, path, WRITTEN), "only one of the two has bn.bias; export it again"),
    "other shapes": (
        lambda path: save_file({**_contiguous(), "head.bias": torch.zeros(9)}, path, WRITTEN),
        "head.bias is (9,), not (10,); export it again",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_file_that_holds_no_model(name: str, tmp_path: Path) -> None:
    make, said = MODELS[name]
    path = tmp_path / "model.safetensors"
    make(path)
    with pytest.raises(UsageError) as caught:
        load_model(str(path))
    assert said in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("path", [None, 5, b"x", "", "a\0b", ["x"], Path("/none") / "x"])
def test_what_is_no_path_is_refused(path: Any, tmp_path: Path) -> None:
    for call in (
        lambda: load_model(path),
        lambda: export_checkpoint(path, str(tmp_path / "out")),
        lambda: reshard_checkpoint(path, str(tmp_path / "out"), 2),
    ):
        with pytest.raises(UsageError):
            call()
    if not isinstance(path, os.PathLike):
        with pytest.raises(UsageError, match="output must be a path, got "):
            export_checkpoint(str(original()[0]), path)
    assert not list(tmp_path.iterdir())


def test_a_pipe_is_not_waited_on(tmp_path: Path) -> None:
    with a_copy() as run:
        (run / "checkpoints/latest").unlink()
        os.mkfifo(run / "checkpoints/latest")
        assert exported(run)
