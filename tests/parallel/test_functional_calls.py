"""A split model called with tensors other than its own, and by the transforms of torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_mode
from torch import Tensor, nn
from torch.func import functional_call

from tests.parallel.against_one_device import difference, scalar_loss
from tests.parallel.common import SEED, coarse_from_the_first, run_ranks_once
from tests.parallel.test_synchronized_norm import SyncBatchNormOnCPU
from tlgc_mp import UsageError, create_model
from tlgc_mp.parallel import shard


def _convolutions() -> nn.Module:
    """Of which no layer tells twice as many channels from as many."""
    return nn.Sequential(nn.Conv2d(4, 12, 3), nn.SiLU(), nn.Conv2d(12, 12, 3), nn.SiLU(), nn.Conv2d(12, 5, 1))


def _with_statistics() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 12, 3), nn.BatchNorm2d(12), nn.SiLU(), nn.Conv2d(12, 6, 3), nn.BatchNorm2d(6))


def _of_this_package(conv: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        return create_model("wrn-10-2", conv=conv, groups=1 if conv == "sc" else 2, **coarse_from_the_first(conv))

    return make


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "convolutions alone": _convolutions,
    "statistics": _with_statistics,
    **{conv: _of_this_package(conv) for conv in ("sc", "gc", "gc-2l", "shuffle")},
}


def _seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return make().double()


def _images(channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(2, channels, 8, 8, generator=generator, dtype=torch.float64).requires_grad_()


def _called_with_another_state(make: Callable[[], nn.Module], split: bool) -> list[Any]:
    """The output, the gradients of the input and of the given parameters, and what was left in the given buffers."""
    model, other = _seeded(make, SEED), _seeded(make, SEED + 1)
    if split:
        model = shard(model)
    given = {name: value.detach().clone() for name, value in other.state_dict().items()}
    parameters = [given[name].requires_grad_() for name, _ in other.named_parameters()]
    images = _images(next(other.parameters()).shape[1])
    out = functional_call(model, given, (images,))
    loss = scalar_loss(out)
    assert loss is not None
    loss.backward()
    left = [value.detach() for value in given.values()]
    own = model(images.detach())  # with its own state again
    return [out.detach(), images.grad, *(p.grad for p in parameters), *left, own.detach()]


def _on_ranks() -> dict[str, list[Any]]:
    return {name: _called_with_another_state(make, split=True) for name, make in NETWORKS.items()}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_state_of_one_device_may_stand_in_for_the_shares(ranks: int, name: str) -> None:
    """Each whole tensor was taken for a share, and convolutions gave twice what they should."""
    expected = _called_with_another_state(NETWORKS[name], split=False)
    for answers in run_ranks_once(ranks, _on_ranks):
        off = [difference(a, b, 1e-5) for a, b in zip(answers[name], expected, strict=True)]
        assert max(off) < 1e-9, off


def _refusals() -> dict[str, str]:
    calls: dict[str, Callable[[nn.Module, Tensor], Any]] = {
        "grad": lambda model, x: torch.func.grad(lambda y: model(y).sum())(x),
        "vmap": lambda model, x: torch.func.vmap(lambda y: model(y[None])[0])(x),
        "jvp": lambda model, x: torch.func.jvp(model, (x,), (x,)),
        "a layer in vmap": lambda model, x: torch.func.vmap(lambda y: next(model.children())(y[None])[0])(x),
        "dual tensors": _dual,
        "batched gradients": lambda model, x: torch.autograd.grad(
            model(x)[0].flatten()[:2], x, torch.eye(2).double(), is_grads_batched=True
        ),
        "batched gradients of features": lambda model, x: torch.autograd.grad(
            next(model.children())(x)[0, :2, 0, 0], x, torch.eye(2).double(), is_grads_batched=True
        ),
    }
    said = {}
    model = shard(_seeded(_convolutions, SEED))
    for name, call in calls.items():
        with pytest.raises(UsageError) as refused:
            call(model, _images(4))
        said[name] = str(refused.value)
    package = shard(_seeded(_of_this_package("gc-2l"), SEED))
    with pytest.raises(UsageError) as refused:
        calls["grad"](package, _images(3))
    said["grad of this package's"] = str(refused.value)
    norm = shard(nn.Sequential(nn.Conv2d(3, 8, 1), SyncBatchNormOnCPU(8)).double())
    with pytest.raises(UsageError) as refused:
        functional_call(norm, {"1.running_mean": torch.zeros(8).double()}, (_images(3),))
    said["a buffer"] = str(refused.value)
    assert model(_images(4)).shape == (2, 5, 4, 4)
    return said


def _dual(model: nn.Module, x: Tensor) -> Any:
    with forward_mode.dual_level():
        return model(forward_mode.make_dual(x, x))


def test_what_a_split_model_cannot_do_is_refused() -> None:
    """It said that an autograd function of the user's must be written in another way."""
    for said in run_ranks_once(2, _refusals):
        buffer = said.pop("a buffer")
        assert buffer.startswith("running_mean of a split SyncBatchNormOnCPU must be this rank's share, got a whole")
        batched = [said.pop(name) for name in ("batched gradients", "batched gradients of features")]
        assert all(text.startswith("is_grads_batched") for text in batched), batched
        assert all(text.startswith("a split model must be called outside of torch.func's") for text in said.values())
