"""A training step of a network on one device and of the same network split, and how far apart the two are."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tlgc_mp.parallel import gather_state_dict, whole
from tlgc_mp.parallel.sharded import ShardedLayer
from tlgc_mp.parallel.split_tensor import SplitTensor

SEED = 20261
NOISE = 1e-6
"""What is smaller is measured as if it were as large: some outputs and gradients are zero but for rounding, such as the
mean of what was normalized."""


def seed_all(seed: int) -> None:
    """Seeds every generator that a network may draw from: some draw their drop path from NumPy or Python."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


@torch.no_grad()
def make_values_differ(model: nn.Module, seed: int) -> None:
    """Adds noise to every parameter of equal values, in place: a permutation of its channels would not be seen, nor
    anything behind a scale of zero."""
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        if param.numel() > 1 and param.is_floating_point() and param.min() == param.max():
            noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            param.add_(noise.mul_(0.1).to(param.dtype))


def scalar_loss(outputs: Any) -> Tensor | None:
    """A number to which every element of every output that has a gradient contributes, each with another weight."""
    losses = []
    for index, leaf in enumerate(tree_leaves(outputs)):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            values = torch.view_as_real(leaf) if leaf.is_complex() else leaf
            weights = torch.arange(values.numel(), dtype=torch.float64).mul_(0.7).add_(index).cos_().add_(0.3)
            weights = weights.div_(math.sqrt(max(1, values.numel()))).to(values.dtype)
            losses.append((values * weights.view_as(values)).sum())
    return torch.stack([loss.double() for loss in losses]).sum() if losses else None


def own_parameters(model: nn.Module) -> Iterable[tuple[str, nn.Module, str, nn.Parameter]]:
    """(name in the model, layer, name in the layer, parameter) of each, under every name that it has."""
    for name, module in model.named_modules():
        for key, param in module._parameters.items():
            if param is not None:
                yield f"{name}.{key}" if name else key, module, key, param


@torch.no_grad()
def whole_gradients(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor | None]:
    """Parameter name -> its whole gradient, of a split model or of one on one device. Collective.

    Args:
        keep: whether this rank wants it; one that only helps the others gets an empty dict.
    """
    gradients: dict[str, Tensor | None] = {}
    for name, layer, key, param in own_parameters(model):
        gradient = param.grad
        assert type(gradient) is not SplitTensor, f"the gradient of {name} is split, and its parameter is not"
        if gradient is not None and isinstance(layer, ShardedLayer) and key in layer.tlgc_placement.dims:
            layout, ranks = layer.tlgc_placement.layout(key), layer.tlgc_region.ranks
            gradient = whole(SplitTensor(gradient.contiguous(), layout, ranks))
        if keep:
            gradients[name] = None if gradient is None else gradient.clone()
    return gradients


@dataclass
class Step:
    """What a training step gave and left behind.

    Attributes:
        outputs: leaves of what the model returned; tensors are detached.
        input_gradients: one for each tensor among the inputs that has a gradient.
        gradients: parameter name -> whole gradient, ``None`` where it got none.
        lr: the learning rate of the step.
        state: the whole state dict after the step.
        evaluated: leaves of what the model returned in evaluation, after the step, where that was asked for.
    """

    outputs: list[Any] = field(default_factory=list)
    input_gradients: list[Tensor | None] = field(default_factory=list)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    lr: float = 0.0
    state: dict[str, Tensor] = field(default_factory=dict)
    evaluated: list[Any] = field(default_factory=list)


