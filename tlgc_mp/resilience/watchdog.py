"""Ends the whole job, and says why once, when one of its ranks fails, dies or stops.

Two daemon threads a rank, beside the training: one *beats* in the job's key-value store and looks there whether the
next rank does too (a ring, so that a thousand ranks cost the store two thousand short requests a beat); the other
*judges*: it sleeps until a process of this machine's ranks ends, which the kernel tells at once, until somebody has
told why the job ends, or until the store or the next rank has not answered for ``rank_timeout`` seconds. It never waits
for the store itself, which a stopped process may hold. The training's own thread does nothing for any of this.

Whoever finds a cause first puts it into the store (compare-and-set) and prints it; everybody else finds it there, says
nothing and leaves. A broken connection is what the end of another rank looks like from here: it is told only if no
better cause shows within some seconds.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import sys
import threading
import time
from types import TracebackType

import torch.distributed as dist

from tlgc_mp.parallel.topology import Topology
from tlgc_mp.resilience.faults import Cause, cause_of
from tlgc_mp.resilience.interrupt import Interrupted
from tlgc_mp.resilience.meeting import LOOK_SECONDS, leave_word, meeting, not_met
from tlgc_mp.resilience.members import Beats, Member, Members
from tlgc_mp.resilience.verdicts import Failed, Verdict, leave_verdict, note_meeting, write_traceback
from tlgc_mp.resilience.workers import Workers

BEAT_SECONDS = 2.0
ECHO_SECONDS = 6.0
"""What a broken connection waits for its cause, and what the rank with the store waits for others to read theirs."""
FAREWELL_SECONDS = 10.0
"""What rank 0, at the end of a run, waits for others to be done with the store."""
_FIRST_WORD_SECONDS = 0.5
_UNJOINED_SECONDS = 3.0
_TURN_SECONDS = 2.0
_ANSWER_SECONDS = 1.0
_GLANCE_SECONDS = 0.1
_GONE = " and its connections are closed: killed, or crashed"

_runs = itertools.count()


class Watchdog:
    """Watches over one run while it is entered; see the module.

    Left by an exception, it tells the cause and raises :class:`Failed` in its place, unless the run was stopped
    (:class:`~tlgc_mp.resilience.interrupt.Interrupted`, KeyboardInterrupt, SystemExit), which passes. Left in peace, it
    sees to it that no other rank takes this one for lost; rank 0, whose process holds the store, then waits for the
    others up to 10 s.

    Args:
        topology: of the run.
        output_dir: where the traceback of an unexpected exception goes, as ``rank-K.traceback``.
        rank_timeout: seconds without a sign of life after which a rank is lost.

    Attributes:
        workers: the data worker processes of this rank, whose end is a fault while they are needed.
    """

    def __init__(self, topology: Topology, output_dir: str, rank_timeout: float) -> None:
        self._rank, self._world = topology.rank, topology.world
        self._output_dir = output_dir
        self._timeout = rank_timeout
        self._beat = min(BEAT_SECONDS, rank_timeout / 5)
        self._next = (self._rank + 1) % self._world
        # Under torchrun the launcher's agent holds the store, else rank 0 does.
        self._holder = None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0
        self._store: dist.Store | None = None
        self._threads: list[threading.Thread] = []
        self._wake_read, self._wake_write = -1, -1
        self._look = threading.Event()
        self._failing = self._closing = False
        self._print_lock = threading.Lock()
        self._printed = False
        # What the beating thread finds for the judging one.
        self._answered_at = self._next_seen_at = self._round_began = 0.0
        self._next_beat = b""
        self._members = Members(self._rank)
        self.workers = Workers()
        self._left: set[int] = set()
        self._verdict: Verdict | None = None
        self._lost_at: float | None = None  # when the store was found gone
        # Of the judging thread.
        self._beats: Beats | None = None  # while a cause is sought that may be another rank's
        self._ended: dict[int, float] = {}  # rank: when its process ended

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._close()
        elif isinstance(error, Interrupted):
            leave_verdict(128 + error.signal, f"stopped by {signal.Signals(error.signal).name}")
            self._close()
        elif isinstance(error, (KeyboardInterrupt, SystemExit)):
            self._failing = True
            if self._threads and not self._silent():
                self._post(Verdict(self._rank, self._rank, "", 128 + signal.SIGINT))
            self._stop()
        else:
            raise Failed(self._fail(error)) from error

    def meeting(self) -> contextlib.AbstractContextManager[None]:
        """Bounds what is done in it, which waits for every rank to come up, to 300 s; a rank that fails meanwhile ends
        the others."""

        def end(verdict: Verdict | None) -> None:
            if verdict is None:
                if self._rank:
                    time.sleep(_UNJOINED_SECONDS)
                verdict = self._about(self._rank, not_met(self._world))
                self._print(verdict)
            else:
                leave_verdict(verdict.status, verdict.line())
            os._exit(verdict.status)

        return meeting(end) if self._world > 1 else contextlib.nullcontext()

    def start(self) -> None:
        """Begins to watch; every rank calls it as soon as torch.distributed is up."""
        note_meeting()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._world > 1:
            store = dist.distributed_c10d._get_default_store()
            # A connection of its own: the training's thread may wait for a key on the other, as long as it takes.
            store = store.clone() if hasattr(store, "clone") else store
            self._store = dist.PrefixStore(f"tlgc_mp/watchdog/{next(_runs)}", store)
            self._threads.append(threading.Thread(target=self._keep_beating, name="tlgc_mp beat", daemon=True))
        self._answered_at = self._next_seen_at = time.monotonic()
        self._threads.append(threading.Thread(target=self._judge, name="tlgc_mp judge", daemon=True))
        for thread in self._threads:
            thread.start()

    # The beating thread.

    def _keep_beating(self) -> None:
        for beat in itertools.count():
            if self._closing:
                return
            self._look.clear()
            began = time.monotonic()
            try:
                self._exchange(beat)
            except Exception:
                self._lost_at = time.monotonic()
                self._wake()
                return
            self._answered_at, self._round_began = time.monotonic(), began
            if self._verdict is not None or self._ended:
                self._wake()
            self._look.wait(self._beat if self._members.known else _GLANCE_SECONDS)

    def _exchange(self, beat: int) -> None:
        store, following = self._store, self._next
        assert store is not None
        store.set(f"beat/{self._rank}", str(beat))
        if beat == 0:
            store.set(f"member/{self._rank}", json.dumps(Member.own()))
        if not self._members.known:
            keys = [f"member/{rank}" for rank in range(self._world)]
            if store.check(keys):
                self._members.introduce([Member(*json.loads(store.get(key))) for key in keys])
                self._wake()
        if store.check([f"beat/{following}"]):
            seen = store.get(f"beat/{following}")
            if seen != self._next_beat:
                self._next_beat, self._next_seen_at = seen, time.monotonic()
        if self._beats is not None:
            self._beats.look(store, self._world)
        self._left.update(rank for rank in {following, *self._ended} if store.check([f"left/{rank}"]))
        if self._verdict is None and store.check(["verdict"]):
            self._verdict = Verdict(*json.loads(store.get("verdict")))
            store.set(f"left/{self._rank}", "")

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self._wake_write, b"\0")

    # The judging thread.

    def _judge(self) -> None:
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        ranks: dict[int, int] = {}
        last = time.monotonic()
        while not self._closing:
            pause = _GLANCE_SECONDS if self._ended or self._lost_at else self._beat
            for descriptor, _ in poll.poll(pause * 1000):
                if descriptor == self._wake_read:
                    os.read(self._wake_read, 4096)
                    continue
                poll.unregister(descriptor)
                self._ended[ranks[descriptor]] = time.monotonic()
                self._look.set()
            now = time.monotonic()
            if now - last > self._beat + self._timeout / 2:
                # This process itself was stopped, and maybe the others with it: their silence counts from now on.
                self._answered_at = self._next_seen_at = now
            last = now
            if self._members.known and not self._members.descriptors:
                self._members.open()
                ranks = {descriptor: rank for rank, descriptor in self._members.descriptors.items()}
                for descriptor in ranks:
                    poll.register(descriptor, select.POLLIN)
            verdict = self._verdict or self._find(now)
            if verdict is not None and not self._closing:
                self._end(verdict)

    def _find(self, now: float) -> Verdict | None:
        """What has gone wrong, if anything."""
        if (worker := self.workers.dead()) is not None:
            return self._about(self._rank, worker)
        if self._store is None:
            return None
        for rank, when in self._ended.items():
            # The store knows whether that rank was done, or has told why not, unless it went with that rank.
            asked = self._round_began > when or now - when > _ANSWER_SECONDS
            if rank not in self._left and (asked or rank == self._holder):
                return self._about(rank, f"{self._members.process(rank)} has died without a word: killed, or crashed")
        if self._lost_at is not None and now - self._lost_at > _ANSWER_SECONDS:
            return self._store_failed("is gone")
        silence = now - self._answered_at
        if silence > self._timeout:
            return self._store_failed(f"has not answered for {silence:.0f} s")
        if now - self._answered_at < 2 * self._beat and self._next not in self._left:
            silence = now - self._next_seen_at
            if silence > self._timeout:
                how = f"has not answered for {silence:.0f} s{_GONE if self._beats else ''}"
                return self._about(self._next, f"{self._members.silent_process(self._next)} {how}", lost=True)
        return None

    def _store_failed(self, how: str) -> Verdict:
        if self._holder is None:
            return self._about(self._rank, f"the launcher's key-value store {how}")
        who = self._members.silent_process(self._holder)
        return self._about(self._holder, f"{who} {how}", lost=True)

    def _end(self, verdict: Verdict) -> None:
        """Ends this process, for the cause that ``verdict`` names or for one that was told before."""
        self._verdict = standing = self._tell(verdict)
        if standing.lost:
            self._members.kill(standing.rank)  # a stopped process does not hear SIGTERM
        self._farewell(ECHO_SECONDS)
        deadline = time.monotonic() + ECHO_SECONDS
        while self._failing and not self._closing and time.monotonic() < deadline:
            time.sleep(_GLANCE_SECONDS)  # the training's thread has failed too, and is about to leave by itself
        if not self._closing:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(standing.status)

    # The training's thread, and whichever else ends the run.

    def _fail(self, error: BaseException) -> int:
        """Tells what ``error`` means, unless something else explains it; the exit status."""
        self._failing = True
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher's, which would cut the telling short
        cause = cause_of(error)
        started = bool(self._threads)
        if not started and self._rank:
            time.sleep(_UNJOINED_SECONDS)  # what every rank finds alike ends the job before that
        elif cause.echo and self._world > 1:
            self._beats = Beats(self._rank)
            self._look.set()
            deadline = time.monotonic() + ECHO_SECONDS
            while self._verdict is None and time.monotonic() < deadline:
                time.sleep(_GLANCE_SECONDS)
        elif cause.shared and self._rank:
            time.sleep(_FIRST_WORD_SECONDS)
        standing = self._verdict or self._tell(self._read(error, cause))
        self._farewell(ECHO_SECONDS)
        if not started and self._holder == self._rank and self._world > 1:
            time.sleep(2 * LOOK_SECONDS)  # this process may hold the store at which others read this
        self._stop()
        return standing.status

    def _read(self, error: BaseException, cause: Cause) -> Verdict:
        """What this rank makes of ``error`` by itself."""
        deadline = time.monotonic() + _GLANCE_SECONDS * 10
        while (worker := self.workers.dead()) is None and isinstance(error, EOFError) and time.monotonic() < deadline:
            time.sleep(_GLANCE_SECONDS)  # a worker that was killed as it handed over a batch is gone in a moment
        if worker is not None:
            return self._about(self._rank, worker)
        if self._beats is not None and (silent := self._beats.silent()) is not None:
            # On another machine, of which the kernel here knows nothing.
            who = self._members.process(silent)
            return self._about(silent, f"{who} has not answered for {ECHO_SECONDS:.0f} s{_GONE}", lost=True)
        text = cause.text
        if cause.traced and (path := write_traceback(error, self._rank, self._output_dir)):
            text = f"{text} (traceback: {path})"
        return self._about(self._rank, text, cause.status)

    def _tell(self, verdict: Verdict) -> Verdict:
        """Prints ``verdict``, unless another stands; the one that stands."""
        if self._store is None:
            standing = verdict if self._threads or self._world == 1 else leave_word(verdict)
        elif self._silent() or (posted := self._post(verdict)) is None:
            standing = self._verdict or verdict
            if self._verdict is None and not self._has_the_word():
                leave_verdict(verdict.status, verdict.line())
                return verdict
        else:
            standing = posted
        if standing.text and standing.teller == self._rank:
            self._print(standing)
        elif standing.text:
            leave_verdict(standing.status, standing.line())  # for the launch on this host
        return standing

    def _silent(self) -> bool:
        return self._lost_at is not None or time.monotonic() - self._answered_at > self._timeout

    def _post(self, verdict: Verdict) -> Verdict | None:
        """Puts ``verdict`` into the store unless one is there; the one that is there. ``None`` without a store.

        Where the store is stopped, this waits until the judging thread ends the process.
        """
        if self._store is None:
            return None
        try:
            standing = Verdict(*json.loads(self._store.compare_set("verdict", "", json.dumps(verdict))))
        except Exception:
            return None
        with contextlib.suppress(Exception):
            self._store.set(f"left/{self._rank}", "")  # nothing more is read here
        return standing

    def _has_the_word(self) -> bool:
        """Where no store can settle it: whether this is the lowest rank that lives. Others give that one time."""
        lower = [rank for rank in range(self._rank) if rank != self._holder and not self._members.has_ended(rank)]
        deadline = time.monotonic() + _TURN_SECONDS * min(len(lower), 4)
        while time.monotonic() < deadline:
            if any(self._members.has_ended(rank) for rank in lower):
                return False
            time.sleep(_GLANCE_SECONDS)
        return True

    def _farewell(self, seconds: float) -> None:
        """Keeps the store up, where this process holds it, until the ranks that live have read what is in it."""
        if self._rank != self._holder or self._store is None or self._silent():
            return
        deadline = time.monotonic() + seconds
        for rank in range(self._world):
            while rank != self._rank and time.monotonic() < deadline and not self._members.has_ended(rank):
                if self._verdict is not None and self._verdict.lost and self._verdict.rank == rank:
                    break
                try:
                    if self._store.check([f"left/{rank}"]):
                        break
                except Exception:
                    return
                time.sleep(_GLANCE_SECONDS)

    def _close(self) -> None:
        """Leaves in peace."""
        if self._threads and self._store is not None:
            self._closing = True
            with contextlib.suppress(Exception):
                self._store.set(f"left/{self._rank}", "")
                self._farewell(FAREWELL_SECONDS)
        self._stop()

    def _stop(self) -> None:
        self._closing = True
        self._look.set()
        self._wake()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_ANSWER_SECONDS)
        if not any(thread.is_alive() for thread in self._threads):
            for descriptor in (self._wake_read, self._wake_write):
                if descriptor >= 0:
                    os.close(descriptor)
            self._wake_read = self._wake_write = -1
            self._members.close()

    def _about(self, rank: int, text: str, status: int = 1, lost: bool = False) -> Verdict:
        return Verdict(self._rank, rank, text, status, lost)

    def _print(self, verdict: Verdict) -> None:
        with self._print_lock:
            if self._printed:
                return
            self._printed = True
            leave_verdict(verdict.status, verdict.line())
            with contextlib.suppress(OSError):
                print(f"tlgc-mp: {verdict.line()}", file=sys.stderr, flush=True)
