"""What users do with the parameters of a split model's layers: ``layer.weight`` behaves as the whole parameter does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from tests.parallel.common import SEED, run_ranks_once
from tlgc_mp import UsageError
from tlgc_mp.parallel import clip_grad_norm_, shard, whole

RANKS = (2, 3)


def _network() -> nn.Sequential:
    torch.manual_seed(SEED)
    convolutions = [nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.SiLU(), nn.Conv2d(12, 12, 3), nn.SiLU()]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(432, 5)).double()


def _images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)


def _loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(_images()), torch.arange(4))


def _weights(model: nn.Sequential) -> list[Any]:
    return [model[index].weight for index in (0, 1, 3, 6)]


def _sgd(model: nn.Module) -> Tensor:
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return model(_images())


def _read_gradients(model: nn.Sequential) -> Any:
    before = [weight.grad is None for weight in _weights(model)]
    _loss(model).backward()
    norms = [weight.grad.norm() for weight in _weights(model)]
    return torch.stack(norms), torch.tensor(before).double()


def _write_gradients(model: nn.Sequential) -> Any:
    _loss(model).backward()
    model[3].weight.grad = torch.linspace(0, 1, 1296, dtype=torch.float64).view(12, 12, 3, 3)
    model[0].weight.grad *= 0.5
    model[1].weight.grad[3] = 0
    model[6].weight.grad = None
    return _sgd(model)


def _update_by_hand(model: nn.Sequential) -> Any:
    for _ in range(2):
        _loss(model).backward()
        with torch.no_grad():
            for index in (0, 3, 6):
                model[index].weight -= 0.1 * model[index].weight.grad
                model[index].weight.grad.zero_()
        model[1].weight.data.add_(model[1].weight.grad, alpha=-0.1)
        model.zero_grad()
    return model(_images())


def _replace_data(model: nn.Sequential) -> Any:
    model[3].weight.data = torch.linspace(-0.1, 0.1, 1296, dtype=torch.float64).view(12, 12, 3, 3)
    model[1].running_mean.data = torch.arange(12.0, dtype=torch.float64)
    return model.eval()(_images())


def _hooks(model: nn.Sequential) -> Any:
    seen = []
    model[3].weight.register_hook(lambda grad: seen.append(grad.abs().sum()) or grad * 2)
    removed = model[0].weight.register_hook(lambda grad: grad * 7)
    removed.remove()
    _loss(model).backward()
    return _sgd(model), seen[0]


def _hooks_after_accumulation(model: nn.Sequential) -> Any:
    @torch.no_grad()
    def update(weight: Tensor) -> None:
        assert weight.grad is not None
        weight -= 0.1 * weight.grad
        weight.grad = None

    for weight in _weights(model):
        weight.register_post_accumulate_grad_hook(update)
    _loss(model).backward()
    return model(_images()), torch.tensor([weight.grad is None for weight in _weights(model)]).double()


def _freeze(model: nn.Sequential) -> Any:
    model[0].weight.requires_grad_(False)
    model[3].weight.requires_grad = False
    _loss(model).backward()
    torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.1).step()
    return model(_images()), torch.tensor([weight.requires_grad for weight in _weights(model)]).double()


def _optimize_weights(model: nn.Sequential) -> Any:
    optimizer = torch.optim.AdamW(_weights(model), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        _loss(model).backward()
        nn.utils.clip_grad_norm_(_weights(model), 0.1)
        optimizer.step()
    return model(_images())


def _whole_norms(model: nn.Sequential) -> Any:
    optimizer = torch.optim.Adafactor(_weights(model), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        _loss(model).backward()
        optimizer.step()
    return model(_images())


def _quasi_newton(model: nn.Sequential) -> Any:
    optimizer = torch.optim.LBFGS(_weights(model), lr=0.1, max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _loss(model)
        loss.backward()
        return loss

    optimizer.step(closure)
    return model(_images())


def _gradients_of_weights(model: nn.Sequential) -> Any:
    weights = _weights(model)
    gradients = torch.autograd.grad(_loss(model), weights, create_graph=True)
    return torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), weights)


def _backward_to_a_weight(model: nn.Sequential) -> Any:
    _loss(model).backward(inputs=[model[3].weight])
    return model[3].weight.grad, torch.tensor([model[0].weight.grad is None]).double()


def _kept_without_gradients(model: nn.Sequential) -> Any:
    with torch.no_grad():
        weights = _weights(model)
    (_loss(model) + sum(weight.square().sum() for weight in weights)).backward()
    return _sgd(model)


def _called_with_parameters(model: nn.Sequential) -> Any:
    given = {name: param.detach().clone().requires_grad_() for name, param in model.named_parameters()}
    out = torch.func.functional_call(model, given, (_images(),))
    F.cross_entropy(out, torch.arange(4)).backward()
    for name, param in model.named_parameters():
        param.grad = given[name].grad
    return _sgd(model)


def _tied_later(model: nn.Sequential) -> Any:
    model.append(nn.Identity())
    again = nn.Conv2d(12, 12, 3).double()
    split_later = model[3]
    model[3] = nn.Sequential(split_later, nn.SiLU(), again)
    again.weight = nn.Parameter(split_later.weight.detach().sin())
    split_later.weight = split_later.weight
    return split_later(model[2](model[1](model[0](_images()))))


def _sliced(model: nn.Sequential) -> Any:
    features = model[:4]
    features(_images()).square().sum().backward()
    return _sgd(features)


def _leaves(model: nn.Sequential) -> Any:
    facts = [(w.is_leaf, w.requires_grad, w.grad_fn is None, w.grad is None) for w in _weights(model)]
    model[0].weight.retain_grad()
    return torch.tensor(facts).double()


def _initialized_again(model: nn.Sequential) -> Any:
    torch.manual_seed(SEED + 1)
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            nn.init.orthogonal_(layer.weight)
            nn.init.uniform_(layer.bias)
        elif isinstance(layer, nn.Linear):
            layer.reset_parameters()
    return model(_images())


def _clipped(norm_type: float) -> Callable[[nn.Sequential], Any]:
    def run(model: nn.Sequential) -> Any:
        _loss(model).backward()
        if hasattr(model, "tlgc_region"):
            norm = clip_grad_norm_(model, 0.05, norm_type)
        else:
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05, norm_type)
        return _sgd(model), norm

    return run


USES: dict[str, Callable[[nn.Sequential], Any]] = {
    "gradients are read": _read_gradients,
    "gradients are written": _write_gradients,
    "weights are updated by hand": _update_by_hand,
    "data are replaced": _replace_data,
    "hooks": _hooks,
    "hooks after accumulation": _hooks_after_accumulation,
    "frozen": _freeze,
    "an optimizer of weights": _optimize_weights,
    "an optimizer that takes norms of them": _whole_norms,
    "an optimizer that takes them as one vector": _quasi_newton,
    "gradients of weights": _gradients_of_weights,
    "backward to a weight": _backward_to_a_weight,
    "kept without gradients": _kept_without_gradients,
    "called with other parameters": _called_with_parameters,
    "tied later": _tied_later,
    "a slice of the model": _sliced,
    "leaves": _leaves,
    "initialized again": _initialized_again,
    **{f"clipped by the {p}-norm": _clipped(p) for p in (1.0, 2.0, 3.5, float("inf"))},
}


def _flat(results: Any) -> list[Tensor]:
    results = results if isinstance(results, tuple) else (results,)
    return [whole(result).detach() for result in results]


def _on_ranks() -> dict[str, list[Tensor]]:
    return {name: _flat(use(shard(_network()))) for name, use in USES.items()}


@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize("ranks", RANKS)
def test_as_on_one_device(ranks: int, name: str) -> None:
    expected = _flat(USES[name](_network()))
    for answers in run_ranks_once(ranks, _on_ranks):
        for found, wanted in zip(answers[name], expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


class _Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def _assign(layer: nn.Conv2d) -> None:
    layer.weight = nn.Parameter(torch.randn(12, 12, 3, 3).double())


CHANGES: dict[str, Callable[[Any], object]] = {
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "a parametrization": lambda layer: parametrize.register_parametrization(layer, "weight", _Double()),
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "another parameter": _assign,
    "none": lambda layer: delattr(layer, "weight"),
}


def _changed() -> dict[str, str]:
    said = {}
    for name, change in CHANGES.items():
        model = shard(_network())
        try:
            change(model[3])
        except UsageError as error:
            said[name] = str(error)
        assert not _sgd(model).isnan().any()
    return said


def test_what_would_take_a_share_for_the_whole_is_refused() -> None:
    """It trained without a word, and left the weight out."""
    for said in run_ranks_once(2, _changed):
        assert set(said) == set(CHANGES)
        assert all(" of a split Conv2d must " in text and "before" in text for text in said.values()), said


def _buffer_of_another_length() -> str:
    model = shard(nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12)))
    with pytest.raises(UsageError) as refused:
        model[1].running_mean = torch.zeros(24)
    return str(refused.value)


def test_a_buffer_of_another_length_is_refused() -> None:
    assert run_ranks_once(2, _buffer_of_another_length)[0] == (
        "running_mean of a split BatchNorm2d must be of shape (12,), got a tensor of shape (24,); change the model "
        "before it is split"
    )


def test_clipping_says_what_it_takes() -> None:
    model = _network()
    with pytest.raises(UsageError, match="norm_type must be positive, got 0"):
        clip_grad_norm_(model, 1.0, 0)
    assert clip_grad_norm_(model, 1.0) == 0, "no gradients"
    model[0].weight.grad = torch.full_like(model[0].weight, torch.nan)
    with pytest.raises(RuntimeError, match="the norm of the gradients is nan"):
        clip_grad_norm_(model, 1.0, error_if_nonfinite=True)
