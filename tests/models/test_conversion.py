"""Converting any torch CNN: what is replaced, what is left and why, and what a layer keeps."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from tlgc_mp import convert
from tlgc_mp.models import Conversion, create_model
from tlgc_mp.nn import (
    BalancedConv2d,
    FullyLearnableGroupConv2d,
    ShuffleConv2d,
    TwoLevelConv2d,
    TwoLevelPrototypeConv2d,
    init_parameters,
)

SEED = 15
KINDS: dict[str, type[nn.Module]] = {
    "gc": nn.Conv2d,
    "gc-2l": TwoLevelConv2d,
    "gc-2l-proto": TwoLevelPrototypeConv2d,
    "shuffle": ShuffleConv2d,
    "flgc": FullyLearnableGroupConv2d,
    "bgc": BalancedConv2d,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "torchvision resnet18": functools.partial(torchvision.models.resnet18, num_classes=10),
    "torchvision mobilenet_v2": functools.partial(torchvision.models.mobilenet_v2, num_classes=10),
    "timm resnet10t": functools.partial(timm.create_model, "resnet10t", num_classes=10, zero_init_last=False),
    "timm mobilenetv3_small_050": functools.partial(timm.create_model, "mobilenetv3_small_050", num_classes=10),
}


def network(*middle: nn.Module) -> nn.Sequential:
    """A stem of 8 channels, ``middle``, and a head."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), *middle, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def report(model: nn.Module) -> Conversion:
    assert isinstance(model.conversion, Conversion)
    return model.conversion


