"""Whatever is given, a command and a configuration are taken or refused in one line: no traceback, nothing written."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tlgc_mp.bench.inference
import tlgc_mp.bench.saving.sweep
import tlgc_mp.bench.scaling.bandwidth
import tlgc_mp.bench.scaling.sweep
import tlgc_mp.bench.zero.sweep
import tlgc_mp.checkpoint.offline
import tlgc_mp.models
import tlgc_mp.paper.report
import tlgc_mp.training.inference
import tlgc_mp.training.settings
from tests.bench.test_training_report import row
from tlgc_mp.bench.settings import STRATEGIES
from tlgc_mp.cli.main import _parser, main
from tlgc_mp.data import DATASETS
from tlgc_mp.engine.config import read_config
from tlgc_mp.errors import UsageError
from tlgc_mp.models.names import COARSE_INITS, CONVOLUTIONS
from tlgc_mp.parallel.topology import Launch
from tlgc_mp.resilience import restarts
from tlgc_mp.training.settings import TrainSettings, resolve

ANY = settings(derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))

# Values.

NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.integers(),
    st.sampled_from([2**31, 2**63, 2**64, 10**18, 10**400, -(10**400)]),
    st.floats(),
)
WORDS = st.one_of(
    st.sampled_from(
        ["", "auto", "none", "two", "0.1", "1e3", "fp16", "SGD", "Adam", "cpu", "nvme", "bfloat16", "None"]
    ),
    st.text(max_size=6),
)
READ = {
    "train_batch_size": NUMBERS,
    "train_micro_batch_size_per_gpu": NUMBERS,
    "gradient_accumulation_steps": NUMBERS,
    "zero_optimization": st.fixed_dictionaries(
        {}, optional={"stage": st.integers(-1, 5) | NUMBERS | WORDS, "offload_optimizer": st.just({"device": "cpu"})}
    ),
    "tensor_parallel": st.fixed_dictionaries({}, optional={"autotp_size": st.integers(-1, 9) | NUMBERS | WORDS}),
    "optimizer": st.fixed_dictionaries(
        {},
        optional={
            "type": WORDS,
            "params": st.fixed_dictionaries({}, optional={"lr": NUMBERS | WORDS, "betas": st.lists(NUMBERS)}),
        },
    ),
    "scheduler": st.fixed_dictionaries({}, optional={"type": WORDS, "params": st.just({})}),
    "gradient_clipping": NUMBERS,
    "torch_autocast": st.fixed_dictionaries({}, optional={"enabled": st.booleans(), "dtype": WORDS}),
    "bf16": st.fixed_dictionaries({}, optional={"enabled": st.booleans() | WORDS}),
    "fp16": st.fixed_dictionaries({}, optional={"enabled": st.booleans() | WORDS}),
}
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(list(READ)) | WORDS, inner, max_size=3),
    max_leaves=8,
)
CONFIGURATIONS = st.fixed_dictionaries({}, optional={key: value | JSON for key, value in READ.items()})


def _text(value: Any) -> bytes:
    return json.dumps(value).encode()


FILES = st.one_of(
    st.builds(_text, CONFIGURATIONS),
    st.builds(_text, JSON),
    st.builds(lambda value, at: _text(value)[: at % 100], CONFIGURATIONS, st.integers(0, 99)),
    st.builds(
        lambda value, code: json.dumps(value).encode(code), CONFIGURATIONS, st.sampled_from(["utf-16", "utf-8-sig"])
    ),
    st.binary(max_size=40),
    st.text(max_size=40).map(lambda text: text.encode(errors="surrogatepass")),
    st.sampled_from(
        [
            b"",
            b'{"a": 1e999}',
            b"\0" * 9,
            b"{" * 5000,
            b"[" * 100_000,
            b'{"a":' * 100_000,
            b"9" * 5000,
            b'{"a": ' + b"9" * 5000 + b"}",
        ]
    ),
)


def check_train(flags: list[str], world: int) -> TrainSettings | UsageError:
    options = _parser().parse_args(["train", "--dataset", "synthetic", "--model", "wrn-10-1", *flags])
    options.groups = 4 if options.groups is None else options.groups
    try:
        return resolve(options, Launch(world, 0, 0, world))
    except UsageError as error:
        assert str(error).isprintable()
        return error


@settings(ANY, max_examples=250)
@given(content=FILES, world=st.sampled_from([1, 2, 3, 8]))
def test_any_configuration_file(content: bytes, world: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_bytes(content)
        found = check_train(["--deepspeed_config", str(path), "--output-dir", f"{folder}/run"], world)
        assert [entry.name for entry in Path(folder).iterdir()] == ["config.json"]
    if isinstance(found, TrainSettings):
        config = found.deepspeed_config
        assert config["train_batch_size"] == found.micro_batch * found.accumulation * found.topology.data_parallel > 0
        assert 0 < found.learning_rate < math.inf
        assert config.get("tensor_parallel", {}).get("autotp_size", 1) == found.topology.tensor_parallel


@settings(ANY, max_examples=100)
@given(value=JSON | st.builds(object) | st.binary(max_size=5) | st.sets(st.integers(), max_size=3))
def test_any_configuration_in_python(value: Any) -> None:
    with contextlib.suppress(UsageError):
        assert isinstance(read_config(value), dict)


# Rows of runs.


@settings(ANY, max_examples=100)
@given(data=st.data())
def test_any_value_in_a_row_of_a_report(data: st.DataObject) -> None:
    rows = [copy.deepcopy(row("gc-2l", 2, seed, 4.0)) for seed in range(data.draw(st.integers(1, 2)))]
    where: Any = rows[0]
    while True:
        key = data.draw(st.sampled_from(list(where) if isinstance(where, dict) else range(len(where))))
        if not isinstance(where[key], dict | list) or data.draw(st.booleans()):
            break
        where = where[key]
    if data.draw(st.integers(0, 4)) == 0:
        del where[key]
    else:
        where[key] = data.draw(JSON)
    with folder_of_its_own() as folder:
        (folder / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
        before = sorted(folder.rglob("*"))
        status, out, err = run(["report", "rows.jsonl", "--output", "out"])
        assert status in (0, 2)
        if status == 2:
            assert out == "" and err.startswith("tlgc-mp: error: ") and err.count("\n") == 1
            assert sorted(folder.rglob("*")) == before


# Flags. A process cannot be given a NUL, and paths stay within the folder of the test.

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), max_size=8)
NUMERALS = st.one_of(
    st.integers(-3, 40).map(str),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["nan", "inf", "-inf", "1e999", "1_0", "٣", "0x10", "9" * 30, "9" * 5000, "-0", "1.5", "00"]),
)
PATHS = st.one_of(
    TEXT, st.sampled_from(["file", "file/run", "folder", "missing/deeper", "n" * 300, ".", "rows.jsonl", "odd.jsonl"])
)
NAMES = st.one_of(
    st.sampled_from(
        ["wrn-10-1", "wrn-28-10", "imagenet-wrn-34-2", "mobilenet_v2", *CONVOLUTIONS, *DATASETS, *COARSE_INITS]
    ),
    st.sampled_from(
        [*STRATEGIES, "gc-2l@4", "naive-mp@2", "zero3@0", "pipeline@x", "gc@" + "9" * 5000, "fp32", "bf16"]
    ),
    st.builds("wrn-{}-{}".format, NUMERALS, NUMERALS),
)
VALUES = st.one_of(NUMERALS, TEXT, PATHS, NAMES)
COMMANDS = (
    ["train"], ["params"], ["report"], ["export"], ["reshard"], ["launch"], ["evaluate"], ["predict"],
    ["bench", "scaling"], ["bench", "bandwidth"], ["bench", "zero"], ["bench", "saving"], ["bench", "inference"],
)  # fmt: skip


def _flags(command: list[str]) -> dict[str, Any]:
    """Flag -> how many values it takes, as the parser has it."""
    parser = _parser()
    for word in command:
        (commands,) = (action for action in parser._actions if action.choices and not action.option_strings)
        parser = commands.choices[word]  # type: ignore[index, call-overload]
    return {option: action for action in parser._actions for option in action.option_strings if option != "-h"}


def _fitting(action: Any) -> st.SearchStrategy[str]:
    """Values such as this flag means, most often."""
    if action.type in (int, float):
        return st.integers(1, 8).map(str) | NUMERALS | VALUES
    return {
        "model": NAMES, "conv": st.sampled_from(CONVOLUTIONS), "dataset": st.sampled_from(DATASETS), "dtype": NAMES,
        "strategies": NAMES, "coarse_init": st.sampled_from(COARSE_INITS),
    }.get(action.dest, PATHS) | VALUES  # fmt: skip


@st.composite
def command_lines(draw: st.DrawFn, command: list[str]) -> list[str]:
    words = list(command)
    known = _flags(command)
    for name in draw(st.lists(st.sampled_from(list(known)) | TEXT.map("--{}".format), max_size=5)):
        words.append(name)
        action = known.get(name)
        fits = VALUES if action is None else _fitting(action)
        count = 0 if action is not None and action.nargs == 0 else draw(st.sampled_from([1, 1, 1, 1, 0, 2]))
        words += draw(st.lists(fits, min_size=count, max_size=count))
    if command[0] in ("report", "export", "reshard", "evaluate", "predict"):
        words[1:1] = draw(st.lists(PATHS, max_size=3))
    elif command == ["launch"]:
        words += ["--"] if draw(st.booleans()) else []
        words += draw(st.sampled_from([["mpirun", "tlgc-mp", "train"], ["train"], ["a", "train"], ["\n", "b"], []]))
        words += draw(st.lists(VALUES | st.sampled_from(list(_flags(["train"]))), max_size=3))
    else:
        words += draw(st.lists(VALUES, max_size=1)) if draw(st.integers(0, 9)) == 0 else []
    return words


@contextlib.contextmanager
def only_checks() -> Iterator[None]:
    """What would start work ends there, well."""

    class Accepted(Exception):
        pass

    def accept(*arguments: Any, **options: Any) -> Any:
        raise Accepted

    def checked(options: Any, launch: Launch) -> None:
        resolve(options, launch)
        raise Accepted

    with contextlib.ExitStack() as stack:
        for owner, name, replacement in (
            (tlgc_mp.training.settings, "resolve", checked),
            (tlgc_mp.models, "create_model", accept),
            (tlgc_mp.checkpoint.offline, "export_checkpoint", accept),
            (tlgc_mp.checkpoint.offline, "reshard_checkpoint", accept),
            (tlgc_mp.training.inference, "score", accept),
            (tlgc_mp.training.inference, "label", accept),
            (tlgc_mp.paper.report, "plot_epochs", lambda *_: False),
            (tlgc_mp.paper.report, "plot_errors", lambda *_: None),
            (tlgc_mp.bench.scaling.bandwidth, "run", accept),
            (tlgc_mp.bench.scaling.sweep, "run", accept),
            (tlgc_mp.bench.zero.sweep, "run", accept),
            (tlgc_mp.bench.saving.sweep, "run", accept),
            (tlgc_mp.bench.inference, "run", accept),
            (restarts._Attempt, "run", accept),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement, create=name == "create_model"))
        stack.enter_context(contextlib.suppress(Accepted))
        yield


@contextlib.contextmanager
def folder_of_its_own() -> Iterator[Path]:
    before = os.getcwd()
    folder = Path(tempfile.mkdtemp())
    os.chdir(folder)
    try:
        (folder / "file").write_text("not a folder")
        (folder / "folder").mkdir()
        (folder / "odd.jsonl").write_text('{"model": "wrn-10-1"}\n7\n')
        yield folder
    finally:
        os.chdir(before)
        shutil.rmtree(folder)


def run(words: list[str]) -> tuple[int, str, str]:
    """(status, standard output, standard error) of the command with all work left out; 0 where it would begin."""
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), only_checks():
        try:
            status = main(words)
        except SystemExit as left:  # --help, --version
            status = int(left.code or 0)
    return status, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_any_flags(command: list[str]) -> None:
    statuses = []

    @settings(ANY, max_examples=60)
    @given(words=command_lines(command))
    def check(words: list[str]) -> None:
        with folder_of_its_own() as folder:
            before = sorted(folder.rglob("*"))
            status, out, err = run(words)
            statuses.append(status)
            assert status in (0, 2)
            if status == 2:
                assert out == "" and err.startswith("tlgc-mp: error: ") and err.endswith("\n")
                assert err[:-1].isprintable(), err
                assert sorted(folder.rglob("*")) == before

    check()
    assert set(statuses) == {0, 2}, "the flags drawn are all taken, or all refused: the test shows little"


OPTIONS = st.dictionaries(
    st.sampled_from([action.dest for action in _flags(["train"]).values()]) | TEXT,
    st.one_of(st.none(), st.booleans(), NUMBERS, WORDS, st.lists(NUMBERS, max_size=2), st.dictionaries(WORDS, NUMBERS)),
    max_size=4,
)


@ANY
@given(OPTIONS | st.lists(WORDS, max_size=2) | TEXT)
def test_any_file_of_options(content: Any) -> None:
    with folder_of_its_own() as folder:
        text = content if isinstance(content, str) else yaml.safe_dump(content)
        (folder / "run.yaml").write_text(text, encoding="utf-8")
        status, out, err = run(["train", "--dataset", "synthetic", "--config", "run.yaml"])
        assert status in (0, 2)
        if status == 2:
            assert out == "" and err.startswith("tlgc-mp: error: ") and err.count("\n") == 1
        assert not (folder / "runs").exists()
