"""No parameter crosses tensor-parallel ranks: every collective of a training step, its kind and its bytes.

Counted by a hook on each process group, below torch.distributed and DeepSpeed alike, and counted again by the
profiler's record of the same calls in another run, so that none is missed: torch 2.14 may crash where hook and profiler
meet in one send. Groups of one rank, such as D = 1 has for data parallelism, send nothing and are left out.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from tests.parallel.common import SEED, run_ranks_once, seeded_model
from tlgc_mp import create_model
from tlgc_mp.engine import initialize
from tlgc_mp.nn import BalancedConv2d, TwoLevelConv2d
from tlgc_mp.parallel import shard
from tlgc_mp.parallel.replicas import CHECK_BYTES

RANKS, GROUPS, CLASSES = 2, 4, 10
BATCH = 7
"""A factor of every activation's size and, in this network, of no parameter's share: a payload tells which it is."""

FLOAT = 4
CONFIGS: dict[str, dict[str, Any] | None] = {
    "torch.distributed": None,
    "engine, ZeRO 0": {"zero_optimization": {"stage": 0}},
    "engine, ZeRO 1": {"zero_optimization": {"stage": 1}},
}


class Collective(NamedTuple):
    """One collective that ran: its kind, and the bytes that a rank gave and got."""

    kind: str
    sent: int
    received: int


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Recorder:
    """Records what runs on every process group made before it."""

    def __init__(self) -> None:
        self.collectives: list[Collective] = []
        self.calls = 0
        for index, group in enumerate(dist.distributed_c10d._world.pg_map):
            group.register_pre_hook(index, self._hook(dist.get_world_size(group)))

    def _hook(self, ranks: int) -> Any:
        def record(call: Any) -> None:
            self.calls += 1
            if ranks > 1:
                found = Collective(call.name.name, _bytes(call.input_tensors), _bytes(call.output_tensors))
                self.collectives.append(found)

        return record


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(BATCH, 3, 8, 8, generator=generator), torch.randint(0, CLASSES, (BATCH,), generator=generator)


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def _training(config_name: str) -> tuple[Any, nn.Module]:
    """A function that takes a training step, and the model that it trains."""
    model = seeded_model("gc-2l", GROUPS, torch.float32, "meta")
    images, labels = _batch()
    config = CONFIGS[config_name]
    if config is None:
        model = shard(model)
        optimizer = _sgd(model.parameters())

        def step() -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    else:
        settings = {
            "train_batch_size": BATCH,
            "tensor_parallel": {"autotp_size": RANKS},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 1.0,
            **config,
        }
        engine, *_ = initialize(model=model, optimizer=_sgd, config=settings)
        model = engine.module

        def step() -> None:
            engine.backward(F.cross_entropy(engine(images), labels))
            engine.step()

    return step, model


def _steps(config_name: str) -> tuple[list[list[Collective]], list[int], list[int]]:
    """What ran in each of 3 steps, how many calls in groups of any size, and the bytes of each parameter's share."""
    step, model = _training(config_name)
    recorder = Recorder()
    steps, calls = [], []
    for _ in range(3):
        recorder.collectives, recorder.calls = [], 0
        step()
        steps.append(recorder.collectives)
        calls.append(recorder.calls)
    return steps, calls, [_bytes([param]) for param in model.parameters()]


def _profiled(config_name: str) -> list[int]:
    """How many collectives the profiler sees in each of 3 steps."""
    step, _ = _training(config_name)
    seen = []
    for _ in range(3):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step()
        seen.append(sum(event.name.startswith("c10d::") for event in profiler.events()))
    return seen


DIALS: list[dict[str, Any]] = [
    {"coarse_channels": count, "coarse_sum": summed} for summed in (False, True) for count in (1, 2, 3)
]


def _dialled(dial: tuple[tuple[str, Any], ...]) -> list[list[Collective]]:
    """What a forward and a backward pass send, of which the first pass, that compares the ranks, is left out."""
    model = shard(create_model("wrn-10-2", groups=GROUPS, **dict(dial)))
    recorder = Recorder()
    images, labels = _batch()
    found = []
    for _ in range(2):
        recorder.collectives = []
        F.cross_entropy(model(images), labels).backward()
        found.append(recorder.collectives)
    return found[1:]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dial", DIALS, ids=str)
