"""Package names that load on first use.

torch takes a second to import and deepspeed another; ``tlgc-mp --help`` must wait for neither.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable


def attributes(package: str, homes: dict[str, str]) -> Callable[[str], object]:
    """A module-level ``__getattr__`` for ``package``: each name of ``homes`` comes from the module it names."""

    def getattribute(name: str) -> object:
        if name in homes:
            return getattr(importlib.import_module(homes[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return getattribute
