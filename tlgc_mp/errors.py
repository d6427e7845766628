"""The one kind of error that is the user's to mend.

Every check of an argument, a file or a configuration raises :class:`UsageError`. The command line
turns it into one line on standard error and exit status 2; library users catch it as a ``ValueError``.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterable
from typing import TypeGuard

_LARGEST_SHOWN = 200
_LARGEST_DIVISOR_TRIED = 1 << 20


class UsageError(ValueError):
    """An argument, a file or a configuration that cannot work.

    The message is one line: it names the argument, its value, and what would work instead. What does not print in a
    value, such as the end of a line, is escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """``text`` in one line: what does not print, such as the end of a line in the name of a file, is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def must_be(argument: str, need: str, got: object, hint: str = "", *, note: str = "") -> UsageError:
    """The error of an argument that cannot work: ``X must be Y, got Z; HINT``. A class stands for a value of it.

    ``note`` follows the value at once: ``, which is a file``, or ``: No such file or directory``.
    """
    value = got.__name__ if isinstance(got, type) else repr(got)
    value = value if len(value) <= _LARGEST_SHOWN else f"{value[:_LARGEST_SHOWN]}..."
    return UsageError(f"{argument} must be {need}, got {value}{note}" + (f"; {hint}" if hint else ""))


def divisors(number: int) -> list[int]:
    """All positive divisors of ``number``, ascending; of a number above 2^40, some of them."""
    small = [k for k in range(1, min(math.isqrt(number), _LARGEST_DIVISOR_TRIED) + 1) if number % k == 0]
    return small + [number // k for k in reversed(small) if k * k != number]


def check_installed(package: str, extra: str, wanted_by: str) -> None:
    """Raises :class:`UsageError` where ``package`` is not installed, which comes with an extra of pyproject.toml."""
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"{wanted_by} needs {package}, which is not installed; pip install 'tlgc-mp[{extra}]'")


def one_of(values: Iterable[object]) -> str:
    """``values`` as the end of a message: ``one of 1, 2, 4``."""
    return "one of " + ", ".join(str(value) for value in values)


def shown(value: object) -> str:
    """A value from a configuration as a message shows it: as JSON where it can be, and not longer than a few lines."""
    try:
        text = json.dumps(value, default=repr)
    except (TypeError, ValueError, RecursionError):  # keys that are no text, a list that holds itself, a deep one
        text = f"a {type(value).__name__}"
    return text if len(text) <= _LARGEST_SHOWN else f"{text[:_LARGEST_SHOWN]}..."


def is_count(value: object, least: int = 1) -> TypeGuard[int]:
    """Whether a value from a configuration or a caller is an int, and ``least`` or more; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object, whole: bool = False) -> TypeGuard[float]:
    """Whether a value from a configuration or a caller is a number, an int where it must be ``whole``; no bool."""
    return isinstance(value, int if whole else int | float) and not isinstance(value, bool)


def told(error: BaseException) -> str:
    """An error that is not the user's to mend, as part of a message: one line, and not a long one."""
    said = f"it has no {error}" if isinstance(error, KeyError) else getattr(error, "strerror", None) or error
    reason = " ".join(str(said).split())[:300]
    return reason or type(error).__name__


LARGEST_REPRESENTATIVES = 10_000


def check_representatives(coarse_channels: object, coarse_sum: object) -> None:
    """Raises :class:`UsageError` unless the groups of a coarse level can have so many representatives each."""
    if not is_count(coarse_channels) or coarse_channels > LARGEST_REPRESENTATIVES:  # type: ignore[operator]
        raise UsageError(
            f"coarse_channels must be 1 to {LARGEST_REPRESENTATIVES} representatives of a group, got "
            f"{coarse_channels!r}; use 1, or conv='gc' for no coarse level"
        )
    if not isinstance(coarse_sum, bool):
        raise UsageError(f"coarse_sum must be True or False, got {coarse_sum!r}; use one of them")
