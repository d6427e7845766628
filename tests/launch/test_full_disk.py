"""A disk that fills up under a run: it ends, says so, and keeps what it had saved; it goes on when there is room."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.disks import FILLER, fill, small_disk
from tests.launch.forked import SHORT, figures, forked, told_once
from tests.launch.jobs import free_port
from tlgc_mp.checkpoint.folder import CHECKPOINTS, damage, find_checkpoint, tags

SECONDS = 30.0
"""The longest that the run may take to end."""


@pytest.mark.timeout(300)
def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    options = [*SHORT[:-1], "6"]
    with forked(options, tmp_path / "undisturbed", port=free_port()) as job:
        assert job.wait(100.0) == [0, 0], job.said()
        undisturbed = figures(job.lines())
    with small_disk(tmp_path / "disk", 16) as disk:
        # What the ranks say goes elsewhere: it is what is looked at.
        (tmp_path / "run-said").mkdir()
        (disk / "run-said").symlink_to(tmp_path / "run-said")
        with forked(options, disk / "run", port=free_port()) as job:
            job.wait_for_epoch()
            fill(disk)
            assert job.wait(SECONDS) == [1, 1]
            assert "No space left on device" in told_once(job.stderr())
            assert "Traceback" not in job.said()
            assert not job.left()
        checkpoints = str(disk / "run" / CHECKPOINTS)
        _, newest = find_checkpoint(checkpoints)
        assert [damage(checkpoints, tag) for tag in tags(checkpoints)] == [None] * len(tags(checkpoints))
        assert newest.startswith("epoch-")

        (disk / FILLER).unlink()
        with forked([*options, "--resume"], disk / "run", port=free_port()) as job:
            assert job.wait(100.0) == [0, 0], job.said()
            assert figures(job.lines()) == undisturbed


@pytest.mark.timeout(120)
def test_a_disk_that_is_full_before_the_run(tmp_path: Path) -> None:
    """Folders can be made and nothing written: TensorBoard's thread is the first to find that out."""
    with small_disk(tmp_path / "disk", 1) as disk:
        (tmp_path / "run-said").mkdir()
        (disk / "run-said").symlink_to(tmp_path / "run-said")
        fill(disk)
        with forked(SHORT, disk / "run", port=free_port()) as job:
            assert 0 not in job.wait(SECONDS + 70.0)
            assert f"No space left on device: {disk / 'run'}" in told_once(job.stderr())
            assert "Traceback" not in job.said()
            assert not job.left()
