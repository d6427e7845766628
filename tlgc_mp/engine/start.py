"""Bringing up torch.distributed through DeepSpeed, under whichever launcher started this process."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

from tlgc_mp.engine.interface import GLOO_INTERFACE, gloo_interface
from tlgc_mp.engine.quiet import quiet_start
from tlgc_mp.errors import UsageError, check_installed
from tlgc_mp.host import free_port
from tlgc_mp.parallel.topology import Launch

SLOW_START_SECONDS = 3.0


def start_distributed(distributed_port: int = 29500) -> None:
    """Brings up torch.distributed through DeepSpeed, under whichever launcher started this process.

    ``deepspeed``, ``torchrun`` and ``srun`` say who is who in the environment; under ``mpirun`` DeepSpeed asks mpi4py;
    a plain process becomes a world of one. Says so on rank 0 when it takes long. When all is up already, it only takes
    this rank's accelerator, the one that DeepSpeed's engine is about to take.

    Raises:
        UsageError: this node has fewer accelerators than ranks, or it is not clear by which network it reaches others.
    """
    with quiet_start():
        import deepspeed
        import deepspeed.comm
        from deepspeed.accelerator import get_accelerator

        from tlgc_mp.engine.groups import forget_destroyed_groups, use_torchs_names

        forget_destroyed_groups()
        launch = Launch.detect()
        _take_device(launch.local_rank)
        if deepspeed.comm.is_initialized():
            use_torchs_names()
            return
        if launch.world == 1 and "MASTER_ADDR" not in os.environ:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        if launch.world == 1 or launch.meeting is not None or "RANK" in os.environ:
            known = [("RANK", launch.rank), ("WORLD_SIZE", launch.world), ("LOCAL_RANK", launch.local_rank)]
            if launch.meeting is not None:
                address, port = launch.meeting
                known += [("LOCAL_WORLD_SIZE", launch.local_world), ("MASTER_PORT", port)]
                os.environ.setdefault("MASTER_ADDR", address)
            for name, value in known:
                os.environ.setdefault(name, str(value))
        else:
            distributed_port = _port_over_mpi(distributed_port)
        if get_accelerator().device_name() == "cpu":
            _choose_interface(launch)
        with _announce_when_slow(launch.rank), _without_shared_memory_extension():
            deepspeed.init_distributed(
                dist_backend=get_accelerator().communication_backend_name(), distributed_port=distributed_port
            )
        use_torchs_names()


def barrier() -> None:
    """Returns when every rank of the world has called it."""
    import torch
    from deepspeed.accelerator import get_accelerator

    # NCCL would guess the device otherwise, and say so.
    own = [get_accelerator().current_device()] if torch.distributed.get_backend() == "nccl" else None
    torch.distributed.barrier(device_ids=own)


def _choose_interface(launch: Launch) -> None:
    """Has Gloo listen where other hosts reach it."""
    if launch.world > launch.local_world and GLOO_INTERFACE not in os.environ:
        interface = gloo_interface(os.environ.get("MASTER_ADDR"))
        if interface is not None:
            os.environ[GLOO_INTERFACE] = interface


def _take_device(local_rank: int) -> None:
    """Has this rank work on an accelerator of its own, before it allocates anything or talks to another rank."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return
    count = accelerator.device_count()
    if local_rank >= count:
        raise UsageError(
            f"local rank must be less than {count}, the number of {accelerator.device_name()} devices of this node, "
            "got "
            f"{local_rank}; start {count} rank(s) on it, or set DS_ACCELERATOR=cpu"
        )
    accelerator.set_device(local_rank)


@contextlib.contextmanager
def _without_shared_memory_extension() -> Iterator[None]:
    """Keeps DeepSpeed from loading its shared-memory all-reduce, which only inference on CPUs calls.

    Loading it compiles it on first use (half a minute, a C++ compiler); a process killed meanwhile leaves a lock on
    which every later start waits without end; and one killed later leaves its buffers in shared memory for good.
    """
    import deepspeed.ops

    known, name = deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm"
    before = known.get(name)
    known[name] = False
    try:
        yield
    finally:
        known[name] = before


@contextlib.contextmanager
def _announce_when_slow(rank: int) -> Iterator[None]:
    def say() -> None:
        print(
            "Starting DeepSpeed: waiting for all ranks, or for an extension to compile, once a machine ...",
            file=sys.stderr,
            flush=True,
        )

    timer = threading.Timer(SLOW_START_SECONDS, say)
    timer.daemon = True
    if rank == 0:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _port_over_mpi(default: int) -> int:
    """The port on which the ranks of an MPI job meet: MASTER_PORT where it is set, else one that is free on rank 0."""
    if "MASTER_PORT" in os.environ:
        return int(os.environ["MASTER_PORT"])
    check_installed("mpi4py", "mpi", "a launch by mpirun")
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    return int(world.bcast(free_port() if world.Get_rank() == 0 else default, root=0))
