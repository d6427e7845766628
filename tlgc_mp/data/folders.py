"""Folders of images as they come: which files are the images of which class, and what is said of the others.

Nothing is opened here, and neither torch nor Pillow is loaded.
"""

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tlgc_mp.errors import must_be

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".png", ".apng", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp"),
    *(
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".pfm",
        ".tga",
        ".avif",
        ".avifs",
        ".jp2",
        ".j2k",
        ".j2c",
        ".jpc",
        ".jpf",
        ".jpx",
    ),
)
"""Files that are read, in small letters or capitals."""

_OTHER_IMAGES = (
    *(
        ".heic",
        ".heif",
        ".hif",
        ".jxl",
        ".svg",
        ".svgz",
        ".psd",
        ".xcf",
        ".exr",
        ".hdr",
        ".dcm",
        ".raw",
        ".dng",
        ".cr2",
    ),
    *(".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".bpg", ".jps", ".ico", ".pcx", ".eps", ".npy", ".npz"),
)
"""Files that somebody meant for images, and that are not read."""

_NOT_DATA = ("__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
"""Folders that a system or a tool leaves behind, beside those whose names begin with a dot."""


@dataclass(frozen=True)
class Images:
    """The images of one split.

    Attributes:
        classes: the names of its class folders, sorted.
        samples: (path, number of the class) of each image, by class, folder and name.
        passed_over: suffix, or what is odd about a file -> how many are left out for it.
        digest: of names, classes and sizes of the images, by which one folder of them is told from another.
    """

    classes: list[str]
    samples: list[tuple[str, int]]
    passed_over: Counter[str]
    digest: str


def class_folders(split: Path) -> list[str]:
    """The names of the class folders of one split, sorted; hidden ones, and links back to the split, are none."""
    above = _with_parents(split)
    with os.scandir(split) as entries:
        return sorted(e.name for e in entries if _is_folder(e) and _is_data(e.name) and _identity(e.path) not in above)


def may_hold_images(folder: Path) -> bool:
    """Whether :func:`find_images` finds images in a class folder, or has something to say about what is there."""
    return any(_is_image(name) and _is_seen(name) for _, names in _files(folder) for name in names)


def find_images(split: Path, classes: Sequence[str]) -> Images:
    """The images in the class folders of one split, each looked at from outside.

    Hidden files and folders are not data, nor is a folder that was seen already: a link can lead back to it.

    Raises:
        UsageError: a file is empty, is none that can be read, or is an image in another format than those that are.
    """
    samples: list[tuple[str, int]] = []
    with os.scandir(split) as entries:
        passed_over = Counter({"outside the class folders": sum(_is_image(e.name) and e.is_file() for e in entries)})
    wrong: dict[str, list[str]] = {}
    told = hashlib.sha256()
    for number, name in enumerate(classes):
        for folder, files in sorted(_files(split / name)):
            for file in sorted(files):
                path, suffix = os.path.join(folder, file), os.path.splitext(file)[1].lower()
                if not _is_seen(file):
                    passed_over["hidden"] += _is_image(file)
                elif file.startswith("._"):
                    if _is_image(file):
                        wrong.setdefault(_APPLE_DOUBLE, []).append(path)
                elif suffix in _OTHER_IMAGES:
                    wrong.setdefault(_OTHER_FORMAT, []).append(path)
                elif suffix not in IMAGE_SUFFIXES:
                    passed_over[suffix or "without a suffix"] += 1
                else:
                    size, problem = _look(path)
                    if problem is not None:
                        wrong.setdefault(problem, []).append(path)
                        continue
                    samples.append((path, number))
                    told.update(f"{path[len(str(split)) :]}\0{number}\0{size}\n".encode(errors="surrogateescape"))
    for problem, paths in wrong.items():
        what, hint = _PROBLEMS[problem]
        files_are = "1 file is" if len(paths) == 1 else f"{len(paths)} files are"
        note = f", where {files_are} {what}, {paths[0]} first"
        raise must_be("--data-dir", "a folder of images that can be read", str(split.parent), hint, note=note)
    return Images(list(classes), samples, +passed_over, told.hexdigest())


_APPLE_DOUBLE, _OTHER_FORMAT, _EMPTY, _NO_FILE, _BROKEN = "AppleDouble", "format", "empty", "no file", "broken"
_PROBLEMS = {
    _APPLE_DOUBLE: ("no image but what macOS notes about one (AppleDouble)", "remove every file named ._*"),
    _OTHER_FORMAT: ("in a format that is not read", "convert to PNG or JPEG, or remove"),
    _EMPTY: ("empty", "replace or remove"),
    _NO_FILE: ("no plain file", "remove"),
    _BROKEN: ("a link to nothing, or cannot be looked at", "mend the link or remove it"),
}


def _look(path: str) -> tuple[int, str | None]:
    """(the size of a file, what is wrong with it)"""
    try:
        found = os.stat(path)
    except OSError:
        return 0, _BROKEN
    if not stat.S_ISREG(found.st_mode):
        return 0, _NO_FILE
    return found.st_size, None if found.st_size else _EMPTY


def _files(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of files) of a class folder and all below it, through links, each folder once."""
    seen = _with_parents(folder)
    waiting = [str(folder)]
    while waiting:
        path = waiting.pop()
        names = []
        with os.scandir(path) as entries:
            for entry in entries:
                if not _is_folder(entry):
                    names.append(entry.name)
                elif _is_data(entry.name) and (identity := _identity(entry.path)) not in seen:
                    seen.add(identity)
                    waiting.append(entry.path)
        yield path, names


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_image(file: str) -> bool:
    return file.lower().endswith(IMAGE_SUFFIXES + _OTHER_IMAGES)


def _is_seen(file: str) -> bool:
    """Whether a file is not hidden; AppleDouble files are copied along with images, and seen."""
    return not file.startswith(".") or file.startswith("._")


def _is_data(folder: str) -> bool:
    return not folder.startswith(".") and folder not in _NOT_DATA


def _with_parents(folder: Path) -> set[tuple[int, int]]:
    real = folder.resolve()
    return {_identity(path) for path in (real, *real.parents)}


def _identity(path: str | Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino
