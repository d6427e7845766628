"""The processes of a job's ranks, as another rank sees them: who they are, and what the kernel tells of those on this
machine."""

from __future__ import annotations

import contextlib
import functools
import os
import select
import signal
import socket
from typing import NamedTuple

import psutil
import torch.distributed as dist


class Member(NamedTuple):
    """The process of a rank: its machine, that machine's name for people, and its number there."""

    machine: str
    host: str
    pid: int

    @staticmethod
    def own() -> Member:
        return Member(_machine(), socket.gethostname(), os.getpid())


class Members:
    """The processes of all ranks, once they have introduced themselves."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._known: list[Member] = []
        self.descriptors: dict[int, int] = {}
        """By rank, what the kernel tells the end of its process by; of the other ranks on this machine."""

    @property
    def known(self) -> bool:
        return bool(self._known)

    def introduce(self, members: list[Member]) -> None:
        self._known = members

    def open(self) -> None:
        """Fills :attr:`descriptors`."""
        for rank, member in enumerate(self._known):
            if rank != self._rank and member.machine == _machine():
                with contextlib.suppress(OSError):
                    self.descriptors[rank] = os.pidfd_open(member.pid)

    def close(self) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)
        self.descriptors = {}

    def has_ended(self, rank: int) -> bool:
        descriptor = self.descriptors.get(rank)
        return descriptor is not None and bool(select.select([descriptor], [], [], 0)[0])

    def kill(self, rank: int) -> None:
        """Kills a rank of this machine; does nothing about another."""
        if rank in self.descriptors:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self.descriptors[rank], signal.SIGKILL)

    def process(self, rank: int) -> str:
        """Which process a rank is, in words."""
        if not self._known:
            return "its process"
        return f"process {self._known[rank].pid} on {self._known[rank].host}"

    def silent_process(self, rank: int) -> str:
        """The same, and what the kernel says of it where it is on this machine and does not answer."""
        return self.process(rank) + self._state(rank)

    def _state(self, rank: int) -> str:
        if rank not in self.descriptors:
            return ""
        try:
            state = psutil.Process(self._known[rank].pid).status()
        except psutil.Error:
            return ""
        return {
            psutil.STATUS_STOPPED: " is stopped (SIGSTOP) and",
            psutil.STATUS_TRACING_STOP: " is stopped by a debugger and",
            psutil.STATUS_DISK_SLEEP: " waits for a disk and",
        }.get(state, "")


class Beats:
    """Which ranks have given no sign of life since this was made."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._first: dict[int, bytes] = {}
        self._still: set[int] = set()

    def look(self, store: dist.Store, world: int) -> None:
        """Reads everybody's ``beat/RANK``, and ``left/RANK`` of those that left in peace."""
        for rank in range(world):
            if rank != self._rank and store.check([f"beat/{rank}"]) and not store.check([f"left/{rank}"]):
                beat = store.get(f"beat/{rank}")
                if self._first.setdefault(rank, beat) == beat:
                    self._still.add(rank)
                else:
                    self._still.discard(rank)

    def silent(self) -> int | None:
        """The lowest rank whose beat has stayed what it was."""
        return min(self._still, default=None)


@functools.cache
def _machine() -> str:
    """What tells this machine, and this container's process numbers, from others."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
        with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
            parts.append(file.read().strip())
    return "/".join(parts)
