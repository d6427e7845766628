"""The ranks of one measurement: started, watched and ended. Loads no torch.

Ranks leave their result in a file and then stay until they are ended here, so that none closes a connection on which
another still waits. Whatever happens, no rank outlives :func:`measure`: a rank ends with its standard input, which
closes when this process is gone, or the ssh that it was started through (:func:`tlgc_mp.bench.ranks.worker.main`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeVar, cast

from tlgc_mp.host import free_port
from tlgc_mp.json_types import JsonObject

T = TypeVar("T")
"""What a rank measures, as JSON holds it."""
POLL_SECONDS = 0.05
SSH = ("ssh", "-o", "BatchMode=yes")
FORWARDED = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "DS_", "GLOO_", "NCCL_", "TORCH_")
"""What begins the names of the variables that ranks started through ssh get of this process's."""


@dataclass(frozen=True)
class Place:
    """A host of ranks.

    Attributes:
        address: where the ranks of other hosts reach it.
        enter: the words that start a command there; none for this machine itself.
    """

    address: str = "127.0.0.1"
    enter: tuple[str, ...] = ()

    def command(self, words: list[str], variables: dict[str, str]) -> list[str]:
        """What runs ``words`` there with ``variables``, in this process's folder."""
        if self.enter[:1] != SSH[:1]:
            return [*self.enter, *words]
        kept = {name: value for name, value in os.environ.items() if name.startswith(FORWARDED)}
        assigned = [f"{name}={value}" for name, value in {**kept, **variables}.items()]
        return [*self.enter, shlex.join(["env", "-C", os.getcwd(), *assigned, *words])]


@dataclass(frozen=True)
class Request(Generic[T]):
    """What ranks are to measure. Fields hold what JSON does.

    Attributes:
        measured_by: what measures it on a rank, as module:function; it is given the request and the rank's device.
    """

    measured_by: ClassVar[str]


HERE = (Place(),)


def places(hosts: Sequence[str]) -> tuple[Place, ...]:
    """Hosts that are reached through ssh, and see this process's folder; this machine where none is named."""
    return tuple(Place(host, (*SSH, host)) for host in hosts) or HERE


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What came of a measurement.

    Attributes:
        ranks: what each rank measured, by rank; empty where the measurement failed.
        error: why it failed, in one line.
        out_of_memory: whether that was for want of memory.
    """

    ranks: list[T] = field(default_factory=list)
    error: str | None = None
    out_of_memory: bool = False


def measure(
    request: Request[T],
    ranks: int,
    time_limit: float,
    places: Sequence[Place] = HERE,
    shared_folder: str | None = None,
) -> Outcome[T]:
    """Has ``ranks`` new processes measure what ``request`` asks for.

    Each has one thread and is pinned to one core, rank r to core r modulo the number of cores.

    Args:
        time_limit: seconds until all are killed.
        places: among which the ranks are divided evenly, consecutive ones to each.
        shared_folder: one that all places see, for what the ranks leave; this machine's own for such things if None.
    """
    local = ranks // len(places)
    environment = {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(local),
        "LOCAL_SIZE": str(local),
        "MASTER_ADDR": places[0].address,
        "MASTER_PORT": str(free_port()),
    }
    with tempfile.TemporaryDirectory(prefix="tlgc-bench-", dir=shared_folder) as folder:
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(ranks):
                variables = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank % local)}
                worker = [
                    sys.executable,
                    "-m",
                    "tlgc_mp.bench.ranks.worker",
                    f"{type(request).__module__}:{type(request).__name__}",
                    json.dumps(dataclasses.asdict(request)),
                    _result(folder, rank),
                ]
                with open(_log(folder, rank), "wb") as log:
                    processes.append(
                        subprocess.Popen(
                            places[rank // local].command(worker, variables),
                            env={**os.environ, **variables},
                            stdin=subprocess.PIPE,
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            start_new_session=True,  # Ctrl-C is answered here
                        )
                    )
            return cast("Outcome[T]", _watch(processes, folder, time_limit))
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.communicate()


def _log(folder: str, rank: int) -> str:
    return os.path.join(folder, f"rank-{rank}.log")


def _result(folder: str, rank: int) -> str:
    return os.path.abspath(os.path.join(folder, f"rank-{rank}.json"))


def _watch(processes: list[subprocess.Popen[bytes]], folder: str, time_limit: float) -> Outcome[JsonObject]:
    """Waits until every rank has left a result, one has failed, or the time is up."""
    deadline = time.monotonic() + time_limit
    results: dict[int, JsonObject] = {}
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


def _lost(rank: int, status: int, log: str) -> Outcome[JsonObject]:
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