def train_step(
    model: nn.Module,
    arguments: tuple[Any, ...],
    *,
    seed: int = SEED,
    lr: float | None = None,
    evaluate: bool = False,
    keep: bool = True,
    measuring: contextlib.AbstractContextManager[Any] | None = None,
) -> Step:
    """Forward, backward and a step of SGD, from the random state of ``seed``. Collective where ``model`` is split.

    Args:
        arguments: of ``model``; leaves that need a gradient get one.
        lr: one at which no weight moves by more than 0.05, where not given.
        evaluate: whether to run the model once more afterwards, in evaluation.
        keep: whether this rank wants gradients and state; then it holds a copy of the whole model of each.
        measuring: a context for the forward and the backward pass.
    """
    step = Step()
    leaves = [t for t in tree_leaves(arguments) if isinstance(t, Tensor) and t.requires_grad]
    for leaf in leaves:
        leaf.grad = None
    model.zero_grad(set_to_none=True)
    seed_all(seed)
    with measuring or contextlib.nullcontext():
        outputs = model(*arguments)
        loss = scalar_loss(outputs)
        if loss is not None:
            loss.backward()
    step.outputs = detached(outputs)
    step.input_gradients = [None if leaf.grad is None else leaf.grad.clone() for leaf in leaves]
    step.gradients = whole_gradients(model, keep=keep)
    largest = max((g.abs().max().item() for g in step.gradients.values() if g is not None and g.numel()), default=0.0)
    step.lr = lr if lr is not None else 0.05 / max(1.0, largest)
    torch.optim.SGD(model.parameters(), lr=step.lr).step()
    if evaluate:
        model.eval()
        with torch.no_grad():
            step.evaluated = detached(model(*arguments))
        model.train()
    step.state = gather_state_dict(model, keep=keep)
    return step


def detached(tree: Any) -> list[Any]:
    return [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves(tree)]


def difference(found: Any, expected: Any, least: float = 0.0) -> float:
    """The largest difference of two leaves in units of the largest expected value, or of ``least`` where that is more.

    Infinite where one is a tensor and the other is not, or of another type, shape, or place of NaN.
    """
    if isinstance(expected, float) and isinstance(found, float):
        found, expected = torch.tensor(found, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)
    if not isinstance(expected, Tensor):
        return 0.0 if type(found) is type(expected) and found == expected else math.inf
    if type(found) is not type(expected) or found.shape != expected.shape or found.dtype != expected.dtype:
        return math.inf
    if not expected.numel():
        return 0.0
    if not (expected.is_floating_point() or expected.is_complex()):
        return 0.0 if torch.equal(found, expected) else math.inf
    if expected.dtype in (torch.float32, torch.float64):
        low, high = (bound.item() for bound in (found - expected).aminmax())
        least_value, most = (bound.item() for bound in expected.aminmax())
        if all(map(math.isfinite, (low, high, least_value, most))):
            return max(-low, high) / max(-least_value, most, least, 1e-300)
    off = torch.where(found == expected, 0.0, (found - expected).abs().double())
    off = torch.where(found.isnan() & expected.isnan(), 0.0, off)
    finite = expected.abs().double()
    finite = finite[finite.isfinite()]
    scale = max(finite.max().item() if finite.numel() else 0.0, least, 1e-300)
    largest = off.max().item()
    return math.inf if math.isnan(largest) else largest / scale


def differences(found: Step, expected: Step) -> dict[str, float]:
    """How far each thing that a step left behind is off; parts of a gradient are measured by the largest of all."""
    off = {}
    for what in ("outputs", "evaluated"):
        own, theirs = getattr(found, what), getattr(expected, what)
        if len(own) != len(theirs):
            off[what] = math.inf
        else:
            off |= {f"{what}[{i}]": difference(a, b, NOISE) for i, (a, b) in enumerate(zip(own, theirs, strict=True))}
    off |= {
        f"input_gradients[{i}]": difference(a, b, NOISE)
        for i, (a, b) in enumerate(zip(found.input_gradients, expected.input_gradients, strict=True))
    }
    # Some gradients are zero but for rounding: a bias before a BatchNorm. Of 3,000 random networks nine had one
    # that was off by 1e-14 to 1.4e-13 of the largest gradient; one that is wrong is off by its own size.
    gradients = [g.abs().max().item() for g in expected.gradients.values() if g is not None and g.numel()]
    off |= _by_name("gradient", found.gradients, expected.gradients, 1e-3 * max(gradients, default=0.0))
    off |= _by_name("state", found.state, expected.state, 1e-6)
    return off


def _by_name(what: str, found: Mapping[str, Any], expected: Mapping[str, Any], least: float) -> dict[str, float]:
    off = {f"{what} of {name}": math.inf for name in found.keys() ^ expected.keys()}
    return off | {f"{what} of {n}": difference(found[n], expected[n], least) for n in expected.keys() & found.keys()}


def worst(found: Step, expected: Step) -> tuple[float, str]:
    """The largest difference, and what it is of."""
    off = differences(found, expected)
    name = max(off, key=off.__getitem__)
    return off[name], name
