"""Networks that others wrote, and one that holds whatever a network may hold, with engines of them that train.

float32, and so without ReLUs: SiLU stands for each.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parallel.common import SEED, batches, smooth_activations
from tlgc_mp import convert
from tlgc_mp.engine import initialize
from tlgc_mp.parallel.topology import Topology

BATCH, SIDE = 8, 32


class Adapter(nn.Module):
    """A module of a user's own, as in LoRA: what it calls its rank is no rank of a process."""

    def __init__(self, channels: int, rank: int) -> None:
        super().__init__()
        self.rank, self.world_size = rank, 2.0
        self.down = nn.Parameter(torch.randn(rank, channels) / 4)
        self.up = nn.Parameter(torch.randn(channels, rank) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.einsum("oi,bihw->bohw", self.up @ self.down, x) * self.world_size / self.rank


class Counting(nn.Module):
    """Keeps a number in its extra state, and has it change the output."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": self.seen}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]

    def forward(self, x: Tensor) -> Tensor:
        self.seen += self.training
        return x * (1 + 0.1 * self.seen)


class Scaled(torch.autograd.Function):
    """Multiplies by a parameter, and adds its gradient up by itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        return grads[0] * scale, (grads[0] * x).sum((0, 2, 3)).view(scale.shape)


class Odd(nn.Module):
    """Tied weights, layers under two names, parameters of the model itself, of shape (), changing buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first, self.second = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm2d(16)
        self.same_norm, self.same_stem = self.norm, self.stem
        self.adapter, self.counting = Adapter(16, 4), Counting()
        self.gain, self.shift = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.zeros(1, 16, 1, 1))
        self.scale = nn.Parameter(torch.linspace(1.0, 1.5, 16).view(1, 16, 1, 1))
        self.frozen = nn.Parameter(torch.linspace(0.5, 1.5, 16).view(16, 1, 1), requires_grad=False)
        self.register_buffer("decay", torch.tensor([1.0, 2.0]))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("fixed", torch.full((16, 1, 1), 1.5), persistent=False)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.decay.mul_(0.9)
            self.steps += 1
        x = F.silu(self.norm(self.stem(x)) * self.fixed * self.frozen)
        x = F.silu(self.second(F.silu(self.first(x)))) * self.gain
        x = self.counting(Scaled.apply(self.same_norm(self.adapter(x)), self.scale)) + self.shift
        return self.fc(x.mean((2, 3))) * self.decay[0]


class Normed(nn.Module):
    """Weights that are computed from others, as torch has done it for long: by hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.utils.spectral_norm(nn.Conv2d(3, 16, 3, padding=1))
        self.body = nn.utils.weight_norm(nn.Conv2d(16, 16, 1))
        self.fc = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(F.silu(self.stem(x))).mean((2, 3)))


class Seldom(nn.Module):
    """Has a layer that takes part in every other step, so that an optimizer counts fewer steps of it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.other = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.fc = nn.Linear(16, 10)
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += self.training
        x = F.silu(self.stem(x))
        return self.fc((self.other(x) if self.steps % 2 else x).mean((2, 3)))


class Joined(nn.Module):
    """Layers of several kinds after channels that were joined, and one that meets two joins in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.other = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.fitted = nn.BatchNorm2d(24)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.norms = nn.ModuleList([nn.GroupNorm(4, 24), nn.BatchNorm2d(24), nn.BatchNorm2d(40)])
        self.slopes = nn.PReLU(24)
        self.narrow, self.last = nn.Conv2d(24, 16, 1), nn.Conv2d(40, 8, 1)
        self.twice = nn.BatchNorm2d(24)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        other = self.other(x)
        joined = self.depthwise(self.fitted(torch.cat([x, other], 1)))
        joined = self.norms[0](self.slopes(self.norms[1](torch.cat([other, joined[:, :16]], 1))))
        joined = self.twice(torch.cat([other, x], 1)) + self.twice(torch.cat([x, other], 1)) + joined
        y = self.narrow(joined)
        return self.fc(F.silu(self.last(self.norms[2](torch.cat([y, joined], 1)))).mean((2, 3)))


OWN = {"odd": Odd, "normed": Normed, "seldom": Seldom, "joined": Joined}


def network(name: str) -> nn.Module:
    """One of :data:`OWN`, ``converted``, or a model of timm, with initial weights of :data:`SEED`."""
    torch.manual_seed(SEED)
    if name in OWN:
        return OWN[name]()
    if name == "converted":
        return convert(timm.create_model("test_resnet", num_classes=10), groups=4, init="from_dense")
    return timm.create_model(name, num_classes=10)


def sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9)


def engine_of(name: str, tensor_parallel: int, stage: int, optimizer: Any = sgd, **settings: Any) -> Any:
    """An engine of a network; at ZeRO 3 all parameters but the smallest are partitioned."""
    zero = {"stage": stage, **({"stage3_param_persistence_threshold": 40} if stage == 3 else {})}
    config = {
        "train_batch_size": BATCH,
        "tensor_parallel": {"autotp_size": tensor_parallel},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        **settings,
    }
    sample = torch.empty(2, 3, SIDE, SIDE, device="meta")
    return initialize(model=network(name), optimizer=optimizer, config=config, sample_inputs=sample)[0]


def train(engine: Any, steps: range) -> list[float]:
    """The losses of this replica in these steps of one and the same run."""
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    replicas = int(engine.dp_world_size)
    topology = Topology(world, rank, world // replicas)
    losses = []
    with smooth_activations():
        for images, labels in batches(steps.stop, BATCH, torch.float32, side=SIDE)[steps.start :]:
            part, part_labels = images.chunk(replicas)[topology.dp_rank], labels.chunk(replicas)[topology.dp_rank]
            loss = F.cross_entropy(engine(part).float(), part_labels)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Of a batch of its own, in evaluation."""
    training = model.training
    with smooth_activations():
        found = model.eval()(batches(1, 4, torch.float32, seed=SEED + 1, side=SIDE)[0][0])
    model.train(training)
    return found
