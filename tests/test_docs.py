"""The documentation builds without a warning, and its API pages name all that is public."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tlgc_mp

ROOT = Path(__file__).parents[1]


def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(tmp_path / "cache"), "docs"]
    done = subprocess.run([*command, str(tmp_path / "html")], cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "html" / "api" / "tlgc_mp.html").read_text(encoding="utf-8")
    assert all(f'id="tlgc_mp.{name}"' in page for name in tlgc_mp.__all__)


@pytest.mark.parametrize("room", ["tlgc_mp", "tlgc_mp.nn", "tlgc_mp.parallel", "tlgc_mp.checkpoint"])
def test_every_public_name_has_its_place(room: str) -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    named = set(re.findall(r":: ([\w.]+)", pages))
    here = {f"{room}.{name}" for name in importlib.import_module(room).__all__}
    missing = {name for name in here - named if f"tlgc_mp.{name.rpartition('.')[2]}" not in named}
    assert not missing


def test_every_page_is_reached() -> None:
    """From the first page, by tables of contents."""
    reached, waiting = set(), [ROOT / "docs" / "index.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        for block in re.findall(r"```{toctree}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
            entries = [line for line in block.splitlines() if line and not line.startswith(":")]
            waiting += [page.parent / f"{entry}.md" for entry in entries]
    assert reached == set((ROOT / "docs").rglob("*.md"))