def dense_convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Those that are neither the first nor grouped."""
    found = [(name, module) for name, module in model.named_modules() if type(module) is nn.Conv2d]
    return {name: module for name, module in found[1:] if module.groups == 1}


def output_shapes(model: nn.Module, names: list[str], images: Tensor) -> dict[str, torch.Size]:
    shapes: dict[str, torch.Size] = {}
    hooks = []
    for name in names:

        def see(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
            shapes[name] = output.shape

        hooks.append(model.get_submodule(name).register_forward_hook(see))
    model(images)
    for hook in hooks:
        hook.remove()
    return shapes


@pytest.mark.parametrize(
    ("name", "conv"),
    [*((name, "gc-2l") for name in MODELS), *(("torchvision resnet18", conv) for conv in KINDS if conv != "gc-2l")],
)
def test_a_converted_model_trains(name: str, conv: str) -> None:
    torch.manual_seed(SEED)
    model = MODELS[name]()
    images, labels = torch.randn(4, 3, 64, 64), torch.arange(4)
    dense = dense_convolutions(model)
    sizes = {key: sum(param.numel() for param in layer.parameters()) for key, layer in dense.items()}
    expected = output_shapes(model, list(dense), images)

    assert convert(model, conv=conv, groups=4) is model
    assert output_shapes(model, list(dense), images) == expected
    assert {key: old for key, (old, _) in report(model).replaced.items()} == sizes
    for key, (_, new) in report(model).replaced.items():
        layer = model.get_submodule(key)
        assert type(layer) is KINDS[conv]
        assert layer.groups == 4
        assert new == sum(param.numel() for param in layer.parameters())

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):  # restrictions have no part in the first output, as prolongations start at zero
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    for key, param in model.named_parameters():
        assert param.grad is not None and param.grad.isfinite().all(), key
        if "selection" not in key:  # of a softmax that saturates, in float32
            assert not torch.equal(param, before[key]), key


LAYERS = {
    "plain": {},
    "strided, padded by a pair, dilated": {"stride": (2, 1), "padding": (2, 1), "dilation": (1, 2), "bias": False},
    "padding='same'": {"padding": "same", "dilation": 2},
    "a kernel that is not square": {"kernel_size": (1, 3), "padding": "valid"},
}


@pytest.mark.parametrize("conv", KINDS)
@pytest.mark.parametrize("arguments", LAYERS.values(), ids=LAYERS)
def test_a_layer_keeps_what_it_has(arguments: dict[str, Any], conv: str) -> None:
    """All but its weights: with blocks outside of the diagonal at zero, not even those."""
    torch.manual_seed(SEED)
    layer = nn.Conv2d(8, 8, **{"kernel_size": 3, **arguments}, dtype=torch.float64)
    with torch.no_grad():
        layer.weight[:4, 4:] = layer.weight[4:, :4] = 0.0
    layer.to(memory_format=torch.channels_last).eval()
    layer.weight.requires_grad_(False)
    x = torch.randn(2, 8, 7, 6, dtype=torch.float64)
    fits = conv in ("gc", "gc-2l", "bgc")
    model = convert(network(layer).eval(), conv=conv, groups=2, init="from_dense" if fits else "random")
    new = model.get_submodule("1")
    assert type(new) is KINDS[conv]
    assert not new.training
    assert new(x).shape == layer(x).shape
    assert ("bias" in dict(new.named_parameters())) == (layer.bias is not None)
    for key, param in new.named_parameters():
        assert param.dtype == torch.float64, key
        assert param.requires_grad == (key == "bias"), key
        assert param.is_contiguous(memory_format=torch.channels_last) or param.dim() != 4, key
    if fits:
        torch.testing.assert_close(new(x), layer(x), rtol=0, atol=1e-12, msg=lambda m: f"seed {SEED}: {m}")


@pytest.mark.parametrize("conv", KINDS)
def test_random_weights_are_the_layers_own(conv: str) -> None:
    model = network(nn.Conv2d(8, 8, 3, bias=False))
    torch.manual_seed(SEED)
    expected = KINDS[conv](8, 8, 3, groups=4, bias=False)
    torch.manual_seed(SEED)
    found = convert(model, conv=conv, groups=4).get_submodule("1")
    for key, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key


def test_fitting_draws_nothing_at_random() -> None:
    model = network(nn.Conv2d(8, 8, 3))
    state = torch.get_rng_state()
    convert(model, groups=4, init="from_dense")
    assert torch.equal(torch.get_rng_state(), state)


class Subclass(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


def _with_hook() -> nn.Module:
    layer = nn.Conv2d(8, 8, 3)
    layer.register_forward_hook(lambda module, inputs, output: output)
    return layer


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "groups": (lambda: nn.Conv2d(8, 8, 3, groups=2), "grouped already: groups=2"),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), "grouped already: groups=8"),
    "inputs": (lambda: nn.Conv2d(6, 8, 3), "groups=4 does not divide its channels: 6 to 8"),
    "outputs": (lambda: nn.Conv2d(8, 6, 3), "groups=4 does not divide its channels: 8 to 6"),
    "reflected": (
        lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        "padding is not of zeros: padding_mode='reflect'",
    ),
    "subclass": (lambda: Subclass(8, 8, 3), "not a plain Conv1d, Conv2d or Conv3d: Subclass"),
    "lazy": (lambda: nn.LazyConv2d(8, 3), "not a plain Conv1d, Conv2d or Conv3d: LazyConv2d"),
    "transposed": (lambda: nn.ConvTranspose2d(8, 8, 3), "not a plain Conv1d, Conv2d or Conv3d: ConvTranspose2d"),
    "inputs of a waveform": (lambda: nn.Conv1d(6, 8, 3), "groups=4 does not divide its channels: 6 to 8"),
    "converted": (lambda: TwoLevelConv2d(8, 8, 3, groups=2), "not a plain Conv1d, Conv2d or Conv3d: TwoLevelConv2d"),
    "hooked": (_with_hook, "hooks or a parametrization would be lost"),
    "weight norm": (
        lambda: nn.utils.weight_norm(nn.Conv2d(8, 8, 3)),
        "hooks or a parametrization would be lost",
    ),
    "parametrized": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)),
        "not a plain Conv1d, Conv2d or Conv3d: ParametrizedConv2d",
    ),
    "cannot be centred": (
        lambda: nn.Conv2d(8, 8, 2, padding="same"),
        "no such gc-2l layer: padding must be given in numbers unless stride is 1 and dilation * (kernel_size - 1) is "
        "even, got 'same' with stride=(1, 1), kernel_size=(2, 2), dilation=(1, 1)",
    ),
}


def test_what_is_left_and_why() -> None:
    model = network(nn.Conv2d(8, 8, 3), *(make() for make, _ in LEFT.values()))
    kept = dict(model.named_children())
    convert(model, groups=4)
    names = [str(index) for index in range(2, 2 + len(LEFT))]
    reasons = {name: reason for name, (_, reason) in zip(names, LEFT.values(), strict=True)}
    assert report(model).left == {"0": "the stem", **reasons}
    assert report(model).replaced == {"1": (8 * 8 * 9 + 8, 8 * 8 * 9 // 4 + 8 * 9 + 8 * 4 + 8)}
    assert all(model.get_submodule(name) is kept[name] for name in report(model).left)


def test_the_report_is_a_table() -> None:
    model = convert(network(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1, groups=8)), conv="gc", groups=4)
    assert str(report(model)) == (
        "1  gc, 4 groups: 584 -> 152 parameters\n"
        "0  left: the stem\n"
        "2  left: grouped already: groups=8\n"
        "1 replaced, 2 left: 584 -> 152 parameters"
    )


@pytest.mark.parametrize(
    "where",
    ["layer[34].*", lambda name, layer: name.startswith(("layer3.", "layer4."))],
    ids=["pattern", "function"],
)
def test_where_selects(where: Any) -> None:
    model = torchvision.models.resnet18()
    expected = [name for name in dense_convolutions(model) if name[:6] in ("layer3", "layer4")]
    convert(model, groups=2, where=where)
    assert list(report(model).replaced) == expected
    assert {reason for name, reason in report(model).left.items() if name != "conv1"} == {"not selected by where"}


def test_where_is_asked_with_the_layer() -> None:
    model = convert(torchvision.models.resnet18(), groups=2, where=lambda name, layer: layer.kernel_size == (1, 1))
    assert list(report(model).replaced) == [f"layer{stage}.0.downsample.0" for stage in (2, 3, 4)]


def test_a_part_can_be_converted_after_another() -> None:
    model = convert(create_model("wrn-10-1", conv="sc"), groups=4, where="units.2.*")
    convert(model, conv="gc", groups=2)
    assert type(model.get_submodule("units.2.conv1")) is TwoLevelConv2d
    expected = ["units.0.conv1", "units.0.conv2", "units.1.conv1", "units.1.conv2", "units.1.shortcut"]
    assert list(report(model).replaced) == expected


def test_a_head_that_is_a_convolution_is_left() -> None:
    model = convert(torchvision.models.squeezenet1_1(), groups=2)
    assert report(model).left == {"features.0": "the stem", "classifier.1": "the head"}


def test_a_layer_used_twice_is_replaced_once() -> None:
    shared = nn.Conv2d(8, 8, 3, padding=1)
    model = network(shared, nn.ReLU(), nn.Sequential(shared))
    convert(model, groups=2, where="3.0")
    assert list(report(model).replaced) == ["1"]
    assert type(model.get_submodule("1")) is TwoLevelConv2d
    assert model.get_submodule("1") is model.get_submodule("3.0")


@pytest.mark.parametrize("key", ["weight", "bias"])
def test_a_parameter_of_two_layers_keeps_both_as_they_are(key: str) -> None:
    first, second, third = (nn.Conv2d(8, 8, 3) for _ in range(3))
    setattr(second, key, getattr(first, key))
    model = convert(network(first, second, third), groups=2)
    assert list(report(model).replaced) == ["3"]
    assert report(model).left == {
        "0": "the stem",
        "1": f"tied to another layer: {key}",
        "2": f"tied to another layer: {key}",
    }


@pytest.mark.parametrize("conv", KINDS)
def test_meta_device(conv: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet18(num_classes=10)
    convert(model, conv=conv, groups=4)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    init_parameters(model.to_empty(device="cpu"), SEED)
    assert model(torch.randn(2, 3, 32, 32)).isfinite().all()


def test_it_needs_no_deepspeed() -> None:
    code = (
        "import sys, torch, tlgc_mp; from torch import nn; "
        "tlgc_mp.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3)), groups=2, init='from_dense'); "
        "print([name for name in sys.modules if name.startswith(('deepspeed', 'tlgc_mp.parallel'))])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"


def test_coarse_level_as_asked_for() -> None:
    model = convert(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), groups=2, coarse_kernel_size=1, coarse_init="he"
    )
    layer = model[1]  # type: ignore[index]
    assert isinstance(layer, TwoLevelConv2d)
    assert layer.restriction.shape[-2:] == (1, 1) and layer.prolongation.abs().min() > 0


class MadeOtherwise(nn.Conv3d):
    """As torchvision's networks for videos have them."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, bias=False)

    @staticmethod
    def reduces() -> int:
        return 1


