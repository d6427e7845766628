"""Marks the tests that an engineer runs before each commit; ``scripts/test.sh --fast`` runs those.

A test is ``fast`` unless it starts processes or an engine, or compiles or exports a network, in its own code or in what
it calls of the tests; and of a test with many cases, the first are. That is read from the code: nobody keeps a list.
"""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

_TAKES_LONG = {
    "start processes": ("subprocess", "multiprocessing", "tests.ranks", "tests.forked"),
    "measure": ("--quick", "tlgc_mp.bench.ranks.launch.measure"),
    "start an engine": ("deepspeed", "tlgc_mp.engine.initialization"),
    "judge by the clock": ("time.perf_counter", "time.process_time"),
    "compile or export": ("torch.compile", "torch.export", "torch.jit", "torch.onnx", "onnxruntime"),
}
"""What a test does: the modules, functions and options of commands by which it does so."""

_left_out: Counter[str] = Counter()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    fast: set[types.FunctionType] = set()
    for item in items:
        reason = why_not_fast(item) or ("are further cases of a fast one" if item.function in fast else None)
        if reason is None:
            fast.add(item.function)
            item.add_marker("fast")
        else:
            _left_out[reason] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.option.markexpr == "fast":
        reasons = ", ".join(f"{count} that {reason}" for reason, count in _left_out.most_common())
        terminalreporter.write_line(f"left out: {reasons}")


def why_not_fast(item: pytest.Function) -> str | None:
    """What keeps a test from being fast, as what several such tests do."""
    if item.get_closest_marker("slow"):
        return "are slow"
    fixtures = [fixture.func for each in item._fixtureinfo.name2fixturedefs.values() for fixture in each]
    cases = item.callspec.params.values() if hasattr(item, "callspec") else ()
    found = [_takes_long(each) for each in (item.function, *fixtures, *cases) if isinstance(each, types.FunctionType)]
    return next((reason for reason in found if reason), None)


@functools.cache
def _takes_long(function: types.FunctionType) -> str | None:
    seen: set[int] = set()
    waiting: list[Any] = [function]
    while waiting:
        each = waiting.pop()
        each = getattr(each, "__func__", getattr(each, "__wrapped__", each))  # a method, or what is decorated
        if id(each) in seen:
            continue
        seen.add(id(each))
        name = _name(each)
        for reason, long in _TAKES_LONG.items():
            if any(name == one or name.startswith(f"{one}.") for one in long):
                return reason
        if isinstance(each, dict):
            waiting += each.values()
        elif isinstance(each, list | tuple):
            waiting += each
        elif name.startswith("tests.") or name.startswith("test_"):
            if isinstance(each, type):
                waiting += vars(each).values()
            elif isinstance(each, types.FunctionType):
                waiting += _mentioned(each.__code__, each.__globals__)
    return None


def _name(thing: Any) -> str:
    if isinstance(thing, str):
        return thing if thing.startswith("--") else ""
    if isinstance(thing, types.ModuleType):
        return thing.__name__
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', '')}"


def _mentioned(code: types.CodeType, variables: dict[str, Any]) -> Iterator[Any]:
    """The global names in a function, with their attributes; what it imports, its constants and inner functions."""
    thing: Any = None
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            thing = variables.get(step.argval)
        elif step.opname == "IMPORT_NAME":
            thing = sys.modules.get(step.argval)
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM"):
            module = thing if isinstance(thing, types.ModuleType) else None
            thing = getattr(module, step.argval, None)
        else:
            thing = None
        yield thing
    for constant in code.co_consts:
        yield from _mentioned(constant, variables) if isinstance(constant, types.CodeType) else (constant,)
