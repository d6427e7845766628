"""What the parallel tests share: the same data on every rank, the one-device oracle, and the whole of what is split."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.ranks import run_ranks
from tlgc_mp.models.names import TWO_LEVEL
from tlgc_mp.nn import TwoLevelConv2d, init_parameters
from tlgc_mp.parallel.layout import Layout
from tlgc_mp.parallel.sharded import ShardedLayer

SEED = 20260
"""Of every random input and initial weight here; assertions print it."""

Batch = tuple[Tensor, Tensor]
OptimizerFactory = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def run_ranks_once(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """:func:`run_ranks`, once for each set of arguments: later tests get what it returned, or raised, again."""
    outcome = _outcome(world, function, arguments)
    if isinstance(outcome, AssertionError):
        raise outcome
    return outcome


@functools.cache
def _outcome(world: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Any] | AssertionError:
    try:
        return run_ranks(world, function, *arguments, timeout=200.0)
    except AssertionError as error:
        return error


def batches(count: int, size: int, dtype: torch.dtype, seed: int = SEED, side: int = 8) -> list[Batch]:
    """``count`` batches of ``size`` images, ``side`` x ``side``, in 10 classes; the same wherever it is called."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 3, side, side, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(0, 10, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def coarse_from_the_first(conv: str) -> dict[str, Any]:
    """Arguments of ``create_model`` with which a coarse level has its part in the very first output."""
    return {"coarse_init": "he"} if conv in TWO_LEVEL else {}


def seeded_model(conv: str, groups: int, dtype: torch.dtype, device: str, seed: int = SEED) -> nn.Module:
    """WRN-10-2 with the initial weights of ``seed``, or on the meta device about to get them."""
    from tlgc_mp import create_model

    torch.manual_seed(seed)
    return create_model("wrn-10-2", conv=conv, groups=groups, device=device, **coarse_from_the_first(conv)).to(dtype)


@contextlib.contextmanager
def smooth_activations() -> Iterator[None]:
    """Computes SiLU wherever a network asks for ReLU.

    At the kink of a ReLU rounding turns a gradient on or off. In float32 that happens now and then, on one processor
    and not on another, so that gradients in float32 are compared without ReLUs.
    """

    def relu(x: Tensor, inplace: bool = False) -> Tensor:
        return F.silu(x)

    with mock.patch.object(F, "relu", relu):
        yield


class SmoothBlock(nn.Sequential):
    """A part of :func:`smooth_network`, for activation checkpointing."""


def smooth_network(device: str, **dial: Any) -> nn.Module:
    """A stem, three two-level layers and a head, with the initial weights of :data:`SEED` or about to get them.

    Rounding moves its gradients by as little: it has no ReLU.

    Args:
        dial: ``coarse_channels`` and ``coarse_sum`` of the two-level layers.
    """
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.SiLU(),
            SmoothBlock(
                TwoLevelConv2d(16, 32, 3, padding=1, stride=2, groups=4, coarse_init="he", **dial),
                nn.BatchNorm2d(32),
                nn.SiLU(),
            ),
            SmoothBlock(
                TwoLevelConv2d(
                    32, 32, 3, padding=1, groups=4, bias=True, coarse_kernel_size=1, coarse_init="he", **dial
                ),
                nn.SiLU(),
            ),
            SmoothBlock(TwoLevelConv2d(32, 64, 1, groups=4, coarse_init="he", **dial), nn.BatchNorm2d(64), nn.SiLU()),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )
    if device != "meta":
        init_parameters(model.to_empty(device=device), SEED)
    return model


def assert_trained(run: TrainingRun) -> None:
    """Fails unless training moved the head of :func:`smooth_network` by a thousandth or more."""
    moved = relative_error(run.states[0]["8.weight"], smooth_network("cpu").state_dict()["8.weight"])
    assert moved > 1e-3, f"nothing was trained: the head moved by {moved:.1e}"


def sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=5e-4)


