"""While ranks meet: a bound on it, and the word of a rank that fails, for which the others would wait in vain."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator

import torch.distributed as dist

from tlgc_mp.resilience.verdicts import Verdict

MEETING_SECONDS = 300.0
"""In which all ranks must have met, from the moment when one begins to wait for the others."""
LOOK_SECONDS = 1.0
_CONNECT_SECONDS = 2.0


@contextlib.contextmanager
def meeting(end: Callable[[Verdict | None], None]) -> Iterator[None]:
    """What is done in it waits for every rank to come up. ``end``, called by another thread, ends this process: for a
    verdict that a rank has left, or for none where the time is over."""
    met = threading.Event()

    def watch() -> None:
        store: dist.Store | None = None
        while not met.wait(LOOK_SECONDS):
            store = store or _store()
            if store is not None and (verdict := _read(store)) is not None and not met.is_set():
                end(verdict)

    def give_up() -> None:
        if not met.wait(MEETING_SECONDS):
            end(None)

    # Two, as what listens at the store's port may be something else, and never answer.
    for target in (watch, give_up):
        threading.Thread(target=target, name="tlgc_mp meeting", daemon=True).start()
    try:
        yield
    finally:
        met.set()


def not_met(world: int) -> str:
    """What is told when the time is over."""
    place = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    late = f"not all of the {world} ranks came to {place} within {MEETING_SECONDS:.0f} s"
    return f"{late}; one of them hangs, or was not started"


def leave_word(verdict: Verdict) -> Verdict:
    """Leaves the verdict of a rank that fails before the others have met it; the one that stands.

    Where the store is not up there is nobody who waits at it.
    """
    standing = [verdict]

    def leave() -> None:
        store = _store()
        if store is not None:
            with contextlib.suppress(Exception):
                standing.append(Verdict(*json.loads(store.compare_set(_key(), "", json.dumps(verdict)))))

    thread = threading.Thread(target=leave, daemon=True)
    thread.start()
    thread.join(2 * _CONNECT_SECONDS)
    return standing[-1]


def _read(store: dist.Store) -> Verdict | None:
    try:
        return Verdict(*json.loads(store.get(_key()))) if store.check([_key()]) else None
    except Exception:
        return None


def _key() -> str:
    attempt = [os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RUN_ID", "RESTART_COUNT")]
    return "/".join(["tlgc_mp/meeting", *attempt])


def _store() -> dist.Store | None:
    """A connection to the key-value store where ranks meet; ``None`` where it is not up, or not known yet."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if host is None or not port.isdigit():
        return None
    try:
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
        timeout = datetime.timedelta(seconds=_CONNECT_SECONDS)
        return dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=timeout)
    except Exception:
        return None
