"""Each rank of a node works on an accelerator of its own, or is told that there is none for it."""

from __future__ import annotations

import pytest

from tlgc_mp import UsageError
from tlgc_mp.engine import start


class Accelerators:
    """Stands in for two devices of the kind ``name``."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.taken: list[int] = []

    def device_name(self) -> str:
        return self.name

    def device_count(self) -> int:
        return 2

    def set_device(self, index: int) -> None:
        self.taken.append(index)


def _found(monkeypatch: pytest.MonkeyPatch, name: str) -> Accelerators:
    found = Accelerators(name)
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: found)
    return found


def test_takes_that_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerators = _found(monkeypatch, "cuda")
    start._take_device(1)
    assert accelerators.taken == [1]


def test_a_rank_too_many_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerators = _found(monkeypatch, "cuda")
    with pytest.raises(
        UsageError, match=r"^local rank must be less than 2, the number of cuda devices of this node, got 2; start 2 "
    ):
        start._take_device(2)
    assert accelerators.taken == []


def test_any_number_of_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerators = _found(monkeypatch, "cpu")
    start._take_device(7)
    assert accelerators.taken == []
