"""WideResNet split by layers over ranks, against the whole of it on one device."""

from __future__ import annotations

import datetime
import itertools
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.parallel.common import (
    SEED,
    TrainingRun,
    assert_close,
    batches,
    coarse_from_the_first,
    run_ranks_once,
    train_one_device,
)
from tests.ranks import run_ranks
from tlgc_mp import create_model
from tlgc_mp.bench.scaling import layer_pipeline
from tlgc_mp.bench.scaling.layer_pipeline import LayerPipeline, split_by_work
from tlgc_mp.errors import UsageError

STEPS = 4
BATCH = 8
TRAINED = [
    *((2, "wrn-16-1", "sc", 1, micro_batches) for micro_batches in (1, 2, 4)),
    *((3, "wrn-22-1", "sc", 1, micro_batches) for micro_batches in (1, 2, 4)),
    (1, "wrn-10-2", "sc", 1, 2),
    (3, "wrn-10-2", "gc-2l", 4, 4),
    (2, "wrn-10-2", "sc", 1, 0),
]
"""(P, model, convolution, N, M); M = 0: one micro-batch, parameters updated in backward"""

STATUS = Path("/proc/self/status")


def _model(name: str, conv: str, groups: int, device: str) -> Any:
    torch.manual_seed(SEED)
    return create_model(name, conv=conv, groups=groups, device=device, **coarse_from_the_first(conv))


def _sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)


def _pipeline(model: Any, micro_batches: int = 1, **options: Any) -> LayerPipeline:
    settings = {"image_shape": (3, 8, 8), "batch_size": BATCH, "seed": SEED, **options}
    return LayerPipeline(model, _sgd, micro_batches=micro_batches, **settings)


def _train_on_ranks(cases: tuple[tuple[str, str, int, int], ...]) -> list[TrainingRun]:
    """Rank 0 alone sees the images and the last rank alone the labels."""
    last = dist.get_rank() == dist.get_world_size() - 1
    nothing = torch.empty(0)
    runs = []
    for name, conv, groups, micro_batches in cases:
        model = _model(name, conv, groups, "meta").double()
        pipeline = _pipeline(model, micro_batches or 1, update_in_backward=micro_batches == 0)
        losses = [
            pipeline.train_step(images if dist.get_rank() == 0 else nothing, labels if last else nothing).item()
            for images, labels in batches(STEPS, BATCH, torch.float64)
        ]
        kept = [param for param in pipeline.parameters() if param.grad is not None]
        assert bool(kept) == (micro_batches > 0), "gradients are let go when updated in backward, and only then"
        runs.append(TrainingRun(losses=[losses], states=[dict(pipeline.stage.state_dict())]))
    return runs


def _union(states: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    whole: dict[str, Tensor] = {}
    for state in states:
        assert not whole.keys() & state.keys()
        whole |= state
    return whole


@pytest.mark.parametrize(("ranks", "name", "conv", "groups", "micro_batches"), TRAINED)
def test_steps_of_sgd(ranks: int, name: str, conv: str, groups: int, micro_batches: int) -> None:
    cases = tuple(case[1:] for case in TRAINED if case[0] == ranks)
    count = micro_batches or 1
    runs = run_ranks_once(ranks, _train_on_ranks, cases)
    found = [run[cases.index((name, conv, groups, micro_batches))] for run in runs]
    expected = train_one_device(
        _model(name, conv, groups, "cpu").double(),
        batches(STEPS, BATCH, torch.float64),
        _sgd,
        accumulation=count,
    )
    losses = torch.tensor(expected.losses[0], dtype=torch.float64).view(STEPS, count).mean(1).tolist()
    assert found[-1].losses[0] == pytest.approx(losses, rel=1e-9)
    assert all(loss == 0 for run in found[:-1] for loss in run.losses[0])
    assert_close(_union(run.states[0] for run in found), expected.states[0], 1e-9)


def _initial_state() -> dict[str, Tensor]:
    return dict(_pipeline(_model("wrn-16-2", "sc", 1, "meta")).stage.state_dict())


def test_initial_weights_are_those_of_the_whole() -> None:
    whole = _model("wrn-16-2", "sc", 1, "cpu").state_dict()
    found = _union(run_ranks(3, _initial_state))
    assert set(found) == set(whole)
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    filters = [value for value in found.values() if value.dim() == 4]
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in filters)


