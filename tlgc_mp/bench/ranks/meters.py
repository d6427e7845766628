"""Clocks and meters of one rank: time and bytes in collectives and on the network, activations, memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tlgc_mp.bench.settings import Calls
from tlgc_mp.engine.recompute import CheckpointFunction

P = ParamSpec("P")
T = TypeVar("T")
_COLLECTIVES = {
    "all_reduce": ("allreduce", "allreduce_coalesced"),
    "all_gather": (
        "allgather",
        "_allgather_base",
        "all_gather_single",
        "allgather_coalesced",
        "all_gather_single_coalesced",
        "allgather_into_tensor_coalesced",
    ),
    "reduce_scatter": (
        "reduce_scatter",
        "_reduce_scatter_base",
        "reduce_scatter_single",
        "reduce_scatter_single_coalesced",
        "reduce_scatter_tensor_coalesced",
    ),
    "all_to_all": ("alltoall", "alltoall_base", "all_to_all_single"),
    "broadcast": ("broadcast",),
    "reduce": ("reduce",),
    "gather": ("gather", "gather_single"),
    "scatter": ("scatter",),
    "send": ("send",),
    "receive": ("recv", "recv_anysource"),
    "barrier": ("barrier",),
}
"""Kind -> the methods of a process group that carry it out, in any release of torch."""


@dataclass
class Traffic:
    """Of one kind of collective in one process group.

    Attributes:
        calls: how many were issued.
        seconds: in which the calling thread issued them or waited for them, the other ranks being late included.
        bytes: the larger of what goes in and what comes out on this rank; none where it is alone in the group.
    """

    calls: int = 0
    seconds: float = 0.0
    bytes: int = 0


class CollectiveClock:
    """Times every collective, send and receive that this thread issues through ``torch.distributed`` while entered.

    It sits at the process groups themselves, which every Python function ends up at, DeepSpeed's included. Of one that
    runs beside the computation, the time to issue it and the time in its ``wait()`` count.

    Attributes:
        traffic: (kind, name of the process group) -> its traffic.
    """

    def __init__(self) -> None:
        self.traffic: dict[tuple[str, str], Traffic] = {}
        self._replaced: list[tuple[type, str, object]] = []
        # Holds each unfinished collective, so that its id stays its own.
        self._running: dict[int, tuple[object, Traffic]] = {}

    def __enter__(self) -> CollectiveClock:
        for kind, methods in _COLLECTIVES.items():
            for method in methods:
                if method in vars(dist.ProcessGroup):
                    self._replace(dist.ProcessGroup, method, self._timed(getattr(dist.ProcessGroup, method), kind))
        self._replace(dist.Work, "wait", self._waited(dist.Work.wait))
        return self

    def __exit__(self, *error: object) -> None:
        for owner, name, original in self._replaced:
            setattr(owner, name, original)
        self._running.clear()

    def _replace(self, owner: type, name: str, replacement: object) -> None:
        # As it lies in the class: what getattr() finds would not bind to its object when it is put back.
        self._replaced.append((owner, name, vars(owner)[name]))
        setattr(owner, name, replacement)

    def _timed(self, original: Callable[Concatenate[dist.ProcessGroup, P], T], kind: str) -> Callable[..., T]:
        def method(group: dist.ProcessGroup, *args: P.args, **kwargs: P.kwargs) -> T:
            traffic = self.traffic.setdefault((kind, group.group_name), Traffic())
            began = time.perf_counter()
            work = original(group, *args, **kwargs)
            traffic.seconds += time.perf_counter() - began
            traffic.calls += 1
            if group.size() > 1:
                traffic.bytes += max((_tensor_bytes(arg) for arg in (*args, *kwargs.values())), default=0)
            self._running[id(work)] = (work, traffic)
            return work

        return method

    def _waited(self, original: Callable[Concatenate[dist.Work, P], T]) -> Callable[..., T]:
        def wait(work: dist.Work, *args: P.args, **kwargs: P.kwargs) -> T:
            began = time.perf_counter()
            done = original(work, *args, **kwargs)
            _, traffic = self._running.pop(id(work), (None, None))
            if traffic is not None:
                traffic.seconds += time.perf_counter() - began
            return done

        return wait

    def seconds(self, kinds: tuple[str, ...] | None = None, groups: frozenset[str] | None = None) -> float:
        """Of all kinds and process groups, or of those named."""
        return sum(
            traffic.seconds
            for (kind, group), traffic in self.traffic.items()
            if (kinds is None or kind in kinds) and (groups is None or group in groups)
        )

    def by_kind(self) -> dict[str, Calls]:
        """Kind -> its calls, over all process groups."""
        kinds: dict[str, Calls] = {}
        for (kind, _), traffic in self.traffic.items():
            total = kinds.setdefault(kind, {"calls": 0, "seconds": 0.0, "bytes": 0})
            total["calls"] += traffic.calls
            total["seconds"] += traffic.seconds
            total["bytes"] += traffic.bytes
        return kinds


def _tensor_bytes(value: object) -> int:
    """Of a tensor, or of all tensors in a list of them, nested or not."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, list | tuple):
        return sum(_tensor_bytes(item) for item in value)
    return 0


