"""torch.compile takes whole models, in training, and gives the same gradients."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from tlgc_mp import convert, create_model
from tlgc_mp.models.names import CONVOLUTIONS, TWO_LEVEL

SEED = 59


def _gradients(run: nn.Module, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    names, params = zip(*model.named_parameters(), strict=True)
    torch.manual_seed(SEED)  # of dropout
    return dict(zip(names, torch.autograd.grad(run(images).square().sum(), params), strict=True))


def _check(model: nn.Module, side: int) -> None:
    """Compares without a graph break and as it is; fails where there would be one."""
    model = model.double().train()
    images = torch.randn(4, 3, side, side, dtype=torch.float64)
    expected = _gradients(model, model, images)
    found = _gradients(torch.compile(model, backend="aot_eager", fullgraph=True), model, images)
    for name, want in expected.items():
        message = f"{name}, seed {SEED}"
        torch.testing.assert_close(found[name], want, rtol=1e-9, atol=1e-9, msg=lambda m, n=message: f"{n}: {m}")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()  # what is kept of a class of layers is limited
    torch.manual_seed(SEED)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("conv", CONVOLUTIONS)
def test_without_a_graph_break(conv: str) -> None:
    init = "scaled" if conv in TWO_LEVEL else "zero"
    _check(create_model("wrn-10-1", conv=conv, groups=1 if conv == "sc" else 4, coarse_init=init), 16)


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mobilenet_v2", "imagenet-wrn-34-2"])
def test_models_for_imagenet(name: str) -> None:
    _check(create_model(name, groups=4, num_classes=10, coarse_init="scaled"), 64)


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["test_resnet", pytest.param("resnet18", marks=pytest.mark.slow), "mobilenet_v3_small"]
)
def test_converted_models(name: str) -> None:
    """In every run ``test_resnet`` stands for residual blocks, ``mobilenet_v3_small`` for depthwise ones."""
    library = timm if name.startswith("test") else torchvision.models
    made = library.create_model(name, num_classes=10) if library is timm else getattr(library, name)(num_classes=10)
    _check(convert(made, groups=4, init="from_dense"), 64)
