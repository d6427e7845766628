"""A whole network split over P ranks under plain torch.distributed, against the same network on one device.

First one forward and backward pass, then 20 steps of SGD in float64. With D replicas, each normalizes over its own
part of the batch, as under DistributedDataParallel; so the one device runs the parts one after the other and averages
their losses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parallel.common import (
    SEED,
    TrainingRun,
    assert_close,
    batches,
    gather_gradients,
    run_ranks_once,
    seeded_model,
    smooth_activations,
    train_one_device,
)
from tlgc_mp.parallel import gather_state_dict, shard

MODELS = [
    *(
        (ranks, groups, conv)
        for ranks, groups in ((2, 2), (2, 4), (4, 4), (4, 8))
        for conv in ("gc-2l", "gc", "gc-2l-proto", "shuffle", "bgc")
    ),
    (2, 1, "sc"),
    (4, 1, "sc"),
]
"""(P, N, convolution)"""

TRAINED = [
    (2, 4, "gc-2l"),
    (2, 2, "gc-2l-proto"),
    (2, 4, "shuffle"),
    (4, 4, "gc-2l"),
    (4, 8, "gc-2l-proto"),
    (4, 8, "shuffle"),
    (4, 8, "bgc"),
    (4, 8, "gc"),
    (4, 1, "sc"),
]
REPLICATED = (2, 2, 4, "gc-2l")
"""(P, D, N, convolution)"""

TOLERANCES = {torch.float64: (1e-11, 1e-11), torch.float32: (1e-5, 1e-4)}
"""Of logits and statistics, and of gradients."""

STEPS = 20


def _sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)


def _one_pass(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of the network with its ReLUs in float64, and without in float32."""
    images, labels = batches(1, 4, dtype)[0]
    images.requires_grad_()
    with smooth_activations() if dtype == torch.float32 else contextlib.nullcontext():
        logits = model(images)
    F.cross_entropy(logits, labels).backward()
    assert images.grad is not None
    return {"logits": logits.detach(), "image gradient": images.grad}


def _passes_on_ranks(models: tuple[tuple[int, str], ...]) -> dict[Any, dict[str, Tensor]]:
    answers = {}
    for groups, conv in models:
        for dtype in TOLERANCES:
            model = shard(seeded_model(conv, groups, dtype, "cpu"))
            found = _one_pass(model, dtype)
            state = gather_state_dict(model)
            answers[groups, conv, dtype] = {**found, **gather_gradients(model), **_statistics(state)}
    return answers


def _statistics(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if "running" in key}


def _passes(ranks: int) -> list[Any]:
    return run_ranks_once(ranks, _passes_on_ranks, tuple((groups, conv) for p, groups, conv in MODELS if p == ranks))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("ranks", "groups", "conv"), MODELS)
def test_logits_gradients_and_statistics(ranks: int, groups: int, conv: str, dtype: torch.dtype) -> None:
    model = seeded_model(conv, groups, dtype, "cpu")
    gradients = _one_pass(model, dtype)
    values = {"logits": gradients.pop("logits"), **_statistics(model.state_dict())}
    gradients |= {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    for answers in _passes(ranks):
        found = answers[groups, conv, dtype]
        assert set(found) == {*values, *gradients}
        assert_close({name: found[name] for name in values}, values, TOLERANCES[dtype][0])
        assert_close({name: found[name] for name in gradients}, gradients, TOLERANCES[dtype][1])


def _train_on_ranks(ranks: int, replicas: int, models: tuple[tuple[int, str], ...]) -> dict[Any, TrainingRun]:
    """Trains each model over P x D ranks; gradients are averaged over the replicas by hand."""
    replica, share = divmod(dist.get_rank(), ranks)
    tensor_groups = [dist.new_group(list(range(d * ranks, (d + 1) * ranks))) for d in range(replicas)]
    data_groups = [dist.new_group(list(range(p, ranks * replicas, ranks))) for p in range(ranks)]
    answers = {}
    for groups, conv in models:
        torch.manual_seed(SEED)
        model = shard(seeded_model(conv, groups, torch.float64, "meta"), tensor_groups[replica])
        optimizer = _sgd(model.parameters())
        losses = []
        for images, labels in batches(STEPS, 8, torch.float64):
            logits = model(images.chunk(replicas)[replica])
            loss = F.cross_entropy(logits, labels.chunk(replicas)[replica])
            optimizer.zero_grad()
            loss.backward()
            for param in model.parameters():
                assert param.grad is not None
                dist.all_reduce(param.grad, group=data_groups[share])
                param.grad /= replicas
            optimizer.step()
            losses.append(loss.item())
        answers[groups, conv] = TrainingRun(losses=[losses], states=[gather_state_dict(model)])
    return answers


def _trained(ranks: int, replicas: int) -> list[Any]:
    if replicas > 1:
        models = tuple((groups, conv) for p, d, groups, conv in [REPLICATED] if (p, d) == (ranks, replicas))
    else:
        models = tuple((groups, conv) for p, groups, conv in TRAINED if p == ranks)
    return run_ranks_once(ranks * replicas, _train_on_ranks, ranks, replicas, models)


@pytest.mark.parametrize(
    ("ranks", "replicas", "groups", "conv"),
    [*((p, 1, groups, conv) for p, groups, conv in TRAINED), REPLICATED],
)
def test_twenty_steps_of_sgd(ranks: int, replicas: int, groups: int, conv: str) -> None:
    expected = train_one_device(
        seeded_model(conv, groups, torch.float64, "cpu"), batches(STEPS, 8, torch.float64), _sgd, replicas=replicas
    )
    assert expected.losses[0][0] != pytest.approx(expected.losses[0][-1], rel=0.01), "nothing was trained"
    for rank, answers in enumerate(_trained(ranks, replicas)):
        run = answers[groups, conv]
        assert run.losses[0] == pytest.approx(expected.losses[rank // ranks], rel=1e-9)
        assert_close(run.states[0], expected.states[rank // ranks], 1e-9)