class SavedActivations:
    """Measures what a forward pass keeps for backward while entered, parameters excepted: what autograd saves, and what
    DeepSpeed's activation checkpointing keeps out of its sight.

    Attributes:
        peak_bytes: the most that was kept at any time. Tensors that share a storage count once.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.peak_bytes = 0
        self._bytes = 0
        self._parameters = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._holders: dict[int, int] = {}  # address of a storage -> how many saved tensors lie in it
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def __enter__(self) -> SavedActivations:
        self._hooks.__enter__()
        self._checkpoint = CheckpointFunction.forward
        CheckpointFunction.forward = staticmethod(self._counted(self._checkpoint))
        return self

    def __exit__(self, *error: object) -> None:
        CheckpointFunction.forward = staticmethod(self._checkpoint)
        self._hooks.__exit__(*error)

    def _counted(self, forward: Callable[Concatenate[_Checkpoint, P], T]) -> Callable[..., T]:
        """DeepSpeed's ``forward``, the inputs that it keeps counted for as long as it does."""

        def counted(ctx: _Checkpoint, *args: P.args, **kwargs: P.kwargs) -> T:
            outputs = forward(ctx, *args, **kwargs)
            inputs = ctx.deepspeed_saved_tensors = _Inputs(ctx.deepspeed_saved_tensors)
            inputs.packed = [self._pack(tensor) for tensor in inputs]
            return outputs

        return counted

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        storage = tensor.untyped_storage()
        if isinstance(tensor, nn.Parameter) or storage.data_ptr() in self._parameters:
            # ZeRO 3 puts the values of a parameter elsewhere before backward: only the parameter itself finds them.
            return tensor
        return _Saved(tensor.detach(), self._hold(storage))

    def _hold(self, storage: torch.UntypedStorage) -> Callable[[], None]:
        """Counts ``storage``; the function returned takes it out again."""
        address, size = storage.data_ptr(), storage.nbytes()

        def release() -> None:
            self._holders[address] -= 1
            if not self._holders[address]:
                del self._holders[address]
                self._bytes -= size

        if address not in self._holders:
            self._holders[address] = 0
            self._bytes += size
            self.peak_bytes = max(self.peak_bytes, self._bytes)
        self._holders[address] += 1
        return release

    @staticmethod
    def _unpack(saved: Tensor | _Saved) -> Tensor:
        return saved.tensor if isinstance(saved, _Saved) else saved


class _Checkpoint(Protocol):
    """What DeepSpeed keeps a block's inputs in."""

    deepspeed_saved_tensors: tuple[Tensor, ...]


class _Inputs(tuple[Tensor, ...]):
    """The inputs of a block under activation checkpointing, and what counts them."""

    packed: list[Tensor | _Saved]


class _Saved:
    """A tensor kept for backward; autograd drops it when it is done with it."""

    def __init__(self, tensor: Tensor, release: Callable[[], None]) -> None:
        self.tensor, self.release = tensor, release

    def __del__(self) -> None:
        self.release()


@contextmanager
def before_first_optimizer_step(measure: Callable[[], None]) -> Iterator[None]:
    """Calls ``measure`` once, when all gradients are there: as the first optimizer of a step is about to take it."""
    pending = [measure]

    def hook(*_: object) -> None:
        if pending:
            pending.pop()()

    handle = register_optimizer_step_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def network_bytes() -> int:
    """Sent so far through this host's network, by any process of it, headers included; loopback does not count."""
    return sum(each.bytes_sent for name, each in psutil.net_io_counters(pernic=True).items() if name != "lo")


def reset_peak_memory(device: torch.device) -> None:
    """What :func:`peak_memory_bytes` tells is from here on."""
    if device.type != "cpu":
        from deepspeed.accelerator import get_accelerator

        get_accelerator().reset_peak_memory_stats()
        return
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return  # then the peak is that of the whole process, its imports included


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has had: on an accelerator in tensors, on the CPU in all (code and imports
    included, half a gigabyte)."""
    if device.type != "cpu":
        from deepspeed.accelerator import get_accelerator

        return int(get_accelerator().max_memory_allocated())
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
