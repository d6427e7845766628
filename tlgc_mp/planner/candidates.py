"""One way to lay a training step over ranks, and all of them in order."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from tlgc_mp.json_types import JsonObject
from tlgc_mp.planner.devices import Device, Network
from tlgc_mp.planner.holdings import Memory, Share
from tlgc_mp.planner.traffic import Collective


@dataclass(frozen=True)
class Candidate:
    """One way to train, and what is expected of a rank of it.

    Attributes:
        groups: N, where the model was given by name.
        tensor_parallel, data_parallel: P and D.
        micro_batch: samples of a replica at once; ``accumulation`` of them make a step.
        checkpointing: whether blocks keep only their input for backward.
        seconds: of a step, by part.
        limit: bytes of memory that a rank has.
        fixed: bytes of them that a process takes before it holds a tensor.
        samples: of a step.
    """

    groups: int | None
    tensor_parallel: int
    data_parallel: int
    share: Share
    micro_batch: int
    accumulation: int
    checkpointing: bool
    memory: Memory
    collectives: list[Collective]
    seconds: dict[str, float]
    limit: float
    fixed: float
    samples: int

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.step_seconds

    @property
    def needed(self) -> float:
        """Bytes of a rank at its peak, the process's fixed part included."""
        return self.memory.total + self.fixed

    @property
    def fits(self) -> bool:
        return self.needed <= self.limit

    @property
    def bytes_sent(self) -> float:
        """Of a rank in a step."""
        return sum(each.sent for each in self.collectives)

    def to_dict(self) -> dict[str, object]:
        """As JSON holds it."""
        return {
            "groups": self.groups,
            "tensor_parallel": self.tensor_parallel,
            "data_parallel": self.data_parallel,
            "zero_stage": self.share.stage,
            "offload_optimizer": self.share.offload,
            "micro_batch": self.micro_batch,
            "accumulation": self.accumulation,
            "activation_checkpointing": self.checkpointing,
            "fits": self.fits,
            "needed_bytes": self.needed,
            "memory": self.memory.to_dict(),
            "collectives": [each.to_dict() for each in self.collectives],
            "bytes_sent": self.bytes_sent,
            "seconds": self.seconds,
            "step_seconds": self.step_seconds,
            "samples_per_second": self.samples_per_second,
        }


@dataclass(frozen=True)
class Plan:
    """Every candidate, those that fit first, the fastest first; of those that do not, the smallest first.

    Attributes:
        device: of a rank.
        network: that joins hosts.
        dtype: of parameters and activations.
        candidates: in that order.
    """

    device: Device
    network: Network
    dtype: str
    candidates: list[Candidate] = field(repr=False)

    @property
    def best(self) -> Candidate | None:
        """The fastest that fits, if any does."""
        return self.candidates[0] if self.candidates and self.candidates[0].fits else None

    def config(self, candidate: Candidate) -> JsonObject:
        """The DeepSpeed configuration of a candidate."""
        found: JsonObject = {
            "train_batch_size": candidate.samples,
            "train_micro_batch_size_per_gpu": candidate.micro_batch,
            "gradient_accumulation_steps": candidate.accumulation,
            "zero_optimization": candidate.share.settings(),
        }
        if candidate.tensor_parallel > 1:
            found["tensor_parallel"] = {"autotp_size": candidate.tensor_parallel}
        if self.dtype == "bf16":
            found["bf16"] = {"enabled": True}
        return found

    def to_dict(self) -> dict[str, object]:
        """As JSON holds it."""
        best = self.best
        return {
            "device": asdict(self.device),
            "network": asdict(self.network),
            "dtype": self.dtype,
            "best": None if best is None else {**best.to_dict(), "deepspeed_config": self.config(best)},
            "candidates": [candidate.to_dict() for candidate in self.candidates],
        }

    def __str__(self) -> str:
        from tlgc_mp.planner.report import describe

        return describe(self)
