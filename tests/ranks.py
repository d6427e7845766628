"""Runs a function on several real ranks and brings back what each returned.

Ranks are forked from a server process that has imported torch, torchvision and deepspeed once and computed nothing, so
a test starts them in a fraction of a second and each is as good as new. A rank that fails fails the test with that
rank's traceback; a rank that hangs is killed at the time limit.

They run on the CPU, also where there is an accelerator; those that are asked to use it start from nothing.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as tlgc-mp has it, and read when torch is loaded
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "torch",
        "torchvision",
        "deepspeed",
        "deepspeed.runtime.zero.muon.original_muon",  # every ZeRO engine loads it, and with it torch's compiler
        "torch.distributed",
        "torch.utils.serialization.config",
        "torch.utils.tensorboard",
        # What an engine or a run loads when it is made, and the modules of tests at their head.
        *("deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.superoffload.superoffload_stage3"),
        *("numpy.ctypeslib", "setuptools", "yaml"),
        *("pytest", "timm"),
        *(f"tlgc_mp.{room}" for room in ("bench.ranks.launch", "engine", "models", "nn", "parallel", "planner")),
        *(f"tlgc_mp.{name}" for name in ("engine.initialization", "models.conversion", "nn.from_dense")),
        *(f"tlgc_mp.cli.{name}" for name in ("main", "bench", "plan", "train")),
        "tests.ranks",
    ]
)


def _rank_main(
    function: Any,
    arguments: tuple[Any, ...],
    rank: int,
    world: int,
    local_rank: int,
    own_accelerator: bool,
    port: int,
    rendezvous: str,
    pipe: Connection,
) -> None:
    import datetime

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(local_rank),
        LOCAL_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        backend = "gloo"
        if own_accelerator:
            from deepspeed.accelerator import get_accelerator

            get_accelerator().set_device(local_rank)
            backend = get_accelerator().communication_backend_name()
        dist.init_process_group(
            backend,
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=60),
        )
        result = io.BytesIO()
        torch.save(function(*arguments), result)
        pipe.send((True, result.getvalue()))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.close()


def run_ranks(
    world: int, function: Any, *arguments: Any, timeout: float = 120.0, on_accelerator: bool = False
) -> list[Any]:
    """``function(*arguments)`` on ``world`` ranks with torch.distributed up; what each returned, by rank.

    ``function`` is a module-level function; what it returns is saved as torch saves it. On accelerators the ranks talk
    through what DeepSpeed uses there (NCCL, say) where there are as many, and through Gloo where they share one.
    """
    context: Any = _context
    variables: dict[str, str] = {}
    one_each = False
    if on_accelerator:
        device = torch.accelerator.current_accelerator()
        assert device is not None
        context = multiprocessing.get_context("spawn")
        variables["DS_ACCELERATOR"] = device.type
        one_each = torch.accelerator.device_count() >= world
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world):
            receive, send = context.Pipe(duplex=False)
            rendezvous = os.path.join(folder, "rendezvous")
            local_rank = 0 if on_accelerator and not one_each else rank
            process = context.Process(
                target=_rank_main,
                args=(function, arguments, rank, world, local_rank, one_each, port, rendezvous, send),
                daemon=True,
            )
            with mock.patch.dict(os.environ, variables):
                process.start()
            send.close()
            pipes.append(receive)
            processes.append(process)
        results: dict[int, Any] = {}
        failures: list[str] = []
        deadline = time.monotonic() + timeout
        try:
            while len(results) < world and not failures:
                pending = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
                ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
                if not ready:
                    missing = [rank for rank in range(world) if rank not in results]
                    raise AssertionError(f"ranks {missing} gave no answer within {timeout:.0f} s")
                for pipe in ready:
                    rank = pipes.index(pipe)  # type: ignore[arg-type]
                    try:
                        fine, value = pipe.recv()  # type: ignore[union-attr]
                    except EOFError:
                        fine, value = False, "the process ended without an answer"
                    if fine:
                        results[rank] = torch.load(io.BytesIO(value), weights_only=False)
                    else:
                        failures.append(f"rank {rank} of {world}:\n{value}")
        finally:
            for process in processes:
                process.join(timeout=20.0 if not failures else 1.0)
                if process.is_alive():
                    process.kill()
                    process.join()
        if failures:
            raise AssertionError("\n".join(failures))
        return [results[rank] for rank in range(world)]
