"""The data worker processes of a rank, as its watchdog sees them."""

from __future__ import annotations

import signal

from tlgc_mp.data.loaders import started_workers


class Workers:
    """Those that are started from now on."""

    def __init__(self) -> None:
        self._first = len(started_workers)  # those before are of earlier runs in this process
        self._needed = True

    def may_end(self) -> None:
        """To be called when no batch is needed any more."""
        self._needed = False

    def dead(self) -> str | None:
        """What has become of one that is needed and gone."""
        if self._needed:
            for process in started_workers[self._first :]:
                if not process.is_alive():
                    return f"data worker process {process.pid} {_ending(process.exitcode)}"
        return None


def _ending(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"has ended with status {exit_code}"
    return f"was killed by {signal.Signals(-exit_code).name}"
