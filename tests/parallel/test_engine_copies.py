"""Copies and files of a split network inside an engine, at every ZeRO stage: they are the network without the engine.

A copy computes, learns and is put together as the network of one device in the same state.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
from typing import Any

import deepspeed
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.networks import BATCH, SIDE, engine_of, logits, network, sgd, train
from tests.parallel.common import assert_close, batches, run_ranks_once, smooth_activations
from tlgc_mp.parallel import gather_state_dict

STEPS = 2
TOLERANCE = 1e-5
CASES = [*(("odd", stage) for stage in (0, 1, 2, 3)), ("test_resnet", 1), ("converted", 3)]


def _gathered(engine: Any) -> contextlib.AbstractContextManager[Any]:
    """Within which the parameters of an engine can be read: what a user writes at ZeRO 3."""
    if engine.zero_optimization_stage() < 3:
        return contextlib.nullcontext()
    return deepspeed.zero.GatheredParameters(list(engine.module.parameters()))


def _loaded(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _learned(model: nn.Module) -> dict[str, Tensor]:
    """The state after a step of a plain optimizer."""
    optimizer = sgd(model.parameters())
    images, labels = batches(1, BATCH, torch.float32, side=SIDE)[0]
    with smooth_activations():
        F.cross_entropy(model.train()(images), labels).backward()
    assert all(type(param.grad) is Tensor for param in model.parameters() if param.requires_grad)
    optimizer.step()
    return gather_state_dict(model)


def _on_rank(folder: str) -> dict[Any, dict[str, Any]]:
    answers = {}
    for name, stage in CASES:
        engine = engine_of(name, 2, stage)
        moving = AveragedModel(engine.module, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
        for step in range(STEPS):
            train(engine, range(step, step + 1))
            with _gathered(engine):
                moving.update_parameters(engine.module)
        state = gather_state_dict(engine.module)
        twin, loaded = copy.deepcopy(engine.module), _loaded(engine.module)
        assert repr(twin) == repr(engine.module)
        path = f"{folder}/{name}-{stage}"
        assert engine.save_16bit_model(path)
        answers[name, stage] = {
            "state": state,
            "saved": torch.load(f"{path}/pytorch_model.bin", weights_only=True),
            "logits": [logits(each) for each in (engine.module, twin, loaded)],
            "moving": gather_state_dict(moving.module),
            "moving logits": logits(moving),
            "learned": [_learned(each) for each in (twin, loaded)],
            "stays": gather_state_dict(engine.module),
        }
    return answers


@functools.cache
def _one_device(name: str) -> dict[str, Any]:
    model = network(name)
    moving = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    optimizer = sgd(model.parameters())
    for images, labels in batches(STEPS, BATCH, torch.float32, side=SIDE):
        optimizer.zero_grad()
        with smooth_activations():
            F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        moving.update_parameters(model)
    found = {"state": copy.deepcopy(model.state_dict()), "logits": logits(model)}
    found |= {"moving": moving.module.state_dict(), "moving logits": logits(moving)}
    model.zero_grad()
    return {**found, "learned": _learned(model)}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_ranks_once(2, _on_rank, str(tmp_path_factory.mktemp("models")))


def _assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Tensors up to rounding; some are zero but for that."""
    assert list(found) == list(expected)
    tensors = [name for name, value in expected.items() if isinstance(value, Tensor)]
    assert_close({k: found[k] for k in tensors}, {k: expected[k] for k in tensors}, TOLERANCE, least=1e-2)
    assert all(found[name] == expected[name] for name in expected.keys() - set(tensors))


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_the_whole_loads_into_the_network_of_one_device(answers: list[Any], name: str, stage: int) -> None:
    expected = _one_device(name)
    for found in answers:
        mine = found[name, stage]
        for state in (mine["state"], mine["saved"], mine["stays"]):
            _assert_same(state, expected["state"])
            alone = network(name)
            alone.load_state_dict(state, strict=True)
            torch.testing.assert_close(logits(alone), expected["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_copies_and_files_compute_and_learn(answers: list[Any], name: str, stage: int) -> None:
    expected = _one_device(name)
    for found in answers:
        mine = found[name, stage]
        for each in mine["logits"]:
            torch.testing.assert_close(each, expected["logits"], rtol=0, atol=1e-4)
        for each in mine["learned"]:
            _assert_same(each, expected["learned"])


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_moving_averages(answers: list[Any], name: str, stage: int) -> None:
    expected = _one_device(name)
    assert not torch.equal(expected["moving"]["fc.weight"], expected["state"]["fc.weight"])
    for found in answers:
        _assert_same(found[name, stage]["moving"], expected["moving"])
        torch.testing.assert_close(found[name, stage]["moving logits"], expected["moving logits"], rtol=0, atol=1e-4)
