"""What a rank gives to each collective of a step, over which link, and how long that takes in a ring."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from tlgc_mp.planner.devices import Device, Network
from tlgc_mp.planner.holdings import MASTER, REDUCED_AT_ONCE, Share, partition, sub_groups
from tlgc_mp.planner.trace import Trace

TENSOR_PARALLEL, REPLICAS = "tensor-parallel", "replicas"

_ALIGNED = 2
"""Elements to which stages 1 and 2 align each replica's partition."""
_NORM = {1: 4, 2: 4, 3: 8}
"""Stage -> bytes that ranks reduce, replicas and tensor-parallel ones, for the gradients' norm; in stage 3 of each
sub-group."""


@dataclass(frozen=True)
class Collective:
    """One kind of collective of a step.

    Attributes:
        name: as torch calls it, or as :mod:`tlgc_mp.parallel.collectives` does.
        ranks: among which: ``tensor-parallel`` or ``replicas``.
        size: how many of them.
        calls: in a step.
        given: bytes of what this rank puts in, over all calls; of a gather, its own part.
        link: ``host``, or ``network`` where it crosses hosts.
    """

    name: str
    ranks: str
    size: int
    calls: float
    given: float
    link: str

    @property
    def sent(self) -> float:
        """Bytes that this rank sends in a ring."""
        others = self.size - 1
        if self.name in ("all_gather", "coarse_gather"):
            return self.given * others
        return self.given * others / self.size * (2 if self.name in ("all_reduce", "sum_partials") else 1)

    def seconds(self, device: Device, network: Network, tensor_parallel: int) -> float:
        """How long the ring takes."""
        hops = (self.size - 1) * (2 if self.name in ("all_reduce", "sum_partials") else 1)
        if self.link == "host":
            return self.calls * hops * device.latency + self.sent / device.link
        # Rings of replicas leave a host side by side, one for each share that it holds.
        side_by_side = 1 if self.ranks == TENSOR_PARALLEL else min(tensor_parallel, network.ranks)
        return self.calls * hops * network.latency + self.sent * side_by_side / network.bandwidth

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "sent": self.sent}


def collectives(
    trace: Trace, share: Share, tensor_parallel: int, accumulation: int, network: Network
) -> list[Collective]:
    """Those of a step of ``accumulation`` micro-batches, of which ``trace`` is one."""
    found = []
    inside = "host" if tensor_parallel <= network.ranks else "network"
    of_pass = {
        name: (accumulation * calls, accumulation * given) for name, (calls, given) in trace.collectives().items()
    }
    if share.stage and tensor_parallel > 1:
        count, size = of_pass.get("all_reduce", (0, 0))
        norms = _norms(trace, share)
        of_pass["all_reduce"] = (count + norms, size + norms * _NORM[share.stage])
    for name, (count, size) in sorted(of_pass.items()):
        found.append(Collective(name, TENSOR_PARALLEL, tensor_parallel, count, float(size), inside))
    if share.replicas == 1:
        return found
    across = "host" if tensor_parallel * share.replicas <= network.ranks else "network"
    for name, calls, given in _of_replicas(trace, share, accumulation):
        found.append(Collective(name, REPLICAS, share.replicas, calls, given, across))
    return found


def _of_replicas(trace: Trace, share: Share, accumulation: int) -> list[tuple[str, float, float]]:
    """(name, calls, bytes given) of those that reduce gradients and gather parameters."""
    item, elements, replicas = trace.item, trace.parameters, share.replicas
    gradients = float(item * elements)
    if share.stage == 0:
        return [("all_reduce", -(-elements // (REDUCED_AT_ONCE + max(trace.sizes))), gradients)]
    if share.stage in (1, 2):
        times = accumulation if share.stage == 2 else 1
        buckets = times * _buckets(trace.sizes, share.bucket)
        aligned = -(-elements // (_ALIGNED * replicas)) * _ALIGNED
        return [
            ("all_reduce", buckets + 1, times * gradients + _NORM[share.stage]),
            ("all_gather", 1, float(item * aligned)),
        ]
    padded = float(item * sum(partition(size, replicas) for size in trace.sizes))
    again = float(item * sum(partition(size, replicas) for size in trace.again))
    return [
        ("reduce_scatter", accumulation * _buckets(trace.sizes, share.bucket), accumulation * padded * replicas),
        ("all_reduce", _norms(trace, share), float(_norms(trace, share) * _NORM[3])),
        (
            "all_gather",
            accumulation * (2 * trace.layers + trace.layers_again),
            accumulation * (2 * padded + again),
        ),
    ]


def _norms(trace: Trace, share: Share) -> int:
    """How often ranks add up what each has of the gradients' norm."""
    return len(sub_groups(trace.sizes, share)) if share.stage == 3 else 1


def _buckets(sizes: tuple[int, ...], bucket: int) -> int:
    """How many buckets gradients fill, of the last parameters first; one that is larger has one of its own."""
    count, filled = 0, 0
    for size in reversed(sizes):
        if filled and filled + size > bucket:
            count, filled = count + 1, 0
        filled += size
    return count + (filled > 0)


def host_seconds(trace: Trace, share: Share, device: Device) -> float:
    """Of a step, to carry gradients to the host's memory and parameters back, where the optimizer lies there."""
    return (MASTER + trace.item) * partition(trace.parameters, share.replicas) / device.host if share.offload else 0.0