def gather_shares(share: Tensor, layout: Layout, group: dist.ProcessGroup) -> Tensor:
    """The whole of which each rank of ``group`` holds its share."""
    shares = [torch.empty_like(share, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shares, share.contiguous(), group=group)
    segments = layout.segments or (share.shape[layout.dim] * len(shares),)
    pieces = [one.split([segment // len(shares) for segment in segments], layout.dim) for one in shares]
    return torch.cat([own[at] for at in range(len(segments)) for own in pieces], layout.dim)


def gather_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Parameter name -> its whole gradient, on every rank."""
    gradients: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        for key, param in module.named_parameters(recurse=False):
            assert param.grad is not None, f"{name}.{key} has no gradient"
            grad = param.grad
            if isinstance(module, ShardedLayer) and key in module.tlgc_placement.dims:
                grad = gather_shares(grad, module.tlgc_placement.layout(key), module.tlgc_region.tp_ranks.group)
            gradients[f"{name}.{key}"] = grad
    return gradients


def relative_error(actual: Tensor, expected: Tensor, least: float = 1e-30) -> float:
    """Largest difference, in units of the largest expected value, or of ``least`` where that is smaller."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    difference = (actual.double() - expected.double()).abs().max()
    return (difference / expected.double().abs().max().clamp_min(least)).item()


def assert_close(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float, least: float = 1e-30
) -> None:
    """Fails unless the names are the same and each tensor is within ``tolerance`` of the expected one, relatively to
    its largest value or to ``least``."""
    assert set(actual) == set(expected)
    errors = {name: relative_error(actual[name], expected[name], least) for name in expected}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= tolerance, f"{worst} is off by {errors[worst]:.2e}, more than {tolerance:.0e} (seed {SEED})"


def assert_gradients_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    """:func:`assert_close` of all gradients of a network.

    Some are zero but for rounding, as a bias's before a BatchNorm: how large they come out is the processor's. So one
    of less than 1e-4 of the network's largest is compared to that much.
    """
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert_close(actual, expected, tolerance, 1e-4 * largest)


@dataclass
class TrainingRun:
    """What a training run left behind, of one device or of one rank.

    Attributes:
        losses: by replica (a rank has one, its own), of every micro-batch in the order of training.
        norms: the gradient norm of every step, where it was measured.
        states: by replica, the whole model's state: the same parameters, its own BatchNorm statistics.
    """

    losses: list[list[float]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    states: list[dict[str, Tensor]] = field(default_factory=list)


def train_one_device(
    model: nn.Module,
    data: list[Batch],
    optimizer_factory: OptimizerFactory,
    *,
    replicas: int = 1,
    accumulation: int = 1,
    clip: float = float("inf"),
) -> TrainingRun:
    """Trains the whole ``model`` as ``replicas`` x ``accumulation`` micro-batches of each batch would be trained.

    Under data parallelism BatchNorm normalizes over each micro-batch of a replica alone. So the micro-batches go
    through the model one after the other, each replica with running statistics of its own, and their losses are
    averaged. What is dropped is drawn from :data:`SEED`.
    """
    torch.manual_seed(SEED)
    run = TrainingRun(losses=[[] for _ in range(replicas)])
    statistics = [{name: buffer.clone() for name, buffer in model.named_buffers()} for _ in range(replicas)]
    optimizer = optimizer_factory(model.parameters())
    for images, labels in data:
        optimizer.zero_grad()
        parts = zip(images.chunk(replicas * accumulation), labels.chunk(replicas * accumulation), strict=True)
        for index, (part, part_labels) in enumerate(parts):
            replica = index % replicas
            logits = torch.func.functional_call(model, statistics[replica], (part,))
            loss = F.cross_entropy(logits, part_labels)
            (loss / (replicas * accumulation)).backward()
            run.losses[replica].append(loss.item())
        run.norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        optimizer.step()
    run.states = [{**model.state_dict(), **statistics[replica]} for replica in range(replicas)]
    return run
