"""What a run shows on the terminal: lines, and a bar below them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def say(text: str, speaks: bool) -> None:
    """Prints a line above the progress bar, where this rank ``speaks``."""
    if speaks:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def progress_bar(
    items: Iterable[Item] | None, total: int, description: str, unit: str, speaks: bool = True, initial: int = 0
) -> tqdm[Item]:
    """A bar around ``items``, which goes when it is done; none where standard error is no terminal."""
    return tqdm(
        items,
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        leave=False,
        dynamic_ncols=True,
        disable=None if speaks else True,
    )
