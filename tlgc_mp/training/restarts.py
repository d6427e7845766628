"""Starts a launch of training, and starts it again from its newest checkpoint when it fails. Loads no torch.

The launch gets a session of its own. This process makes itself the parent of whatever loses its parent below it
(a *subreaper*), so that it finds every process of the launch, those in sessions and groups of their own too: when the
launcher has ended, what is left of them is killed before anything is started again.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from tlgc_mp.checkpoint.folder import CHECKPOINTS, newest_whole
from tlgc_mp.errors import UsageError
from tlgc_mp.training.settings import output_folder
from tlgc_mp.training.verdicts import VERDICT_FILE, read_verdict

CLEAR_SECONDS = 30.0
"""In which killed processes must be gone; one that waits for a disk that is not there cannot be killed."""
_PAUSE_SECONDS = 1.0
_POLL_SECONDS = 0.05

_PR_SET_CHILD_SUBREAPER = 36
_ASKED_TO_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_MPI_LAUNCHERS = ("mpirun", "mpiexec", "orterun", "prterun")


def run(command: Sequence[str], max_restarts: int, parse: Callable[[list[str]], Any]) -> int:
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
        raise UsageError(f"--max-restarts={max_restarts} is negative; use 0 or more")
    output_dir = output_folder(parse(_training(command)))
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    attempt = _Attempt(mpi=os.path.basename(command[0]) in _MPI_LAUNCHERS)
    restarts, resume = 0, list[str]()
    with attempt.passing_signals_on(), tempfile.TemporaryDirectory(prefix="tlgc-mp-launch-") as folder:
        while True:
            verdict_file = os.path.join(folder, f"verdict-{restarts}")
            status = attempt.run([*command, *resume], {**os.environ, VERDICT_FILE: verdict_file})
            verdict = read_verdict(verdict_file)
            _clear()
            ended = int(verdict.get("status", status)) if status else 0
            why = f"status {status}" + (f", {verdict['text']}" if verdict.get("text") else "")
            if status == 0 or attempt.signalled or ended == 2 or ended in {128 + number for number in _ASKED_TO_STOP}:
                return status
            if restarts == max_restarts:
                if max_restarts:
                    _say(f"ended with {why}; it has been started again {max_restarts} times, which is all of them")
                return status
            restarts += 1
            resume, place = _newest(output_dir)
            _say(f"ended with {why}; starting again {place} (restart {restarts} of {max_restarts})")
            attempt.pause(_PAUSE_SECONDS)
            if attempt.signalled:
                return 128 + attempt.signalled


def _training(command: list[str]) -> list[str]:
    """The arguments of ``tlgc-mp`` in ``command``, from ``train`` on."""
    if "train" in command[1:]:
        return command[command.index("train", 1) :]
    raise UsageError(
        f"launch: {shlex.join(command) or 'an empty command'} starts no training; give one that ends in "
        "`... tlgc_mp train OPTIONS`, after --"
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

    def run(self, command: list[str], environment: dict[str, str]) -> int:
        """The launch's exit status, 128 + n where signal n ended it."""
        try:
            self._process = subprocess.Popen(command, env=environment, start_new_session=True)
        except OSError as error:
            raise UsageError(f"launch: {command[0]!r} cannot be started: {error.strerror}") from None
        if self.signalled:
            self._send(self.signalled)
        status = self._process.wait()
        self._process = None
        return 128 - status if status < 0 else status

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


def _clear() -> None:
    """Kills what is left below this process, and waits until it is gone.

    Raises:
        UsageError: something cannot be killed.
    """
    deadline = time.monotonic() + CLEAR_SECONDS
    while left := _descendants():
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if time.monotonic() > deadline:
            raise UsageError(f"launch: {len(left)} processes of the last attempt cannot be killed: {sorted(left)}")
        time.sleep(_POLL_SECONDS)


def _descendants() -> set[int]:
    """Every process below this one, dead ones that nobody has waited for too."""
    parents = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError), open(os.path.join(entry.path, "stat"), encoding="utf-8") as file:
                parents[int(entry.name)] = int(file.read().rpartition(")")[2].split()[1])
    found: set[int] = set()
    newest = {os.getpid()}
    while newest:
        newest = {pid for pid, parent in parents.items() if parent in newest} - found
        found |= newest
    return found


def _say(text: str) -> None:
    print(f"tlgc-mp: launch: {text}", file=sys.stderr, flush=True)
