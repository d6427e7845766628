"""torch's own clipping and loss scaling of a split model's parameters, which know nothing of ranks."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parallel.common import SEED, run_ranks_once
from tlgc_mp.parallel import shard
from tlgc_mp.parallel.gradient_shares import GradientShare

Parameters = Iterable[nn.Parameter]


def _network() -> nn.Module:
    torch.manual_seed(SEED)
    layers = [nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 6, 3), nn.Flatten(), nn.Linear(96, 5)]
    return nn.Sequential(*layers).double()


def _passed(model: nn.Module, scale: Callable[[Tensor], Tensor] = lambda loss: loss) -> nn.Module:
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=generator)
    scale(F.cross_entropy(model(images), torch.tensor([0, 1, 4, 2]))).backward()
    return model


def _old_way(parameters: Parameters) -> Tensor:
    return torch.stack([param.grad.data.norm(2) for param in parameters if param.grad is not None]).norm(2)


def _by_hand(parameters: Parameters) -> Tensor:
    squares = [(param.grad.detach() ** 2).sum() for param in parameters if param.grad is not None]
    return torch.stack(squares).sum().sqrt()


def _largest(parameters: Parameters) -> Tensor:
    return torch.stack([param.grad.abs().max() for param in parameters if param.grad is not None]).max()


def _largest_of_two(param: nn.Parameter) -> Tensor:
    """As optimizers keep the largest of what there was, element by element, on either side."""
    kept = torch.max(torch.zeros_like(param), param.grad.abs())
    kept = torch.max(param.grad, kept)
    assert type(kept) is Tensor and kept.shape == param.shape
    assert all(type(made) is Tensor for made in param.grad.max(dim=1))
    return (kept - param.grad.abs()).abs().max()


def _gradients(parameters: Parameters) -> list[Tensor]:
    return [param.grad for param in parameters if param.grad is not None]


clip, norm = torch.nn.utils.clip_grad_norm_, torch.nn.utils.get_total_norm
WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "clip_grad_norm_": lambda model: clip(model.parameters(), 0.1),
    "of a list": lambda model: clip(list(model.parameters()), 0.1),
    "of a layer": lambda model: clip(model[3].parameters(), 0.1),
    "of an optimizer": lambda model: clip(torch.optim.SGD(model.parameters()).param_groups[0]["params"], 0.1),
    "of one parameter": lambda model: clip(next(model.parameters()), 0.01),
    "largest": lambda model: clip(model.parameters(), 0.01, float("inf")),
    "smallest": lambda model: clip(model.parameters(), 0.01, -float("inf")),
    "sum": lambda model: clip(model.parameters(), 0.1, 1.0),
    "third power": lambda model: clip(model.parameters(), 0.1, 3.0),
    "all at once": lambda model: clip(model.parameters(), 0.1, foreach=True),
    "all at once, largest": lambda model: clip(model.parameters(), 0.01, float("inf"), foreach=True),
    "total norm": lambda model: norm(_gradients(model.parameters())),
    "values": lambda model: torch.nn.utils.clip_grad_value_(model.parameters(), 0.01),
    "the old way": lambda model: _old_way(model.parameters()),
    "by hand": lambda model: _by_hand(model.parameters()),
    "by hand, largest": lambda model: _largest(model.parameters()),
    "by name": lambda model: torch.norm(input=next(model.parameters()).grad),
    "of two": lambda model: _largest_of_two(next(model.parameters())),
    "a weight's": lambda model: model[3].weight.grad.norm(),
    "along a dimension": lambda model: torch.linalg.vector_norm(model[0].weight.grad, dim=(1, 2, 3)),
    "along a dimension of shares": lambda model: next(model.parameters()).grad.sum((0, 2, 3)),
}


def _clipped(model: nn.Module) -> dict[str, tuple[Any, list[Tensor]]]:
    found = {}
    for name, way in WAYS.items():
        model.zero_grad()
        _passed(_passed(model))
        value = way(model)
        gradients = [model[index].weight.grad.norm() for index in (0, 1, 3, 5)]
        found[name] = value, [torch.as_tensor(gradient) for gradient in gradients]
    return found


def _clipped_on_ranks() -> dict[str, tuple[Any, list[Tensor]]]:
    from tlgc_mp.parallel import whole

    return {name: whole((value, gradients)) for name, (value, gradients) in _clipped(shard(_network())).items()}


@pytest.mark.parametrize("ranks", [2, 3])
def test_norms_are_those_of_one_device(ranks: int) -> None:
    expected = _clipped(_network())
    for found in run_ranks_once(ranks, _clipped_on_ranks):
        for name, (value, gradients) in expected.items():
            torch.testing.assert_close(found[name][0], value, msg=name)
            torch.testing.assert_close(found[name][1], gradients, msg=name)


def _scaled(model: nn.Module, bad: bool) -> list[float]:
    """Steps with a loss scale, where the gradient of one weight, which rank 0 holds, is infinite if ``bad``."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    _passed(model, scaler.scale)
    gradient = model[0].weight.grad.clone()
    gradient[0, 0, 0, 0] = float("inf") if bad else 1.0
    model[0].weight.grad = gradient
    scaler.unscale_(optimizer)
    clip(model.parameters(), 0.5)
    scaler.step(optimizer)
    scaler.update()
    return [scaler.get_scale(), *[float(model[index].weight.detach().sum()) for index in (0, 3, 5)]]


@pytest.mark.parametrize("bad", [False, True])
def test_a_loss_scale_skips_a_step_on_all_ranks_or_on_none(bad: bool) -> None:
    expected = _scaled(_network(), bad)
    assert (expected[0] == 2.0) == bad
    for found in run_ranks_once(2, _scaled_on_ranks, bad):
        assert found == pytest.approx(expected, rel=1e-12)


def _scaled_on_ranks(bad: bool) -> list[float]:
    return _scaled(shard(_network()), bad)


def _kept() -> None:
    model = _passed(shard(_network()))
    assert all(type(param.grad) is GradientShare for param in model[0].parameters())
    optimizers = [
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4),
        torch.optim.Adam(model.parameters(), amsgrad=True),
        torch.optim.RMSprop(model.parameters(), momentum=0.9, foreach=True),
    ]
    for optimizer in optimizers:
        optimizer.step()
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        optimizer.load_state_dict(torch.load(buffer))  # which takes plain tensors only
    twin = copy.deepcopy(model)
    assert clip(_passed(twin).parameters(), 1.0) > 0
    assert type(next(twin.parameters()).grad) is GradientShare
    model.requires_grad_(False)
    frozen = shard(_network().requires_grad_(False))
    frozen[3].requires_grad_()
    assert type(next(_passed(frozen)[3].parameters()).grad) is GradientShare


def test_marks_are_in_no_file_and_on_every_copy() -> None:
    run_ranks_once(2, _kept)
