"""How the ranks of a measurement start where the start is not what is tested."""

import pytest

from tests import forked
from tlgc_mp.bench.ranks import launch


@pytest.fixture
def forked_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of :func:`tlgc_mp.bench.ranks.launch.measure` are forked; ``test_launch.py`` starts real ones."""
    monkeypatch.setattr(launch, "subprocess", forked)
