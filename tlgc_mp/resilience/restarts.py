"""Starts a launch of training, and starts it again from its newest checkpoint when it fails. Loads no torch.

The launch gets a session of its own. While it runs, this process is the parent of whatever loses its parent below it
(a *subreaper*), so that it finds every process of the launch, those in sessions and groups of their own too: when the
launcher has ended, what is left of them is killed before anything is started again. Where the run has told how it ended
and its launcher stays, as over a network that is gone, the launcher is ended.

Over several hosts it is started on each where the launcher is (torchrun), and on one where that reaches the others.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

import psutil

from tlgc_mp.checkpoint.folder import CHECKPOINTS, newest_whole
from tlgc_mp.errors import UsageError, must_be
from tlgc_mp.resilience.verdicts import VERDICT_FILE, met, read_verdict
from tlgc_mp.training.settings import output_folder

CLEAR_SECONDS = 30.0
"""In which killed processes must be gone; one that waits for a disk that is not there cannot be killed."""
LAUNCHER_SECONDS = 60.0
"""In which a launcher must have ended once its run has told how it ended."""
MEETING_SECONDS = 300.0
"""For how long after a fault a start in which ranks do not meet counts as the same restart: those on another host may
still have to end."""
_TERMINATE_SECONDS = 10.0
_PAUSE_SECONDS = 1.0
_MEETING_PAUSE_SECONDS = 5.0
_POLL_SECONDS = 0.05
_LOOK_SECONDS = 0.5

_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37
_ASKED_TO_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_MPI_LAUNCHERS = ("mpirun", "mpiexec", "orterun", "prterun")


def run(command: Sequence[str], max_restarts: int, parse: Callable[[list[str]], Namespace]) -> int:
    """Runs ``command``, and again up to ``max_restarts`` times while it fails; the exit status of the last attempt.

    A run that ended well, that has a mistake in its arguments (2) or that was asked to stop is not started again.

    Args:
        command: a launch of ``tlgc-mp train``, under any launcher.
        max_restarts: 0 or more.
        parse: turns the arguments of ``tlgc-mp`` from ``train`` on into options.

    Raises:
        UsageError: there is no training in ``command``, or a mistake in its options.
    """
    command = list(command)
    if max_restarts < 0:
        raise must_be("--max-restarts", "0 or more", max_restarts)
    output_dir = output_folder(parse(_training(command)))
    others = set(psutil.Process().children())
    attempt = _Attempt(mpi=os.path.basename(command[0]) in _MPI_LAUNCHERS)
    restarts, resume = 0, list[str]()
    had_met, failed_at = False, 0.0
    with _adopting(), attempt.passing_signals_on(), tempfile.TemporaryDirectory(prefix="tlgc-mp-launch-") as folder:
        attempts = itertools.count(1)
        while True:
            verdict_file = os.path.join(folder, f"verdict-{next(attempts)}")
            status = attempt.run([*command, *resume], verdict_file)
            verdict = read_verdict(verdict_file)
            if attempt.signalled and not status and verdict.get("status"):
                status = 128 + attempt.signalled  # mpirun may call it a success that its ranks were asked to stop
            _clear(others)
            ended = int(verdict.get("status", status)) if status else 0
            why = f"status {status}" + (f", {verdict['text']}" if verdict.get("text") else "")
            if status == 0 or attempt.signalled or ended == 2 or ended in {128 + number for number in _ASKED_TO_STOP}:
                return status
            again = had_met and not met(verdict_file) and time.monotonic() - failed_at < MEETING_SECONDS
            if restarts == max_restarts and not again:
                if max_restarts:
                    _say(f"ended with {why}; it has been started again {max_restarts} times, which is all of them")
                return status
            resume, place = _newest(output_dir)
            if again:
                _say(f"ended with {why} before its ranks had met; starting again {place} (still restart {restarts})")
            else:
                restarts, had_met, failed_at = restarts + 1, met(verdict_file), time.monotonic()
                _say(f"ended with {why}; starting again {place} (restart {restarts} of {max_restarts})")
            attempt.pause(_MEETING_PAUSE_SECONDS if again else _PAUSE_SECONDS)
            if attempt.signalled:
                return 128 + attempt.signalled


@contextlib.contextmanager
def _adopting() -> Iterator[None]:
    """Makes this process the parent of whatever loses its parent below it."""
    prctl, before = ctypes.CDLL(None).prctl, ctypes.c_int()
    prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)


def _training(command: list[str]) -> list[str]:
    """The arguments of ``tlgc-mp`` in ``command``, from ``train`` on."""
    if "train" in command[1:]:
        return command[command.index("train", 1) :]
    raise UsageError(
        f"COMMAND must end in `... tlgc_mp train OPTIONS`, got {shlex.join(command) or 'nothing'}; give it after --"
    )


def _newest(output_dir: str) -> tuple[list[str], str]:
    """(what goes on from the newest whole checkpoint in ``output_dir``, where that is, in words)."""
    folder = os.path.join(output_dir, CHECKPOINTS)
    tag = newest_whole(folder)
    if tag is None:
        return [], "from the beginning, as there is no whole checkpoint yet"
    path = os.path.join(folder, tag)
    return ["--resume", path], f"from {path}"


class _Attempt:
    """The launch that runs at the moment, and the signals that are passed on to it."""

    def __init__(self, mpi: bool) -> None:
        self.signalled = 0
        self._mpi = mpi
        self._process: subprocess.Popen[bytes] | None = None

    @contextlib.contextmanager
    def passing_signals_on(self) -> Iterator[None]:
        previous = {}
        for number in (*_ASKED_TO_STOP, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup would have it
                previous[number] = signal.signal(number, self._pass_on)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def run(self, command: list[str], verdict_file: str) -> int:
        """The launch's exit status, 128 + n where signal n ended it. Its ranks leave their verdict in the file."""
        environment = {**os.environ, VERDICT_FILE: verdict_file}
        try:
            self._process = subprocess.Popen(command, env=environment, start_new_session=True)
        except OSError as error:
            raise UsageError(f"COMMAND must be one that can be started, got {command[0]!r}: {error.strerror}") from None
        if self.signalled:
            self._send(self.signalled)
        status = self._wait(self._process, verdict_file)
        self._process = None
        status = 128 - status if status < 0 else status
        # What mpirun was sent in place of the signal that is passed on.
        return 128 + self.signalled if self.signalled and status == 128 + signal.SIGUSR1 else status

    def _wait(self, process: subprocess.Popen[bytes], verdict_file: str) -> int:
        deadline = float("inf")
        while time.monotonic() < deadline:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(_LOOK_SECONDS)
            if deadline == float("inf") and os.path.exists(verdict_file):
                deadline = time.monotonic() + LAUNCHER_SECONDS
        _say(f"the run has ended, and its launcher has not for {LAUNCHER_SECONDS:.0f} s; it is ended")
        os.killpg(process.pid, signal.SIGTERM)
        try:
            return process.wait(_TERMINATE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return -signal.SIGKILL  # and is waited for with what it has left

    def pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self.signalled and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        first, self.signalled = not self.signalled, number
        if number == signal.SIGHUP:
            number = signal.SIGTERM  # on which ranks save
        # mpirun kills its ranks on SIGINT and SIGTERM, before they can save; SIGUSR1 it hands to them.
        self._send(signal.SIGUSR1 if self._mpi and first else number)

    def _send(self, number: int) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                if self._mpi:
                    process.send_signal(number)
                else:
                    os.killpg(process.pid, number)


def _clear(others: set[psutil.Process]) -> None:
    """Kills what is left below this process but for ``others``, its own children, and waits until it is gone.

    Raises:
        UsageError: something cannot be killed.
    """
    deadline = time.monotonic() + CLEAR_SECONDS
    while left := [process for process in psutil.Process().children() if process not in others]:
        for process in list(left):
            with contextlib.suppress(psutil.Error):
                left += process.children(recursive=True)
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process.pid, os.WNOHANG)
        if time.monotonic() > deadline:
            pids = sorted(process.pid for process in left)
            raise UsageError(f"launch: {len(left)} processes of the last attempt cannot be killed: {pids}")
        time.sleep(_POLL_SECONDS)


def _say(text: str) -> None:
    print(f"tlgc-mp: launch: {text}", file=sys.stderr, flush=True)
