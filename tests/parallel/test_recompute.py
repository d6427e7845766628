"""Activation checkpointing: less is kept for backward, and losses, gradients and BatchNorm stay what they are."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parallel.common import (
    SEED,
    assert_gradients_close,
    batches,
    gather_gradients,
    run_ranks_once,
    seeded_model,
)
from tlgc_mp import UsageError, create_model
from tlgc_mp.bench.ranks.meters import CollectiveClock, SavedActivations
from tlgc_mp.engine import checkpoint_activations, initialize
from tlgc_mp.models.wide_resnet import ResidualUnit
from tlgc_mp.nn import TwoLevelConv2d
from tlgc_mp.parallel import gather_state_dict

GROUPS, BATCH, STEPS = 4, 8, 3
BF16 = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
RUNS: dict[str, dict[str, Any]] = {
    "ZeRO 0": {},
    "ZeRO 1": {"zero_optimization": {"stage": 1}},
    "ZeRO 3": {"zero_optimization": {"stage": 3}},
    "ZeRO 0, bf16": BF16,
    "ZeRO 3, bf16": {"zero_optimization": {"stage": 3}, **BF16},
}


class Unit(nn.Module):
    """A block of a user's own: dropout, a ReLU in place, and an input that needs no gradient where it comes first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(0.5)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def _own_model() -> nn.Module:
    torch.manual_seed(SEED)
    return nn.Sequential(Unit(3), Unit(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).double()


def _train(model: nn.Module, rate: float = 0.1) -> dict[str, Tensor]:
    """Losses, last gradients and final state of a few steps on one device."""
    torch.manual_seed(SEED)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    losses = []
    for images, labels in batches(STEPS, BATCH, torch.float64):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"losses": torch.stack(losses), **gradients, **model.state_dict()}


def _assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    differing = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not differing, f"{differing} (seed {SEED})"


def test_one_device() -> None:
    expected = _train(seeded_model("gc-2l", GROUPS, torch.float64, "cpu"))
    assert expected["losses"].unique().numel() == STEPS, "nothing was trained"
    assert expected["bn.num_batches_tracked"] == STEPS
    _assert_equal(_train(checkpoint_activations(seeded_model("gc-2l", GROUPS, torch.float64, "cpu"))), expected)


def test_the_blocks_of_mobilenet_v2() -> None:
    def model() -> nn.Module:
        torch.manual_seed(SEED)
        return create_model("mobilenet_v2", groups=GROUPS, num_classes=10, coarse_init="he").double()

    # The weights stay: a block's input hands its gradient on in another memory format, which on some processors sums in
    # another order, and each step of training would make a thousand times as much of that.
    expected, actual = (_train(each, rate=0.0) for each in (model(), checkpoint_activations(model())))
    expected_gradients, actual_gradients = (
        {name: run.pop(name) for name in list(run) if name.endswith(".grad")} for run in (expected, actual)
    )
    assert expected["losses"].unique().numel() == STEPS
    _assert_equal(actual, expected)
    assert_gradients_close(actual_gradients, expected_gradients, 1e-9)
    assert _kept_bytes(checkpoint_activations(model()).float()) < 0.5 * _kept_bytes(model().float())


def test_blocks_of_a_users_own() -> None:
    _assert_equal(_train(checkpoint_activations(_own_model(), Unit)), _train(_own_model()))


def test_statistics_are_used_and_kept_in_evaluation() -> None:
    model = _own_model()
    _train(model)
    model.eval()
    images, _ = batches(1, BATCH, torch.float64)[0]
    expected, before = model(images), {name: buffer.clone() for name, buffer in model.named_buffers()}
    checkpoint_activations(model, Unit)
    actual = model(images)
    actual.sum().backward()
    assert torch.equal(actual, expected)
    _assert_equal(dict(model.named_buffers()), before)
    with torch.no_grad():
        assert torch.equal(model(images), expected)


def _kept_bytes(model: nn.Module) -> int:
    with SavedActivations(list(model.parameters())) as saved:
        images, labels = batches(1, BATCH, torch.float32)[0]
        F.cross_entropy(model(images), labels).backward()
    assert not saved._holders
    return saved.peak_bytes


def test_a_unit_keeps_its_input_alone() -> None:
    """WRN-22-4: 9 units. Kept are the maps between them, of a byte count known, and what one unit keeps, computed
    again: less than the 8 maps of its output's size that ``bench.capacity`` counts."""

    def model() -> nn.Module:
        torch.manual_seed(SEED)
        return create_model("wrn-22-4", conv="gc", groups=GROUPS)  # keeps maps, and no copies of filters

    everything, kept = _kept_bytes(model()), _kept_bytes(checkpoint_activations(model()))
    width = [16, *(64,) * 3, *(128,) * 3, *(256,) * 3]  # channels between units, of 8 x 8, 4 x 4, 2 x 2 positions
    sides = [8] * 4 + [4] * 3 + [2] * 3
    maps = [4 * BATCH * channels * side**2 for channels, side in zip(width, sides, strict=True)]
    assert sum(maps[:-1]) < kept < sum(maps) + 8 * max(maps)
    assert kept < 0.5 * everything


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9)