def _train_in_bfloat16() -> tuple[list[float], set[tuple[torch.dtype, bool, bool]]]:
    """The losses, and of what was sent and received: type, whether channels_last, whether it went without a copy."""
    messages = set()
    message: Callable[[Tensor], Tensor] = layer_pipeline._message

    def watched(x: Tensor) -> Tensor:
        sent = message(x)
        is_channels_last = x.is_contiguous(memory_format=torch.channels_last)
        messages.add((x.dtype, is_channels_last, sent.data_ptr() == x.data_ptr()))
        return sent

    layer_pipeline._message = watched
    pipeline = _pipeline(_model("wrn-10-2", "sc", 1, "meta"), 2, autocast_dtype=torch.bfloat16)
    data = batches(STEPS, BATCH, torch.float32)
    losses = [pipeline.train_step(images, labels).item() for images, labels in data]
    assert all(param.grad is not None and param.grad.dtype == torch.float32 for param in pipeline.parameters())
    return losses, messages


def test_bfloat16_autocast_sends_what_it_computes() -> None:
    model = _model("wrn-10-2", "sc", 1, "cpu")
    optimizer = _sgd(model.parameters())
    expected = []
    for images, labels in batches(STEPS, BATCH, torch.float32):
        optimizer.zero_grad()
        total = 0.0
        for part, targets in zip(images.chunk(2), labels.chunk(2), strict=True):
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(part), targets) / 2
            loss.backward()
            total += loss.item()
        optimizer.step()
        expected.append(total)
    (_, first), (losses, second) = run_ranks(2, _train_in_bfloat16)
    assert losses == pytest.approx(expected, rel=0.02)
    assert first == second == {(torch.bfloat16, True, True)}


def _status_bytes(key: str) -> int:
    """A size that Linux keeps of this process: VmRSS is held now, VmHWM was held at most."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def _held() -> tuple[int, int]:
    """Bytes of this rank's parameters, and by how much the process grew at most while it made them."""
    _pipeline(_model("wrn-10-2", "sc", 1, "meta"))
    before = _status_bytes("VmRSS")
    assert _status_bytes("VmHWM") - before < 16 * 2**20, "memory of the start hides what follows"
    pipeline = _pipeline(_model("wrn-10-24", "sc", 1, "meta"))
    return sum(4 * param.numel() for param in pipeline.parameters()), _status_bytes("VmHWM") - before


@pytest.mark.skipif(not STATUS.exists(), reason="reads the peak memory that Linux keeps of a process")
def test_rank_holds_its_part_and_never_more() -> None:
    found = run_ranks(2, _held)
    whole = sum(4 * param.numel() for param in _model("wrn-10-24", "sc", 1, "meta").parameters())
    assert sum(held for held, _ in found) == whole
    assert max(held for held, _ in found) > 100e6
    for held, grown in found:
        assert grown <= 1.05 * held + 16 * 2**20


def _unit_works(depth: int, width: int, side: int) -> list[int]:
    """Multiply-adds of each unit of a dense WideResNet for 10 classes, stem and head included, from the paper."""
    works = []
    channels = 16
    for stage in range(3):
        out_channels = 16 * width * 2**stage
        side = side // 2 if stage else side
        for unit in range((depth - 4) // 6):
            weights = 9 * channels * out_channels + 9 * out_channels**2
            if channels != out_channels or (stage and not unit):
                weights += channels * out_channels
            works.append(weights * side**2)
            channels = out_channels
    works[0] += 27 * 16 * (4 * side) ** 2
    works[-1] += channels * 10
    return works


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("depth", "width", "side"), [(28, 20, 32), (28, 10, 16), (40, 1, 32), (34, 3, 8)])
def test_largest_part_is_smallest(depth: int, width: int, side: int, parts: int) -> None:
    works = _unit_works(depth, width, side)

    def largest(cuts: Iterable[int]) -> int:
        return max(sum(works[start:stop]) for start, stop in itertools.pairwise((0, *cuts, len(works))))

    best = min(map(largest, itertools.combinations(range(1, len(works)), parts - 1)))
    found = split_by_work(_model(f"wrn-{depth}-{width}", "sc", 1, "meta"), parts, (3, side, side))
    assert len(found) == parts
    assert (found[0].start, found[-1].stop) == (0, len(works))
    assert all(part.stop == following.start for part, following in itertools.pairwise(found))
    assert largest(part.start for part in found[1:]) == best
    for part in found[1:]:
        stage = (part.start - 1) // (len(works) // 3)
        assert part.input_shape == (16 * width * 2**stage, side >> stage, side >> stage)