DENSE: dict[int, type[nn.Module]] = {1: nn.Conv1d, 3: nn.Conv3d}


@pytest.mark.parametrize("conv", [conv for conv in KINDS if conv != "flgc"])
@pytest.mark.parametrize("dims", DENSE)
def test_waveforms_and_volumes(dims: int, conv: str) -> None:
    torch.manual_seed(SEED)
    dense, size = DENSE[dims], (9, 7, 6)[:dims]
    model = nn.Sequential(dense(3, 8, 3), dense(8, 12, 3, stride=2, padding=1, bias=True), dense(12, 5, 1)).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    shape = model(x).shape
    convert(model, conv=conv, groups=4)
    assert report(model).left == {"0": "the stem", "2": "the head"}
    kind = KINDS[conv].__name__.replace("2d", f"{dims}d")
    assert type(model[1]).__name__ == kind and model[1].groups == 4
    assert model(x).shape == shape
    model(x).square().sum().backward()
    assert all(param.grad is not None and param.grad.isfinite().all() for param in model.parameters())


@pytest.mark.parametrize("dims", DENSE)
@pytest.mark.parametrize("dial", [{}, {"coarse_channels": 200}, {"coarse_channels": 200, "coarse_sum": True}])
def test_weights_of_waveforms_and_volumes_are_fitted(dial: dict[str, Any], dims: int) -> None:
    """Exactly, with enough representatives; and else closer than those of groups alone."""
    torch.manual_seed(SEED)
    dense = DENSE[dims](8, 12, 3, stride=2, padding=1, dtype=torch.float64)
    x = torch.randn(2, 8, *(9, 7, 6)[:dims], dtype=torch.float64)
    errors = {}
    for conv, given in (("gc-2l", dial), ("gc", {}), ("bgc", {})):
        model = convert(
            nn.Sequential(DENSE[dims](3, 8, 1), copy.deepcopy(dense), nn.Linear(1, 1)),
            conv=conv, groups=4, init="from_dense", **given,
        )  # fmt: skip
        errors[conv] = (model.get_submodule("1")(x) - dense(x)).abs().max().item()
    assert errors["gc-2l"] < errors["gc"] > errors["bgc"], f"{errors}, seed {SEED}"
    assert errors["gc-2l"] < 1e-12 or not dial, f"{errors}, seed {SEED}"