def _engine(settings: dict[str, Any], checkpointed: bool) -> tuple[dict[str, Tensor], list[Counter[str]]]:
    """Losses, last gradients (without ZeRO) and final state, and the collectives of each step between the ranks."""
    model = seeded_model("gc-2l", GROUPS, torch.float32, "meta")
    if checkpointed:
        checkpoint_activations(model)
    config = {
        "train_batch_size": BATCH,
        "tensor_parallel": {"autotp_size": dist.get_world_size()},
        "zero_allow_untested_optimizer": True,
        **settings,
    }
    engine, *_ = initialize(model=model, optimizer=_sgd, config=config, seed=SEED)
    losses, collectives, found = [], [], {}
    for images, labels in batches(STEPS, BATCH, torch.float32):
        with CollectiveClock() as clock:
            loss = F.cross_entropy(engine(images).float(), labels)
            engine.backward(loss)
            if "zero_optimization" not in settings:
                found = {f"{name}.grad": grad.clone() for name, grad in gather_gradients(engine.module).items()}
            engine.step()
        losses.append(loss.detach())
        coarse = {m.tlgc_region.ranks.group_name for m in engine.module.modules() if isinstance(m, TwoLevelConv2d)}
        counts = {kind: traffic.calls for (kind, group), traffic in clock.traffic.items() if group in coarse}
        collectives.append(Counter(counts))
    return {"losses": torch.stack(losses), **found, **gather_state_dict(engine.module)}, collectives


def _both(settings: dict[str, Any]) -> list[tuple[dict[str, Tensor], list[Counter[str]]]]:
    return [_engine(settings, checkpointed) for checkpointed in (False, True)]


def _every_run() -> dict[str, Any]:
    return {name: _both(settings) for name, settings in RUNS.items()}


@pytest.mark.parametrize("run", RUNS)
def test_engine(run: str) -> None:
    for answers in run_ranks_once(2, _every_run):
        (expected, _), (actual, _) = answers[run]
        assert expected["losses"].unique().numel() == STEPS, "nothing was trained"
        assert expected["units.0.bn1.num_batches_tracked"] == STEPS
        assert ("stem.weight.grad" in expected) == (run in ("ZeRO 0", "ZeRO 0, bf16"))
        _assert_equal(actual, expected)


@pytest.mark.parametrize("run", RUNS)
def test_representatives_are_gathered_once_more(run: str) -> None:
    layers = sum(isinstance(m, TwoLevelConv2d) for m in seeded_model("gc-2l", GROUPS, torch.float32, "meta").modules())
    logits = 1
    for answers in run_ranks_once(2, _every_run):
        (_, plain), (_, checkpointed) = answers[run]
        for step in plain:
            assert step == {"all_gather": layers, "reduce_scatter": layers, "all_reduce": logits}
        for step in checkpointed:
            assert step == {"all_gather": 2 * layers, "reduce_scatter": layers, "all_reduce": logits}


def test_names_stay_and_twice_is_once() -> None:
    model, plain = (seeded_model("gc-2l", GROUPS, torch.float32, "cpu") for _ in range(2))
    checkpoint_activations(checkpoint_activations(model))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert _kept_bytes(model) == _kept_bytes(checkpoint_activations(plain))


@pytest.mark.parametrize(
    ("blocks", "parts"),
    [
        (Unit, ("blocks must be", "got Unit", "none")),
        ((Unit, TwoLevelConv2d), ("blocks must be", "that hold layers", "got TwoLevelConv2d")),
    ],
)
def test_blocks_that_cannot_be(blocks: Any, parts: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as refused:
        checkpoint_activations(seeded_model("gc-2l", GROUPS, torch.float32, "meta"), blocks)
    assert all(part in str(refused.value) for part in parts), refused.value


def test_a_model_that_does_not_say_which_its_blocks_are() -> None:
    with pytest.raises(
        UsageError, match=r"^blocks must be given for a Sequential, got none; give the classes of its blocks$"
    ):
        checkpoint_activations(_own_model())


def test_partitioned_activations_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime.activation_checkpointing import checkpointing

    model = checkpoint_activations(seeded_model("gc-2l", GROUPS, torch.float32, "cpu"), ResidualUnit)
    monkeypatch.setattr(checkpointing, "PARTITION_ACTIVATIONS", True)
    monkeypatch.setattr(checkpointing, "mp_size", 2)
    with pytest.raises(UsageError, match="partition_activations"):
        model(batches(1, BATCH, torch.float32)[0][0])
