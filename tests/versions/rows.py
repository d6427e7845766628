"""The table of private names: each with what the package relies upon, and the check of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

Check = Callable[[], None]


class Row(NamedTuple):
    """A check, whose docstring says what is relied upon, of one name or of several that belong together."""

    names: tuple[str, ...]
    check: Check


ROWS: list[Row] = []


def relies_on(*names: str) -> Callable[[Check], Check]:
    """Adds a row to the table. Names are as :func:`tests.versions.private_names.private_names` gives them."""

    def add(check: Check) -> Check:
        ROWS.append(Row(names, check))
        return check

    return add