def test_a_subclass_that_only_says_how_it_is_made_is_replaced() -> None:
    model = convert(nn.Sequential(nn.Conv3d(3, 8, 3), MadeOtherwise(8), nn.Conv1d(8, 8, 3)), groups=2)
    assert list(report(model).replaced) == ["1", "2"]


def test_learned_groups_are_of_images() -> None:
    model = convert(nn.Sequential(nn.Conv3d(3, 8, 3), nn.Conv3d(8, 8, 3), nn.Conv2d(8, 8, 3)), conv="flgc", groups=2)
    assert report(model).left["1"] == "no such flgc layer: convolution must be of one of 2 dimensions, got 3"


class InAList(nn.Module):
    """Its layers stand in a list, a dict and a closure, too, and are called from there."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.second, self.third = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.steps = [self.stem, self.second]
        third = self.third
        self.named = {"last": lambda x: third(x)}

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = torch.relu(step(x))
        return self.named["last"](x)


def test_what_a_list_holds_is_replaced_too() -> None:
    model = convert(InAList(), groups=4)
    assert isinstance(model.second, TwoLevelConv2d) and model.steps[1] is model.second  # type: ignore[index]
    model(torch.randn(2, 3, 9, 9)).sum().backward()
    unused = [name for name, param in model.named_parameters() if param.grad is None]
    assert not unused, "no gradient reaches these"
