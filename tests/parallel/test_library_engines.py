"""Networks that others wrote, dense and converted, under the engine against one device.

Every ZeRO stage, tensor and data parallel, with clipped gradients, bf16 and ``engine.compile``.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.networks import BATCH, SIDE, engine_of, network, sgd, train
from tests.parallel.common import (
    TrainingRun,
    assert_close,
    batches,
    relative_error,
    run_ranks_once,
    smooth_activations,
    train_one_device,
)
from tlgc_mp.parallel import gather_state_dict

STEPS, CLIP = 3, 0.2
TOLERANCE = 1e-5
BF16 = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}

CASES = [
    *(((2, 1), name, stage, "clipped") for name in ("test_resnet", "odd") for stage in (0, 1, 2, 3)),
    *(((2, 1), name, 0, "clipped") for name in ("converted", "test_convnext")),
    *(((2, 1), "joined", stage, "clipped") for stage in (1, 3)),
    *(((2, 1), "test_resnet", stage, "bf16") for stage in (0, 3)),
    *(((2, 1), name, stage, "compiled") for name, stage in (("test_resnet", 0), ("converted", 2))),
    *(((1, 2), name, stage, "clipped") for name, stage in (("test_resnet", 0), ("converted", 2), ("test_resnet", 3))),
]
"""((P, D), network, ZeRO stage, variant)"""


def _on_ranks(ranks: int, cases: tuple[tuple[str, int, str], ...]) -> dict[Any, tuple[list[float], dict[str, Any]]]:
    answers = {}
    for name, stage, variant in cases:
        settings = BF16 if variant == "bf16" else {"gradient_clipping": CLIP}
        engine = engine_of(name, ranks, stage, **settings)
        if variant == "compiled":
            engine.compile(backend="eager")
        answers[name, stage, variant] = train(engine, range(STEPS)), gather_state_dict(engine.module)
    return answers


@functools.cache
def _one_device(name: str, replicas: int, bf16: bool) -> TrainingRun:
    data = batches(STEPS, BATCH, torch.float32, side=SIDE)
    with smooth_activations():
        if not bf16:
            return train_one_device(network(name), data, sgd, replicas=replicas, clip=CLIP)
        model, run = network(name), TrainingRun(losses=[[]])
        optimizer = sgd(model.parameters())
        for images, labels in data:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(images).float(), labels)
            loss.backward()
            optimizer.step()
            run.losses[0].append(loss.item())
    run.states = [model.state_dict()]
    return run


@pytest.mark.parametrize(("split", "name", "stage", "variant"), CASES)
def test_losses_and_final_state(split: tuple[int, int], name: str, stage: int, variant: str) -> None:
    ranks, replicas = split
    bf16 = variant == "bf16"
    expected = _one_device(name, replicas, bf16)
    if not bf16:
        assert min(expected.norms) > 1.2 * CLIP, "nothing was clipped"
    cases = tuple(case[1:] for case in CASES if case[0] == split)
    for rank, answers in enumerate(run_ranks_once(ranks * replicas, _on_ranks, ranks, cases)):
        losses, state = answers[name, stage, variant]
        replica = rank // ranks
        assert losses == pytest.approx(expected.losses[replica], rel=5e-3 if bf16 else TOLERANCE)
        # Some are zero but for rounding, as a bias before a BatchNorm.
        theirs = {key: value for key, value in expected.states[replica].items() if key != "fixed"}  # not persistent
        tensors = {key for key, value in theirs.items() if torch.is_tensor(value) and value.numel()}
        assert state.keys() == theirs.keys()
        if bf16:  # rounding to 8 bits moves each step by as much
            before = network(name).state_dict()
            moved = relative_error(theirs["fc.weight"], before["fc.weight"])
            assert relative_error(state["fc.weight"], theirs["fc.weight"]) < 0.2 * moved
        else:
            assert_close({k: state[k] for k in tensors}, {k: theirs[k] for k in tensors}, TOLERANCE, least=1e-2)
            assert all(state[key] == theirs[key] for key in theirs.keys() - tensors if not torch.is_tensor(theirs[key]))