def test_the_dial_says_how_many_maps_a_layer_sends(dial: dict[str, Any], ranks: int) -> None:
    """r N / P of each rank's own, gathered, or r, summed; backward as many."""
    sizes = [share // (GROUPS // RANKS) for _, share, _ in _expected_activations()[0]]  # of one map
    count, summed = dial["coarse_channels"], dial["coarse_sum"]
    kinds = ("ALLREDUCE", "ALLREDUCE") if summed else ("ALLGATHER", "REDUCE_SCATTER")
    for (collectives,) in run_ranks_once(ranks, _dialled, tuple(dial.items())):
        maps = [c for c in collectives if c != LOGITS]
        own = count if summed else count * GROUPS // ranks
        whole = 0 if summed else count * GROUPS
        assert maps[: len(sizes)] == [Collective(kinds[0], own * size, whole * size) for size in sizes]
        given = own if summed else whole
        back = Counter(Collective(kinds[1], given * size, 0 if summed else own * size) for size in sizes)
        assert Counter(maps[len(sizes) :]) == back


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_balanced_layer_sums_as_many_maps_as_a_group_has(ranks: int) -> None:
    model = create_model("wrn-10-2", conv="bgc", groups=GROUPS)
    expected: list[Collective] = []

    def note(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        expected.append(Collective("ALLREDUCE", inputs[0].numel() // GROUPS * FLOAT, 0))

    layers = [module for module in model.modules() if isinstance(module, BalancedConv2d)]
    for layer in layers:
        layer.register_forward_hook(note)
    model(_batch()[0])
    assert len(layers) == len(expected) == 9
    for (collectives,) in run_ranks_once(ranks, _dialled, (("conv", "bgc"),)):
        assert collectives[: len(expected)] == expected
        assert Counter(collectives) == Counter({LOGITS: 1}) + Counter(expected + expected)


def _expected_activations() -> tuple[list[Collective], list[Collective]]:
    """In the order of the network, what each two-level layer sends forward, and the same backward."""
    forward, backward = [], []

    def note(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        share = BATCH * (GROUPS // RANKS) * output.shape[2] * output.shape[3] * FLOAT
        forward.append(Collective("ALLGATHER", share, RANKS * share))
        backward.append(Collective("REDUCE_SCATTER", RANKS * share, share))

    model = seeded_model("gc-2l", GROUPS, torch.float32, "cpu")
    layers = [module for module in model.modules() if isinstance(module, TwoLevelConv2d)]
    for layer in layers:
        layer.register_forward_hook(note)
    model(_batch()[0])
    assert len(forward) == len(layers) == 9
    return forward, backward


LOGITS = Collective("ALLREDUCE", BATCH * CLASSES * FLOAT, 0)
SCALAR = Collective("ALLREDUCE", FLOAT, 0)


def _activations(collectives: list[Collective]) -> list[Collective]:
    return [c for c in collectives if c.kind != "ALLREDUCE" or c == LOGITS]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_step_sends_representatives_and_logits(config: str) -> None:
    forward, backward = _expected_activations()
    for steps, _, _ in run_ranks_once(RANKS, _steps, config):
        for collectives in steps[1:]:
            found = _activations(collectives)
            assert found[: len(forward) + 1] == [*forward, LOGITS]
            assert Counter(found[len(forward) + 1 :]) == Counter(backward)


@pytest.mark.parametrize("config", CONFIGS)
def test_else_only_the_norm_of_the_gradient_is_sent(config: str) -> None:
    scalars = 0 if CONFIGS[config] is None else 1
    for steps, _, _ in run_ranks_once(RANKS, _steps, config):
        for collectives in steps[1:]:
            rest = Counter(collectives) - Counter(_activations(collectives))
            assert rest == Counter({SCALAR: scalars})


@pytest.mark.parametrize("config", CONFIGS)
def test_only_the_first_step_checks_that_the_batch_is_the_same(config: str) -> None:
    images, _ = _batch()
    for steps, _, _ in run_ranks_once(RANKS, _steps, config):
        first, later = Counter(steps[0]), Counter(steps[1])
        assert Counter(steps[2]) == later
        extra = first - later
        assert extra.pop(Collective("ALLGATHER", CHECK_BYTES, RANKS * CHECK_BYTES)) == 1  # compares the ranks
        assert not later - first
        if CONFIGS[config] is None:
            assert not extra
            continue
        assert {c.kind for c in extra} == {"ALLGATHER"}
        assert 0 < sum(c.sent * n for c, n in extra.items()) < 1024 < _bytes([images]), "a digest, not the batch"


@pytest.mark.parametrize("config", CONFIGS)
def test_no_payload_is_of_a_parameters_size(config: str) -> None:
    for steps, _, parameter_bytes in run_ranks_once(RANKS, _steps, config):
        sizes = {part * size for size in parameter_bytes for part in (1, RANKS)}
        sizes |= {sum(parameter_bytes), RANKS * sum(parameter_bytes)}
        sent = {size for collectives in steps[1:] for c in collectives for size in c[1:]}
        assert len(sent) > 4
        assert not sent & sizes


@pytest.mark.parametrize("config", CONFIGS)
def test_the_profiler_counts_as_many(config: str) -> None:
    for (_, calls, _), seen in zip(
        run_ranks_once(RANKS, _steps, config), run_ranks_once(RANKS, _profiled, config), strict=True
    ):
        assert seen == calls
