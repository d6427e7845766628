"""How long ranks wait for one another in a collective, and who is missing when that is over.

A collective that some ranks never call, an evaluation on rank 0 alone say, ends in a timeout. Every rank that waited
then leaves a note in the store through which the ranks met, reads who else did, and raises an error that names the
others. Until then this costs nothing but a count.
"""

from __future__ import annotations

import datetime
import json
import math
import re
import time
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeAlias, TypeVar

import torch.distributed as dist

from tlgc_mp.errors import UsageError

P = ParamSpec("P")
T = TypeVar("T")

GRACE_SECONDS = 2.0
"""How long a rank looks for the notes of ranks that began to wait a little later."""

_TIMED_OUT = re.compile(r"timed? ?out", re.IGNORECASE)
_CONNECTION = re.compile(r"connection (closed|reset|refused)|broken pipe|recv got 0 bytes", re.IGNORECASE)

_counts: dict[str, int] = {}


class MissingRankError(dist.DistError):
    """Some ranks of a group did not take part in a collective. The message names them."""


Call: TypeAlias = tuple[str, dist.ProcessGroup, int, float]
"""One collective that this rank has begun: its name, its process group, how many the group has begun with it, and when,
by the monotonic clock. A plain tuple, for one is made in every collective."""


def begin(name: str, group: dist.ProcessGroup) -> Call:
    """Notes that a collective of ``group`` begins."""
    number = _counts[group.group_name] = _counts.get(group.group_name, 0) + 1
    return name, group, number, time.monotonic()


def complete(call: Call, wait: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What ``wait(*args, **kwargs)`` returns, which waits for the other ranks.

    Raises:
        MissingRankError: they did not come before the group's timeout, or came to another collective.
    """
    try:
        return wait(*args, **kwargs)
    except RuntimeError as error:
        explained = _explain(call, error)
        if explained is None:
            raise
        raise MissingRankError(explained) from error


def as_timeout(name: str, value: object) -> datetime.timedelta:
    """A timeout that a user gave, in seconds or as a ``timedelta``.

    Raises:
        UsageError: it is neither, or not above 0.
    """
    seconds = value.total_seconds() if isinstance(value, datetime.timedelta) else value
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
        raise UsageError(f"{name} must be a positive number of seconds or a datetime.timedelta, got {value!r}")
    try:
        return datetime.timedelta(seconds=seconds)
    except OverflowError:
        raise UsageError(f"{name} must be below 999999999 days, got {value!r}") from None


class _Note(NamedTuple):
    """What a rank says of a collective that ended without the others.

    Attributes:
        name, number: which one.
        since, until: from when to when it waited, in seconds since the epoch.
        timed_out: whether the wait ended by itself, and not because another rank's did.
    """

    name: str
    number: int
    since: float
    until: float
    timed_out: bool


def _explain(call: Call, error: RuntimeError) -> str | None:
    """The error in the words of this module; ``None`` where no rank has waited in vain."""
    timed_out = _TIMED_OUT.search(str(error)) is not None
    if not timed_out and _CONNECTION.search(str(error)) is None:
        return None
    name, group, number, began = call
    now = time.time()
    own = _Note(name, number, now - (time.monotonic() - began), now, timed_out)
    ranks = dist.get_process_group_ranks(group)
    try:
        notes = _exchange_notes(group.group_name, ranks, own)
    except RuntimeError:  # the store is gone, and with it the rank that kept it
        return None
    waited = [note for note in notes.values() if note.timed_out]
    if not waited:
        return None  # a connection broke, and nobody waited before: a rank has ended
    given_up = min(note.until for note in waited)
    absent = [rank for rank in ranks if rank not in notes or notes[rank].since > given_up]
    hint = "every tensor-parallel rank of a replica must run the model, in evaluation too, on the same batch"
    if absent:
        first = min(waited, key=lambda note: note.until)
        named = f"rank{'s' if len(absent) > 1 else ''} {', '.join(map(str, absent))}"
        return f"{named} did not take part in {first.name} within {first.until - first.since:.1f} s; {hint}"
    if len({(note.name, note.number) for note in notes.values()}) == 1:
        return None  # all were there: it is the network
    places = ", ".join(f"rank {rank} in {note.name} (number {note.number})" for rank, note in notes.items())
    return f"the ranks waited for one another in different collectives: {places}; {hint}"


def _exchange_notes(group_name: str, ranks: list[int], own: _Note) -> dict[int, _Note]:
    """Leaves this rank's note and returns those of the ranks of the group that left one, by rank."""
    store = dist.PrefixStore(f"tlgc_mp/waiting/{group_name}", dist.distributed_c10d._get_default_store())
    store.set(str(dist.get_rank()), json.dumps(own))
    notes: dict[int, _Note] = {}
    end = time.monotonic() + GRACE_SECONDS
    while True:
        for rank in ranks:
            if rank not in notes and store.check([str(rank)]):
                notes[rank] = _Note(*json.loads(store.get(str(rank))))
        if len(notes) == len(ranks) or time.monotonic() > end:
            return dict(sorted(notes.items()))
        time.sleep(0.02)
