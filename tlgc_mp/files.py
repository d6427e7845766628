"""Files that are there in full or not at all. Loads no torch."""

from __future__ import annotations

import contextlib
import os

from tlgc_mp.errors import UsageError, shown


def as_path(argument: str, value: object) -> str:
    """A path that a caller has given as ``argument``.

    Raises:
        UsageError: it is no path.
    """
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise UsageError(f"{argument}={shown(value)} is no path; give one as text")
    return text


def replace_file(path: str, text: str) -> None:
    """Writes ``text`` to ``path`` so that a reader finds the old content or the new, never a part, and puts it on the
    disk for good."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise OSError(error.errno, error.strerror, path) from error  # a write that fails does not say where
    sync_folder(os.path.dirname(path) or ".")


def sync_folder(folder: str) -> None:
    """Puts the names in a folder on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
