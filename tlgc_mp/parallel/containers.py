"""What a model takes and gives, in whatever containers: those that torch knows, and those that people write."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch.utils._pytree import tree_map

Key = TypeVar("Key")
T = TypeVar("T")


def map_leaves(function: Callable[[object], object], tree: T) -> T:
    """``tree`` with ``function`` of each leaf. Containers keep their class; those that do not change are not copied.

    Beside what torch's own trees hold (tuples, lists, dicts, named tuples), dataclasses and subclasses of ``dict``,
    ``list`` and ``tuple`` are containers.
    """
    return cast(T, tree_map(lambda leaf: _mapped(function, leaf), tree))


def _mapped(function: Callable[[object], object], leaf: object) -> object:
    made: Any
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        names = [field.name for field in dataclasses.fields(leaf) if hasattr(leaf, field.name)]
        parts = {name: getattr(leaf, name) for name in names}
        changed = _changed(function, parts)
        if not changed:
            return leaf
        made = copy.copy(leaf)
        if isinstance(made, dict):  # as some libraries write their outputs: a dict and its attributes
            for key, value in made.items():
                dict.__setitem__(made, key, changed.get(key, value))
        for name, value in changed.items():
            object.__setattr__(made, name, value)
        return made
    if isinstance(leaf, dict):
        changed = _changed(function, leaf)
        made = copy.copy(leaf) if changed else leaf
        for key, value in changed.items():
            dict.__setitem__(made, key, value)
        return made
    if isinstance(leaf, list | tuple):
        items = _changed(function, dict(enumerate(leaf)))
        if not items:
            return leaf
        parts_in_order = [items.get(index, value) for index, value in enumerate(leaf)]
        if isinstance(leaf, tuple):
            return tuple.__new__(type(leaf), parts_in_order)
        made = copy.copy(leaf)
        made[:] = parts_in_order
        return made
    return function(leaf)


def _changed(function: Callable[[object], object], parts: dict[Key, object]) -> dict[Key, object]:
    """Of the parts, those that ``function`` gives another object for."""
    mapped = {key: map_leaves(function, value) for key, value in parts.items()}
    return {key: value for key, value in mapped.items() if _differs(value, parts[key])}


def _differs(made: Any, part: Any) -> bool:
    """Whether any leaf of ``made`` is another object: torch's own trees are made anew in any case."""
    if made is part:
        return False
    if type(made) in (list, tuple) and type(made) is type(part):
        return any(_differs(a, b) for a, b in zip(made, part, strict=True))
    if type(made) is dict and type(part) is dict:
        return any(_differs(made[key], part[key]) for key in made)
    return True