def test_two_parts_of_wide_resnet_28_are_nearly_equal() -> None:
    first, _ = split_by_work(_model("wrn-28-20", "sc", 1, "meta"), 2, (3, 32, 32))
    works = _unit_works(28, 20, 32)
    assert 0.47 < sum(works[: first.stop]) / sum(works) < 0.53


def _refusals(cases: tuple[dict[str, Any], ...]) -> list[str]:
    """What each set of options is answered on one rank, then what a wrong batch is."""
    messages = []
    for case in cases:
        model = _model("wrn-10-1", "sc", 1, case.pop("model_device", "meta"))
        with pytest.raises(UsageError) as refused:
            _pipeline(model, **case)
        messages.append(str(refused.value))
    pipeline = _pipeline(_model("wrn-10-1", "sc", 1, "meta"))
    images, labels = batches(1, BATCH, torch.float32)[0]
    for wrong in ((images[:4], labels), (images[:, :, :4], labels), (images, labels[:4])):
        with pytest.raises(UsageError) as refused:
            pipeline.train_step(*wrong)
        messages.append(str(refused.value))
    return messages


def test_refusals() -> None:
    cases = {
        'model must be on the meta device, got one with values; use create_model(..., device="meta")': {
            "model_device": "cpu"
        },
        "batch_size must be 1 or more, got 0": {"batch_size": 0},
        "micro_batches must be a divisor of batch_size=8, got 3; use one of 1, 2, 4, 8": {"micro_batches": 3},
        "micro_batches must be a divisor of batch_size=8, got 0; use one of 1, 2, 4, 8": {"micro_batches": 0},
        "micro_batches must be 1 with update_in_backward, as micro-batches share a gradient, got 2": {
            "micro_batches": 2,
            "update_in_backward": True,
        },
        "image_shape must be (3, height, width), got (1, 8, 8)": {"image_shape": (1, 8, 8)},
        "image_shape must be (3, height, width), got (3, 8, 0)": {"image_shape": (3, 8, 0)},
    }
    assert run_ranks(1, _refusals, tuple(cases.values()))[0] == [
        *cases,
        "images must be of shape (8, 3, 8, 8), got (4, 3, 8, 8)",
        "images must be of shape (8, 3, 8, 8), got (8, 3, 4, 8)",
        "labels must be of shape (8,), got (4,)",
    ]


@pytest.mark.parametrize("parts", [0, 4])
def test_refuses_more_parts_than_units(parts: int) -> None:
    with pytest.raises(UsageError) as refused:
        split_by_work(_model("wrn-10-1", "sc", 1, "meta"), parts, (3, 8, 8))
    assert str(refused.value) == f"parts must be 1 to 3, the number of residual units, got {parts}"


def _wait_for_a_rank_that_stays_away() -> tuple[float, str]:
    group = dist.new_group([0, 1], timeout=datetime.timedelta(seconds=3))
    pipeline = _pipeline(_model("wrn-10-1", "sc", 1, "meta"), group=group)
    if dist.get_rank() == 1:
        return 0.0, ""
    start = time.monotonic()
    with pytest.raises(RuntimeError) as stopped:
        pipeline.train_step(*batches(1, BATCH, torch.float32)[0])
    return time.monotonic() - start, str(stopped.value)


def test_waits_end_with_the_timeout_of_the_group() -> None:
    seconds, message = run_ranks(2, _wait_for_a_rank_that_stays_away)[0]
    assert 2.0 < seconds < 20.0
    assert "timed out" in message.lower(), message
