"""The one kind of error that is the user's to mend.

Every check of an argument, a file or a configuration raises :class:`UsageError`. The command line
turns it into one line on standard error and exit status 2; library users catch it as a ``ValueError``.
"""


class UsageError(ValueError):
    """An argument, a file or a configuration that cannot work.

    The message is one line: it names the argument, its value, and what would work instead.
    """


def divisors(number: int) -> list[int]:
    """All positive divisors of ``number``, ascending."""
    small = [k for k in range(1, int(number**0.5) + 1) if number % k == 0]
    return small + [number // k for k in reversed(small) if k * k != number]


def one_of(values: object) -> str:
    """``values`` as the end of a message: ``one of 1, 2, 4``."""
    return "one of " + ", ".join(str(value) for value in values)  # type: ignore[attr-defined]
