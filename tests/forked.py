"""``python -m MODULE`` as :mod:`subprocess` starts it, forked from the server of :mod:`tests.ranks`.

Torch and deepspeed are loaded there, so that a start takes no processor time to speak of, where it takes five seconds
elsewhere. A test that is about something else than the start puts this module in the place of ``subprocess`` in the
module that starts processes. With an accelerator each starts from nothing, as it has to there.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing import reduction
from subprocess import DEVNULL, PIPE, STDOUT, TimeoutExpired
from typing import IO, Any

import torch

from tests import ranks

__all__ = ["DEVNULL", "PIPE", "STDOUT", "Popen", "TimeoutExpired"]


class Popen:
    """A running ``[sys.executable, "-m", MODULE, ...]``; of :class:`subprocess.Popen`, what the tests need."""

    def __new__(cls, words: list[str], **options: Any) -> Any:
        if words[:2] != [sys.executable, "-m"] or torch.accelerator.is_available():
            return subprocess.Popen(words, **options)
        return super().__new__(cls)

    def __init__(
        self,
        words: list[str],
        *,
        env: Mapping[str, str],
        stdin: int,
        stdout: IO[bytes],
        stderr: int | IO[bytes],
        cwd: str | os.PathLike[str] | None = None,
        start_new_session: bool = False,
    ) -> None:
        assert stdin in (PIPE, DEVNULL)
        read, write = os.pipe()
        self._standard_input = write if stdin == PIPE else -1
        said = stdout.fileno() if isinstance(stderr, int) else stderr.fileno()
        streams = [_Descriptor(each) for each in (read, stdout.fileno(), said)]
        place = (str(cwd or os.getcwd()), dict(env), start_new_session)
        self._process: Any = ranks._context.Process(target=_run, args=(words[2], words[3:], streams, *place))
        self._process.start()
        self.pid = self._process.pid
        os.close(read)
        if stdin == DEVNULL:
            os.close(write)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutExpired("a forked process", timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self) -> None:
        """Closes its standard input, and waits for its end."""
        if self._standard_input >= 0:
            os.close(self._standard_input)
            self._standard_input = -1
        self.wait()


class _Descriptor:
    """A file descriptor that goes to the forked process."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self) -> Any:
        return _detached, (reduction.DupFd(self._number),)


def _detached(duplicate: Any) -> int:
    return duplicate.detach()


def _run(
    module: str,
    arguments: list[str],
    streams: list[int],
    folder: str,
    environment: dict[str, str],
    new_session: bool,
) -> None:
    """Becomes that command."""
    if new_session:
        os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = os.fdopen(0, closefd=False)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)
