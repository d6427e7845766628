"""DeepSpeed's start-up lines, which every rank would repeat, kept off the terminal."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import TextIO, cast

_LIBRARIES = ("deepspeed", "torch")


@contextlib.contextmanager
def quiet_start() -> Iterator[None]:
    """Drops what DeepSpeed and torch print and log below an error. What the user's own code says meanwhile shows."""
    names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] in _LIBRARIES]
    loggers = [logging.getLogger(name) for name in ("DeepSpeed", *names)]
    for logger in loggers:
        logger.addFilter(_is_error)
    try:
        with contextlib.redirect_stdout(cast(TextIO, _OthersAlone(sys.stdout))):
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


class _OthersAlone:
    """A stream that takes nothing from the code of the libraries."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        writer = sys._getframe(1).f_globals.get("__name__", "")
        return len(text) if writer.partition(".")[0] in _LIBRARIES else self.stream.write(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)
