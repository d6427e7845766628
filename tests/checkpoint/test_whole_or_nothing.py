"""A save that is cut off, or cannot be written, harms nothing that was saved before."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests.checkpoint.engines import (
    fill_the_disk,
    save_odd_schedules,
    save_several,
    save_until_killed,
    save_where_a_file_is,
    save_while_others_use_the_store,
    train_on_while_it_is_written,
)
from tests.ranks import run_ranks
from tlgc_mp.checkpoint.folder import damage, find_checkpoint, tags

KILLS = 20


@pytest.mark.timeout(300)
def test_killed_at_random_moments(tmp_path: Path) -> None:
    drawn = random.Random(0)
    partial = saved = 0
    for number in range(KILLS):
        folder = tmp_path / str(number)
        with pytest.raises(AssertionError, match="ended without an answer"):
            run_ranks(1, save_until_killed, str(folder), drawn.uniform(0.0, 0.2))
        found, tag = find_checkpoint(str(folder))
        assert (found, damage(found, tag)) == (str(folder), None)
        names = tags(str(folder))
        assert [damage(str(folder), name) for name in names] == [None] * len(names)
        # The newest is the one named last, or the one before it where the kill fell between the two.
        assert names.index(tag) <= 1
        partial += any(path.suffix == ".partial" for path in folder.iterdir())
        saved += int(tag.removeprefix("save-"))
    assert partial > 0 and saved > 0, "no kill fell into a save: the test shows nothing"


@pytest.mark.timeout(120)
def test_a_full_disk_on_one_rank_is_told_on_all(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    said = run_ranks(2, fill_the_disk, str(folder))
    expected = f"checkpoint {str(folder / 'bad')!r} was not written: rank 1: "
    assert said[0] == said[1] and len(said[0]) == 2 and said[0][0] == said[0][1]
    assert said[0][0].startswith(expected) and "too large" in said[0][0].lower(), said[0]
    assert sorted(path.name for path in folder.iterdir()) == ["better", "good", "latest"]
    assert find_checkpoint(str(folder)) == (str(folder), "better")
    assert damage(str(folder), "better") is None and damage(str(folder), "good") is None


@pytest.mark.timeout(120)
def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (said,) = run_ranks(1, save_where_a_file_is, str(tmp_path / "file" / "checkpoints"))
    assert said.startswith(
        f"checkpoint {str(tmp_path / 'file' / 'checkpoints' / 'step-0')!r} was not written: rank 0: "
    )
    assert "Not a directory" in said


@pytest.mark.timeout(120)
def test_training_on_does_not_change_what_is_written(tmp_path: Path) -> None:
    ((before, loaded),) = run_ranks(1, train_on_while_it_is_written, str(tmp_path))
    assert before.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], value) for name, value in before.items())


@pytest.mark.timeout(120)
def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    (tmp_path / "old.partial").mkdir()
    run_ranks(1, save_several, str(tmp_path), 2, ["a", "b", "c", "d", "d"], "b")
    assert tags(str(tmp_path)) == ["d.2", "d", "b"]
    assert (tmp_path / "best").read_text() == "b\n" and (tmp_path / "latest").read_text() == "d.2\n"
    assert not (tmp_path / "old.partial").exists()


@pytest.mark.timeout(120)
def test_what_could_not_be_loaded_safely_is_not_saved(tmp_path: Path) -> None:
    (said,) = run_ranks(1, save_odd_schedules, str(tmp_path / "checkpoints"))
    objects = "the state of MultiStepLR must be numbers, tensors and containers, got Python objects, which would run "
    assert len(said) == 6 and all(message.startswith(objects) for message in said[:4])
    stateless = "lr_scheduler must have state_dict() and load_state_dict() to be saved, got _Stateless without state_d"
    assert all(message.startswith(stateless) for message in said[4:])
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.timeout(120)
def test_a_save_waits_on_the_store_beside_its_other_users_and_leaves_nothing_in_it(tmp_path: Path) -> None:
    for found, calls, left in run_ranks(2, save_while_others_use_the_store, str(tmp_path), 3):
        assert found == ["save-2", "save-1", "save-0"]
        assert calls <= 3 * 20, calls  # a few for each save, however long it waits
        assert left == 0
