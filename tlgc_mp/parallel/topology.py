"""Who is who among P x D ranks.

World = P x D: P tensor-parallel ranks, consecutive so that they share a node, times D data-parallel replicas. Needs
neither torch nor a process group, so a launch that cannot work is refused before anything is loaded.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from tlgc_mp.errors import UsageError, divisors, is_count, one_of

LARGEST_WORLD = 1_000_000


@dataclass(frozen=True)
class Topology:
    """One rank's place.

    Attributes:
        world: P x D.
        rank: this rank, 0 to world - 1.
        tensor_parallel: P.
    """

    world: int
    rank: int
    tensor_parallel: int

    def __post_init__(self) -> None:
        if not is_count(self.tensor_parallel) or self.world % self.tensor_parallel:
            raise UsageError(
                f"tensor_parallel must be a divisor of the {self.world} ranks started (P x D is the world size), got "
                f"{self.tensor_parallel}; use {one_of(divisors(self.world))}"
            )

    @property
    def data_parallel(self) -> int:
        """D, the number of replicas."""
        return self.world // self.tensor_parallel

    @property
    def tp_rank(self) -> int:
        """Which share of the model this rank holds."""
        return self.rank % self.tensor_parallel

    @property
    def dp_rank(self) -> int:
        """Which replica, and so which share of a batch, this rank works on."""
        return self.rank // self.tensor_parallel


def default_tensor_parallel(world: int, local_world: int, conv: str, groups: int) -> int:
    """P where nothing says: as many ranks of a host as evenly share the groups, the rest being replicas.

    The groups of ``flgc`` cannot be shared, so all its ranks are replicas.
    """
    return 1 if conv == "flgc" else math.gcd(world, local_world, groups)


def across_hosts(topology: Topology, hosts: list[str]) -> str:
    """Where the replicas lie, in words, for ranks on ``hosts``; nothing where there is one host."""
    ranks = topology.tensor_parallel
    places = [set(hosts[first : first + ranks]) for first in range(0, topology.world, ranks)]
    crossing = sum(len(place) > 1 for place in places)
    count = len(set(hosts))
    if count == 1:
        return ""
    if crossing == 0:
        return f", on {count} hosts, {'each replica on one of them' if ranks > 1 else 'replicas only'}"
    fits = min(hosts.count(host) for host in set(hosts))
    mend = "start the ranks host by host (mpirun --map-by slot)" if ranks <= fits else f"--tp {fits} keeps them on one"
    return (
        f", on {count} hosts; the tensor-parallel ranks of {crossing} replica(s) lie on several, and every layer's "
        f"exchange crosses the network: {mend}"
    )


@dataclass(frozen=True)
class Launch:
    """What the launcher told this process: ``world`` ranks, this one's ``rank``, and its ``local_rank`` on its node
    of ``local_world`` ranks; and the address and port where they meet, where the launcher leaves that to its ranks."""

    world: int = 1
    rank: int = 0
    local_rank: int = 0
    local_world: int = 1
    meeting: tuple[str, int] | None = None

    @staticmethod
    def detect(environ: Mapping[str, str] | None = None) -> Launch:
        """Reads the variables of ``deepspeed`` and ``torchrun``, else those of Open MPI or of an MPI with PMI, else
        those of a step that ``srun`` started; one plain process where there are none."""
        env = os.environ if environ is None else environ
        for world, rank, local_rank, local_world in (
            ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
            (
                "OMPI_COMM_WORLD_SIZE",
                "OMPI_COMM_WORLD_RANK",
                "OMPI_COMM_WORLD_LOCAL_RANK",
                "OMPI_COMM_WORLD_LOCAL_SIZE",
            ),
            ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
        ):
            if world in env and rank in env:
                size = _from_launcher(env, world, 1, LARGEST_WORLD)
                index = _from_launcher(env, rank, 0, size - 1)
                local = local_world if local_world in env else "LOCAL_SIZE"
                return Launch(
                    size,
                    index,
                    _from_launcher(env, local_rank, 0, size - 1) if local_rank in env else index,
                    _from_launcher(env, local, 1, size) if local in env else size,
                )
        if "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:
            return _from_slurm(env)
        return Launch()


def _from_slurm(env: Mapping[str, str]) -> Launch:
    """One task of a step; in the shell of a batch job no step's variables are set."""
    world = _from_launcher(env, "SLURM_STEP_NUM_TASKS", 1, LARGEST_WORLD)
    if world == 1:
        return Launch()
    rank = _from_launcher(env, "SLURM_PROCID", 0, world - 1)
    local_rank = _from_launcher(env, "SLURM_LOCALID", 0, world - 1) if "SLURM_LOCALID" in env else rank
    counted = next((name for name in ("SLURM_STEP_NUM_NODES", "SLURM_NNODES") if name in env), None)
    nodes = 1 if counted is None else _from_launcher(env, counted, 1, world)
    # Rank 0 is on the first of the nodes, "gpu[07-09,12],cpu1" say.
    first = re.match(r"([^\[,]|\[[^\]]*\])+", env.get("SLURM_STEP_NODELIST", ""))
    if first is None and nodes > 1:
        raise UsageError(
            f"SLURM_STEP_NODELIST must name the nodes where {counted} is {nodes}, got none; start the ranks with srun, "
            "or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
        )
    host = "127.0.0.1" if first is None or nodes == 1 else re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])
    numbers = [int(env[name]) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID") if env.get(name, "").isdigit()]
    port = 20000 + sum(numbers) % 10000  # below the ports that systems give out by themselves
    return Launch(world, rank, local_rank, _tasks_of_node(env, world, nodes), (host, port))


def _tasks_of_node(env: Mapping[str, str], world: int, nodes: int) -> int:
    """How many tasks this node has: SLURM_STEP_TASKS_PER_NODE is "4(x2),3", say."""
    counts: list[int] = []
    for count, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * min(int(times or 1), nodes)
    node = env.get("SLURM_NODEID", "0")
    if node.isdigit() and int(node) < len(counts) and 1 <= counts[int(node)] <= world:
        return counts[int(node)]
    return -(-world // nodes)


def _from_launcher(env: Mapping[str, str], name: str, least: int, most: int) -> int:
    text = env[name].strip()
    if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
        raise UsageError(f"{name}, which the launcher sets, must be {least} to {most}, got {env[name]!r}")
    return int(text)
