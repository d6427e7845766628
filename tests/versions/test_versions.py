"""The releases that pyproject.toml allows have been run, and ``scripts/versions.sh``, which runs them.

A stand-in for Python makes no environment, installs nothing and prints what pytest would.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "torchvision", "deepspeed")

STAND_IN = """#!/bin/bash
echo "$@" >>"$NOTES"
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip") [[ "$*" != *torch==0* ]] ;;
    "-m pytest") case "$(cat "$NOTES")" in
            *torch==2.6*) echo "1 failed, 2 passed in 3.0s (0:00:03)" && exit 1 ;;
            *) echo "3 passed in 4.00s" ;;
        esac ;;
    -c*) echo "1.0 | 2.0 | 3.0 | 3.11.0" ;;
esac
"""


def run(folder: Path, *releases: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The script with the stand-in, and what the stand-in was called with."""
    for name in ("versions.sh", "environment.sh"):
        (folder / "scripts").mkdir(exist_ok=True)
        shutil.copy(ROOT / "scripts" / name, folder / "scripts" / name)
    shutil.copy(ROOT / "pyproject.toml", folder)
    stand_in, notes = folder / "python", folder / "notes"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    notes.write_text("")
    (folder / "tmp").mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHON": str(stand_in), "NOTES": str(notes), "TMPDIR": str(folder / "tmp")}
    done = subprocess.run(
        [str(folder / "scripts/versions.sh"), *releases],
        env={**environment, "TESTS": "tests/one tests/two"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done, notes.read_text().splitlines()


def rows(path: Path) -> list[list[str]]:
    lines = [line for line in path.read_text().splitlines() if re.match(r"\| \d", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def lowest() -> list[str]:
    """The lowest releases that pyproject.toml allows."""
    text = (ROOT / "pyproject.toml").read_text()
    return [re.search(rf'"{name}>=([\d.]+),<', text).group(1) for name in PACKAGES]  # type: ignore[union-attr]


def beyond() -> list[tuple[int, ...]]:
    """The lowest releases that pyproject.toml does not allow any more."""
    text = (ROOT / "pyproject.toml").read_text()
    found = [re.search(rf'"{name}>=[\d.]+,<([\d.]+)"', text).group(1) for name in PACKAGES]  # type: ignore[union-attr]
    return [tuple(int(part) for part in version.split(".")) for version in found]


def test_bounds_are_releases_that_passed() -> None:
    """Else somebody gets, with a plain ``pip install``, what nobody has tried."""
    passed = [
        row
        for row in rows(ROOT / "docs/lab/versions.md")
        if re.fullmatch(r"[1-9]\d* passed(, \d+ warnings?)?", row[-1])
    ]
    bounds = [version.removesuffix(".0") for version in lowest()]
    assert bounds in [[re.sub(r"\.0$|\+.*", "", version) for version in row[:3]] for row in passed]
    releases = [row[:3] for row in rows(ROOT / "docs/lab/versions.md")]
    newest = [max(tuple(map(int, version.split(".")[:2])) for version in each) for each in zip(*releases, strict=True)]
    assert beyond() == [(major, minor + 1) for major, minor in newest]


def test_both_ends_of_the_bounds_are_run(tmp_path: Path) -> None:
    done, calls = run(tmp_path)
    installed = [call.split("--editable .[test] ")[1] for call in calls if call.startswith("-m pip install")]
    first = " ".join(f"{name}=={version}" for name, version in zip(PACKAGES, lowest(), strict=True))
    assert installed == [first, "torch torchvision deepspeed"], done.stderr
    assert [call for call in calls if call.startswith("-m pytest")] == ["-m pytest tests/one tests/two"] * 2
    assert list((tmp_path / "tmp").iterdir()) == [], "an environment was left behind"


@pytest.mark.parametrize(
    ("releases", "result"), [("torch==2.8.0,deepspeed", "3 passed"), ("torch==2.6.0", "1 failed, 2 passed")]
)
def test_a_run_adds_a_row_and_fails_with_its_tests(tmp_path: Path, releases: str, result: str) -> None:
    for count in (1, 2):
        done, _ = run(tmp_path, releases)
        assert done.returncode == ("failed" in result), done.stderr
        found = rows(tmp_path / "runs/versions.md")
        assert len(found) == count and found[-1][:4] == ["1.0", "2.0", "3.0", "3.11.0"] and found[-1][-1] == result


def test_releases_that_cannot_be_installed_are_named(tmp_path: Path) -> None:
    done, calls = run(tmp_path, "torch==0.1")
    assert done.returncode == 2 and "error: torch==0.1 cannot be installed" in done.stderr
    assert not any(call.startswith("-m pytest") for call in calls) and list((tmp_path / "tmp").iterdir()) == []
