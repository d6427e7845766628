"""The ranks of one measurement: started, watched and ended. Loads no torch.

Ranks leave their result in a file and then stay until they are ended here, so that none closes a connection on which
another still waits. Whatever happens, no rank outlives :func:`measure`; should this process be killed, the kernel ends
the ranks (:func:`tlgc_mp.bench.worker.main`).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

from tlgc_mp.parallel.engine import free_port

POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Outcome:
    """What came of a measurement.

    Attributes:
        ranks: what each rank measured, by rank; empty where the measurement failed.
        error: why it failed, in one line.
        out_of_memory: whether that was for want of memory.
    """

    ranks: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    out_of_memory: bool = False


def measure(request: dict[str, Any], ranks: int, time_limit: float) -> Outcome:
    """Runs the measurement that ``request`` describes on ``ranks`` new processes.

    Each has one thread and is pinned to one core, rank r to core r modulo the number of cores.

    Args:
        request: what :func:`tlgc_mp.bench.worker.run` takes.
        time_limit: seconds until all are killed.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    with tempfile.TemporaryDirectory(prefix="tlgc-bench-") as folder:
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(ranks):
                with open(_log(folder, rank), "wb") as log:
                    processes.append(
                        subprocess.Popen(
                            [sys.executable, "-m", "tlgc_mp.bench.worker", json.dumps(request), _result(folder, rank)],
                            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                            stdin=subprocess.DEVNULL,
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            start_new_session=True,  # Ctrl-C is answered here
                        )
                    )
            return _watch(processes, folder, time_limit)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.wait()


def _log(folder: str, rank: int) -> str:
    return os.path.join(folder, f"rank-{rank}.log")


def _result(folder: str, rank: int) -> str:
    return os.path.join(folder, f"rank-{rank}.json")


def _watch(processes: list[subprocess.Popen[bytes]], folder: str, time_limit: float) -> Outcome:
    """Waits until every rank has left a result, one has failed, or the time is up."""
    deadline = time.monotonic() + time_limit
    results: dict[int, dict[str, Any]] = {}
    while len(results) < len(processes):
        for rank, process in enumerate(processes):
            if rank in results:
                continue
            ended = process.poll() is not None  # asked before looking for what it may have left
            if os.path.exists(_result(folder, rank)):
                with open(_result(folder, rank), encoding="utf-8") as file:
                    result = json.load(file)
                if "error" in result:
                    return Outcome(error=f"rank {rank}: {result['error']}", out_of_memory=result["out_of_memory"])
                results[rank] = result
            elif ended:
                return _lost(rank, process.returncode, _log(folder, rank))
        if time.monotonic() > deadline:
            missing = ", ".join(str(rank) for rank in range(len(processes)) if rank not in results)
            return Outcome(error=f"rank {missing}: no result within {time_limit:.0f} s")
        time.sleep(POLL_SECONDS)
    return Outcome([results[rank] for rank in range(len(processes))])


def _lost(rank: int, status: int, log: str) -> Outcome:
    """A rank that ended without a result."""
    if status < 0:
        # The kernel kills with SIGKILL what takes too much memory; nobody else here does.
        out_of_memory = -status == signal.SIGKILL
        cause = ", for want of memory most likely" if out_of_memory else ""
        return Outcome(
            error=f"rank {rank}: killed by {signal.Signals(-status).name}{cause}", out_of_memory=out_of_memory
        )
    with open(log, encoding="utf-8", errors="replace") as file:
        lines = [line.strip() for line in file if line.strip()]
    return Outcome(error=f"rank {rank}: ended with status {status}: {lines[-1] if lines else 'it said nothing'}")
