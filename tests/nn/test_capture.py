"""Tools that record or transform a call take every layer: torch.export, torch.fx, torch.jit.trace, torch.func."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tlgc_mp.nn import (
    BalancedConv1d,
    BalancedConv2d,
    BalancedConv3d,
    FullyLearnableGroupConv2d,
    ShuffleConv1d,
    ShuffleConv2d,
    ShuffleConv3d,
    TwoLevelConv1d,
    TwoLevelConv2d,
    TwoLevelConv3d,
    TwoLevelPrototypeConv2d,
    init_parameters,
)
from tlgc_mp.nn.two_level import COARSE_MODES

SEED = 41
WINDOW = {"stride": 2, "padding": 1, "groups": 4, "bias": True, "dtype": torch.float64}


def two_level(mode: str, coarse_channels: int = 1, coarse_sum: bool = False) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        dial = {"coarse_channels": coarse_channels, "coarse_sum": coarse_sum}
        layer = TwoLevelConv2d(8, 12, 3, coarse_init="he", **WINDOW, **dial)
        layer.coarse_mode = mode
        return layer

    return make


def of_dimensions(kind: type[TwoLevelConv1d | TwoLevelConv3d], mode: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layer = kind(8, 12, 3, coarse_init="he", coarse_channels=2, **WINDOW)
        layer.coarse_mode = mode
        return layer

    return make


OTHERS: dict[str, Callable[[], nn.Module]] = {
    **{f"waveforms, {mode}": of_dimensions(TwoLevelConv1d, mode) for mode in COARSE_MODES},
    **{f"volumes, {mode}": of_dimensions(TwoLevelConv3d, mode) for mode in COARSE_MODES},
    "waveforms, cropped": lambda: TwoLevelConv1d(
        8, 12, 3, coarse_kernel_size=1, coarse_init="he", **{**WINDOW, "padding": 0}
    ),
    "volumes, cropped": lambda: TwoLevelConv3d(
        8, 12, 3, coarse_kernel_size=1, coarse_init="he", **{**WINDOW, "padding": 0}
    ),
    "waveforms, balanced": lambda: BalancedConv1d(8, 12, 3, **WINDOW),
    "volumes, balanced": lambda: BalancedConv3d(8, 12, 3, **WINDOW),
    "waveforms, shuffled": lambda: ShuffleConv1d(8, 12, 3, **WINDOW),
    "volumes, shuffled": lambda: ShuffleConv3d(8, 12, 3, **WINDOW),
}
"""Of another number of dimensions."""


@pytest.mark.parametrize("kind", OTHERS)
def test_waveforms_and_volumes(kind: str) -> None:
    """Captured by each tool, and without a batch."""
    torch.manual_seed(SEED)
    layer = OTHERS[kind]()
    size = (9, 5, 6)[: 1 if kind.startswith("waveforms") else 3]
    x = torch.randn(5, 8, *size, dtype=torch.float64)
    expected = layer(x)
    dynamic = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(layer, (x[:2],), dynamic_shapes=dynamic).module()
    by_sample = torch.func.vmap(lambda one: layer(one[None])[0])(x)
    for found in (exported(x), torch.fx.symbolic_trace(layer)(x), by_sample, torch.stack([layer(one) for one in x])):
        close(found, expected)


def frozen() -> nn.Module:
    return FullyLearnableGroupConv2d(8, 12, 3, **WINDOW).frozen()


LAYERS: dict[str, Callable[[], nn.Module]] = {
    **{mode: two_level(mode) for mode in COARSE_MODES},
    **{f"{mode}, r = 2": two_level(mode, 2) for mode in COARSE_MODES},
    **{f"{mode}, r = 2, summed": two_level(mode, 2, True) for mode in COARSE_MODES},
    "wide restriction": lambda: TwoLevelConv2d(8, 12, 3, coarse_kernel_size=5, coarse_init="he", **WINDOW),
    "cropped restriction": lambda: TwoLevelConv2d(
        8, 12, 3, coarse_kernel_size=1, coarse_init="he", **{**WINDOW, "padding": 0}
    ),
    "prototype": lambda: TwoLevelPrototypeConv2d(8, 12, 3, coarse_init="he", **WINDOW),
    "shuffle": lambda: ShuffleConv2d(8, 12, 3, **WINDOW),
    "balanced": lambda: BalancedConv2d(8, 12, 3, **WINDOW),
    "learned": lambda: FullyLearnableGroupConv2d(8, 12, 3, **WINDOW),
    "frozen": frozen,
}


@pytest.fixture(params=LAYERS)
def network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(SEED)
    layer = LAYERS[request.param]()
    with torch.no_grad():
        for param in layer.parameters():
            param.normal_()
    return nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.LazyLinear(3, dtype=torch.float64))


def images(batch: int) -> Tensor:
    return torch.randn(batch, 8, 9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_export(network: nn.Module, gradients: bool, strict: bool) -> None:
    network(images(2))
    dynamic = ({0: torch.export.Dim("batch")},)
    with torch.set_grad_enabled(gradients):
        program = torch.export.export(network, (images(2),), dynamic_shapes=dynamic, strict=strict)
    close(program.module()(images(5)), network(images(5)))


def test_symbolic_trace(network: nn.Module) -> None:
    expected = network(images(3))
    close(torch.fx.symbolic_trace(network)(images(3)), expected)


@pytest.mark.filterwarnings("ignore")
def test_jit_trace(network: nn.Module) -> None:
    network(images(2))
    close(torch.jit.trace(network, images(2))(images(2)), network(images(2)))


def test_gradients_by_sample(network: nn.Module) -> None:
    batch = images(3)
    network(batch)
    params = {name: param.detach() for name, param in network.named_parameters()}

    def loss(params: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(network, params, (image[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, batch)
    for index, image in enumerate(batch):
        expected = torch.autograd.grad(network(image[None]).square().sum(), list(network.parameters()))
        for (name, grads), want in zip(found.items(), expected, strict=True):
            torch.testing.assert_close(grads[index], want, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_an_ensemble(network: nn.Module) -> None:
    batch = images(3)
    network(batch)
    members = [{name: scale * param.detach() for name, param in network.named_parameters()} for scale in (1.0, 0.5)]
    stacked = {name: torch.stack([member[name] for member in members]) for name in members[0]}
    found = torch.func.vmap(lambda params: torch.func.functional_call(network, params, (batch,)))(stacked)
    for got, member in zip(found, members, strict=True):
        close(got, torch.func.functional_call(network, member, (batch,)))


@pytest.mark.parametrize("mode", COARSE_MODES)
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_onnx(mode: str, gradients: bool) -> None:
    check_onnx(two_level(mode)(), images(5), gradients)


@pytest.mark.parametrize("kind", [kind for kind in OTHERS if any(mode in kind for mode in COARSE_MODES)])
@pytest.mark.filterwarnings("ignore")
def test_onnx_of_waveforms_and_volumes(kind: str) -> None:
    size = (9, 5, 6)[: 1 if kind.startswith("waveforms") else 3]
    check_onnx(OTHERS[kind](), torch.randn(5, 8, *size, generator=torch.Generator().manual_seed(SEED)), False)


def check_onnx(layer: nn.Module, x: Tensor, gradients: bool) -> None:
    import onnxruntime

    init_parameters(layer, SEED)
    layer, x = layer.float().eval(), x.float()
    batch = x[:2]
    with torch.set_grad_enabled(gradients):
        program = torch.onnx.export(
            layer, (batch,), dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
    assert program is not None
    model = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", COARSE_MODES)
def test_export_under_autocast(mode: str) -> None:
    torch.manual_seed(SEED)
    layer = two_level(mode)().float()
    init_parameters(layer, SEED)
    batch = images(2).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = torch.export.export(layer, (batch,)).module()(batch)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), layer(batch), rtol=0.02, atol=0.05)
