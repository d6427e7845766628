"""Networks whose layers usually hand on plain shares, when something is to see whole tensors between them.

A hook of the user's, or a class that does not vouch for its code, gets tensors that look whole; and a network of which
the ranks do not divide every layer has such tensors, too. Logits, gradients and statistics stay those of one device.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parallel.common import assert_close, batches, gather_gradients, run_ranks_once, seeded_model
from tlgc_mp import UsageError, create_model
from tlgc_mp.models.wide_resnet import WideResNet
from tlgc_mp.parallel import gather_state_dict, shard
from tlgc_mp.parallel.split_tensor import SplitTensor, observers, whole

CONVOLUTIONS = ("gc-2l", "gc", "gc-2l-proto", "shuffle")
CASES = [
    *((2, conv, 4, way) for conv in CONVOLUTIONS for way in ("hook", "subclass")),
    (2, "sc", 1, "hook"),
    *((4, conv, 2, "undivided") for conv in CONVOLUTIONS),
    (3, "gc-2l", 4, "undivided"),
]
"""(P, convolution, N, what lies whole)"""

TOLERANCE = 1e-11


class Ours(WideResNet):
    """Might do anything between its layers."""


def _model(conv: str, groups: int, way: str) -> nn.Module:
    model = seeded_model(conv, groups, torch.float64, "cpu")
    if way == "subclass":
        model.__class__ = Ours
    return model


def _pass(model: nn.Module, way: str) -> tuple[dict[str, Tensor], list[Any]]:
    """Logits, gradients of images, and what a hook sees of an inner block and does to its gradient."""
    seen: list[Any] = []

    def look(block: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        seen.append(output)
        return output * torch.linspace(0.5, 1.5, output.shape[1], dtype=output.dtype)[:, None, None]

    def look_back(block: nn.Module, grad_inputs: Any, grad_outputs: Any) -> None:
        seen.extend(grad_outputs)

    if way == "hook":
        block = model.get_submodule("units.1")
        block.register_forward_hook(look)
        block.register_full_backward_hook(look_back)
    images, labels = batches(1, 4, torch.float64)[0]
    images.requires_grad_()
    logits = model(images)
    assert type(logits) is Tensor
    F.cross_entropy(logits, labels).backward()
    assert type(images.grad) is Tensor
    return {"logits": logits.detach(), "image gradient": images.grad}, seen


def _statistics(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if "running" in key}


def _on_ranks(cases: tuple[tuple[str, int, str], ...]) -> dict[Any, dict[str, Tensor]]:
    answers = {}
    for conv, groups, way in cases:
        model = shard(_model(conv, groups, way))
        ran: list[str] = []
        observers.append(lambda operator, how, ran=ran: ran.append(how))  # type: ignore[misc]
        found, seen = _pass(model, way)
        observers.clear()
        assert "shares" in ran
        for index, tensor in enumerate(seen):
            assert isinstance(tensor, SplitTensor)
            found[f"seen {index}"] = whole(tensor).detach()
        answers[conv, groups, way] = {**found, **gather_gradients(model), **_statistics(gather_state_dict(model))}
    return answers


@pytest.mark.parametrize(("ranks", "conv", "groups", "way"), CASES)
def test_they_compute_what_one_device_does(ranks: int, conv: str, groups: int, way: str) -> None:
    model = _model(conv, groups, way)
    expected, seen = _pass(model, way)
    assert len(seen) == (2 if way == "hook" else 0)
    expected |= {f"seen {index}": tensor.detach() for index, tensor in enumerate(seen)}
    expected |= {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    expected |= _statistics(model.state_dict())
    cases = tuple(case[1:] for case in CASES if case[0] == ranks)
    for answers in run_ranks_once(ranks, _on_ranks, cases):
        assert_close(answers[conv, groups, way], expected, TOLERANCE)


def _refusal(layer: nn.Module, x: Tensor) -> str:
    with pytest.raises(UsageError) as refused:
        layer(x)
    return str(refused.value)


def _parts_and_parameters() -> dict[str, Any]:
    """What one who holds a split network finds in it."""
    model: Any = shard(create_model("wrn-10-2", groups=4))
    unit = model.units[0]
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    return {
        "counts": (model.stem.out_channels, unit.conv1.out_channels, unit.bn2.num_features, model.head.in_features),
        "shapes": [tuple(t.shape) for t in (model.stem.weight, unit.conv1.restriction, unit.bn1.running_mean)],
        "looks whole": isinstance(model.stem.weight, SplitTensor),
        "stored": tuple(model.stem._parameters["weight"].shape),
        "named": [tuple(param.shape) for name, param in model.named_parameters() if name == "head.weight"],
        "unit": tuple(unit(x).share.shape),
        "misfits": [_refusal(unit.conv1, misfit) for misfit in (x[:, :8], x.repeat(1, 2, 1, 1)[:, :17], x[0, 0])],
        "unbatched": torch.allclose(whole(unit.conv1(x[0])), whole(unit.conv1(x))[0], atol=1e-5),
        "class": type(model.stem).__name__,
    }


def test_a_layer_shows_the_whole_and_stores_its_share() -> None:
    for found in run_ranks_once(2, _parts_and_parameters):
        assert found == {
            "counts": (16, 32, 32, 128),
            "shapes": [(16, 3, 3, 3), (4, 4, 3, 3), (16,)],
            "looks whole": True,
            "stored": (8, 3, 3, 3),
            "named": [(10, 64)],
            "unit": (2, 16, 8, 8),
            "misfits": [
                f"input must be of shape (B, 16, H, W), got {shape}" for shape in ((2, 8, 8, 8), (2, 17, 8, 8), (8, 8))
            ],
            "unbatched": True,
            "class": "Conv2d",
        }
