"""Models by name: the WideResNets' structure, seed, life on the meta device, and the names that are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tlgc_mp.errors import UsageError
from tlgc_mp.models import MobileNetV2, WideResNet, create_model
from tlgc_mp.models.names import TWO_LEVEL, check_model, check_split, default_classes, parse_model
from tlgc_mp.nn import TwoLevelConv2d
from tlgc_mp.parallel.plan import plan

Shape = tuple[int, int, tuple[int, int], tuple[int, int], tuple[int, int], int]


def convolutions(model: nn.Module) -> dict[str, Shape]:
    """Name -> (n, m, kernel, stride, padding, groups) of every convolution."""
    return {
        name: (m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding, m.groups)  # type: ignore[misc]
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d | TwoLevelConv2d)
    }


def expected_convolutions(units: int, width: int, groups: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {"stem": (3, 16, (3, 3), (1, 1), (1, 1), 1)}
    n = 16
    for stage, m in enumerate((16 * width, 32 * width, 64 * width)):
        for unit in range(units):
            name = f"units.{stage * units + unit}"
            stride = (2, 2) if stage > 0 and unit == 0 else (1, 1)
            shapes[f"{name}.conv1"] = (n, m, (3, 3), stride, (1, 1), groups)
            shapes[f"{name}.conv2"] = (m, m, (3, 3), (1, 1), (1, 1), groups)
            if n != m:
                shapes[f"{name}.shortcut"] = (n, m, (1, 1), stride, (0, 0), groups)
            n = m
    return shapes


def expected_imagenet_convolutions(groups: int) -> dict[str, Shape]:
    """Of ResNet-34 (Table 1 of https://arxiv.org/abs/1512.03385), the units twice as wide."""
    shapes: dict[str, Shape] = {"stem.0": (3, 64, (7, 7), (2, 2), (3, 3), 1)}
    n, unit = 64, 0
    for m, units in ((128, 3), (256, 4), (512, 6), (1024, 3)):
        for _ in range(units):
            stride = (2, 2) if m > 128 and n != m else (1, 1)
            shapes[f"units.{unit}.conv1"] = (n, m, (3, 3), stride, (1, 1), groups)
            shapes[f"units.{unit}.conv2"] = (m, m, (3, 3), (1, 1), (1, 1), groups)
            if n != m:
                shapes[f"units.{unit}.shortcut"] = (n, m, (1, 1), stride, (0, 0), groups)
            n, unit = m, unit + 1
    return shapes


@pytest.mark.parametrize(("conv", "groups"), [("sc", 1), ("gc", 4), ("gc-2l", 4)])
@pytest.mark.parametrize(("depth", "width", "count"), [(10, 1, 9), (16, 2, 16), (28, 10, 28)])
def test_every_convolution_but_the_stem_is_replaced(conv: str, groups: int, depth: int, width: int, count: int) -> None:
    model = create_model(f"wrn-{depth}-{width}", conv=conv, groups=groups, device="meta")
    found = convolutions(model)
    assert found == expected_convolutions((depth - 4) // 6, width, groups)
    assert len(found) == count
    assert type(model.get_submodule("stem")) is nn.Conv2d
    kind = TwoLevelConv2d if conv == "gc-2l" else nn.Conv2d
    assert all(type(model.get_submodule(name)) is kind for name in found if name != "stem")
    assert [name for name, _ in model.named_parameters() if name.endswith("bias") and "conv" in name] == []


@pytest.mark.parametrize(("conv", "groups"), [("sc", 1), ("gc", 4), ("gc-2l", 64)])
def test_imagenet_wide_resnet(conv: str, groups: int) -> None:
    model = create_model("imagenet-wrn-34-2", conv=conv, groups=groups, device="meta")
    found = convolutions(model)
    assert found == expected_imagenet_convolutions(groups)
    assert len(found) == 1 + 2 * 16 + 4
    kind = TwoLevelConv2d if conv == "gc-2l" else nn.Conv2d
    assert all(type(model.get_submodule(name)) is kind for name in found if name != "stem.0")
    assert model.get_submodule("head").weight.shape == (1000, 1024)


@pytest.mark.parametrize("size", [64, 33])
def test_imagenet_wide_resnet_on_small_images(size: int) -> None:
    torch.manual_seed(3)
    model = create_model("imagenet-wrn-34-2", groups=16, num_classes=7, coarse_init="he").eval()
    images = torch.randn(2, 3, size, size)
    stem = model.get_submodule("stem")
    with torch.no_grad():
        expected = F.max_pool2d(F.conv2d(images, stem[0].weight, None, 2, 3), 3, 2, 1)  # type: ignore[index]
        torch.testing.assert_close(stem(images), expected)
        assert expected.shape == (2, 64, -(-size // 4), -(-size // 4))
        logits = model(images)
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


def test_logits_are_those_of_the_units_in_a_row() -> None:
    """Figure 3, written once more with dense layers: pre-activation, the shortcut on the activated input."""
    torch.manual_seed(3)
    model = create_model("wrn-16-2", conv="sc", num_classes=7).double().eval()
    images = torch.randn(2, 3, 12, 16, dtype=torch.float64)
    layers = {name: module for name, module in model.named_modules() if name}
    with torch.no_grad():
        for module in layers.values():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
        x = layers["stem"](images)
        for unit in range(6):
            name = f"units.{unit}"
            activated = torch.relu(layers[f"{name}.bn1"](x))
            residual = layers[f"{name}.conv2"](torch.relu(layers[f"{name}.bn2"](layers[f"{name}.conv1"](activated))))
            x = residual + (layers[f"{name}.shortcut"](activated) if f"{name}.shortcut" in layers else x)
        assert x.shape == (2, 128, 3, 4)
        features = torch.relu(layers["bn"](x)).flatten(2).sum(2) / 12
        expected = features @ layers["head"].weight.t() + layers["head"].bias
        logits = model(images)
    assert logits.shape == (2, 7)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)


def test_forward_leaves_its_input_alone() -> None:
    torch.manual_seed(3)
    model = create_model("wrn-10-1", groups=2, coarse_init="he")
    images = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    before = images.clone()
    model(images)
    assert torch.equal(images, before)


class NothingAllocated(TorchDispatchMode):
    """Fails at the first operator whose result holds more than one real number."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        assert not isinstance(result, Tensor) or result.is_meta or result.numel() <= 1, f"{func} allocates"
        return result


@pytest.mark.parametrize(
    ("name", "kind"), [("wrn-28-80", WideResNet), ("imagenet-wrn-34-2", WideResNet), ("mobilenet_v2", MobileNetV2)]
)
def test_meta_device_allocates_nothing(name: str, kind: type[nn.Module]) -> None:
    with NothingAllocated():
        model = create_model(name, groups=4, device="meta")
    assert isinstance(model, kind)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_default_device_is_followed() -> None:
    with torch.device("meta"):
        model = create_model("wrn-10-1")
    assert all(param.is_meta for param in model.parameters())
    assert not any(tensor.is_meta for tensor in create_model("wrn-10-1").state_dict().values())


def test_the_seed_makes_the_model() -> None:
    def state(seed: int, draws: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        torch.rand(draws)
        return create_model("wrn-10-1", groups=4, coarse_init="he").state_dict()

    first, again, other = state(5, 0), state(5, 3), state(6, 0)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert all(torch.isfinite(value).all() for value in first.values())
    for key in ("stem.weight", "units.0.conv1.weight", "units.1.shortcut.prolongation", "head.weight"):
        assert not torch.equal(first[key], other[key]), key


KNOWN = "model must be wrn-<depth>-<width>, imagenet-wrn-34-2, mobilenet_v2, torchvision:<name> or timm:<name>, got "
MOBILENET = {"name": "mobilenet_v2"}
NO_CHANGE = f"coarse_everywhere must be False but for mobilenet_v2 with one of {', '.join(TWO_LEVEL)}, got True with "
NO_CHANGE += "model={!r} and conv={!r}"

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"name": "resnet-18"}, f"{KNOWN}'resnet-18'; use e.g. wrn-28-10"),
    ({"name": "wrn-28-10x"}, f"{KNOWN}'wrn-28-10x'; use e.g. wrn-28-10"),
    ({"name": "imagenet-wrn-50-2"}, f"{KNOWN}'imagenet-wrn-50-2'; use e.g. wrn-28-10"),
    ({"name": "wrn-27-10"}, "model must be of a depth 6 u + 4, got 'wrn-27-10'; use one of 10, 16, 22, 28, 34, 40"),
    ({"name": "wrn-4-10"}, "model must be of a depth 6 u + 4, got 'wrn-4-10'; use one of 10, 16, 22, 28, 34, 40"),
    ({"name": "wrn-10-0"}, "model must be of a widening factor of 1 or more, got 'wrn-10-0'"),
    ({"conv": "dense"}, "conv must be one of sc, gc, gc-2l, gc-2l-proto, shuffle, flgc, bgc, got 'dense'"),
    ({"conv": "sc", "groups": 2}, "groups must be 1 with conv='sc', the dense convolution, got 2"),
    ({"groups": 3}, "groups must be a divisor of the stem's 16 channels, got 3; use one of 1, 2, 4, 8, 16"),
    ({"groups": 32}, "groups must be a divisor of the stem's 16 channels, got 32; use one of 1, 2, 4, 8, 16"),
    ({"groups": 0}, "groups must be a divisor of the stem's 16 channels, got 0; use one of 1, 2, 4, 8, 16"),
    (
        {"name": "imagenet-wrn-34-2", "groups": 128},
        "groups must be a divisor of the stem's 64 channels, got 128; use one of 1, 2, 4, 8, 16, 32, 64",
    ),
    ({**MOBILENET, "groups": 3}, "groups must be a divisor of the stem's 32 channels, got 3; use one of 1, 2, 4, 8"),
    (
        {**MOBILENET, "groups": 32},
        "groups must be a divisor of features.1's 16 channels, got 32; use one of 1, 2, 4, 8",
    ),
    (
        {**MOBILENET, "groups": 16},
        "groups must be a divisor of features.2's 24 channels, got 16; use one of 1, 2, 4, 8",
    ),
    ({**MOBILENET, "groups": 0}, "groups must be a divisor of the stem's 32 channels, got 0; use one of 1, 2, 4, 8"),
    ({"num_classes": 0}, "num_classes must be 1 or more, got 0"),
    ({"coarse_everywhere": True}, NO_CHANGE.format("wrn-10-1", "gc-2l")),
    ({**MOBILENET, "conv": "gc", "coarse_everywhere": True}, NO_CHANGE.format("mobilenet_v2", "gc")),
]


@pytest.mark.parametrize(("wrong", "message"), REFUSED, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("check", [check_model, create_model], ids=["check_model", "create_model"])
def test_refused_model(check: Callable[..., Any], wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        check(**{"name": "wrn-10-1", "conv": "gc-2l", "groups": 1, "num_classes": 10, **wrong})
    assert str(caught.value) == message


def test_name_parts() -> None:
    assert parse_model("wrn-28-10") == (28, 10)
    assert parse_model("wrn-10-1") == (10, 1)
    with pytest.raises(
        UsageError,
        match="model must be wrn-<depth>-<width>, imagenet-wrn-34-2, mobilenet_v2, torchvision:<name> or timm:<name>",
    ):
        parse_model("wrn-28")


@pytest.mark.parametrize(
    ("conv", "groups", "ranks", "message"),
    [
        ("gc-2l", 4, 0, "tensor_parallel must be 1 or more, got 0"),
        (
            "gc-2l",
            4,
            3,
            "tensor_parallel must be a divisor of the stem's 16 channels, got 3; use one of 1, 2, 4, 8, 16",
        ),
        ("sc", 1, 32, "tensor_parallel must be a divisor of the stem's 16 channels, got 32; use one of 1, 2, 4, 8, 16"),
        ("gc-2l", 4, 8, "tensor_parallel must be a divisor of groups=4, got 8; use one of 1, 2, 4"),
        ("gc", 2, 4, "tensor_parallel must be a divisor of groups=2, got 4; use one of 1, 2"),
    ],
)
def test_refused_split(conv: str, groups: int, ranks: int, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_split("wrn-10-1", conv, groups, ranks)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "ranks", "message"),
    [
        ("imagenet-wrn-34-2", 3, "the stem's 64 channels, got 3; use one of 1, 2, 4, 8, 16, 32, 64"),
        ("mobilenet_v2", 3, "the stem's 32 channels, got 3; use one of 1, 2, 4, 8"),
        ("mobilenet_v2", 16, "features.2's 24 channels, got 16; use one of 1, 2, 4, 8"),
    ],
)
def test_refused_split_of_the_models_for_imagenet(name: str, ranks: int, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_split(name, "sc", 1, ranks)
    assert str(caught.value) == f"tensor_parallel must be a divisor of {message}"


@pytest.mark.parametrize(
    ("name", "conv", "groups", "ranks"),
    [
        ("wrn-10-1", "sc", 1, 16),
        ("wrn-10-1", "gc", 4, 2),
        ("wrn-10-1", "gc-2l", 16, 16),
        ("imagenet-wrn-34-2", "sc", 1, 64),
        ("imagenet-wrn-34-2", "gc-2l", 64, 64),
        ("mobilenet_v2", "sc", 1, 8),
        ("mobilenet_v2", "gc-2l", 8, 8),
    ],
)
def test_possible_split(name: str, conv: str, groups: int, ranks: int) -> None:
    check_split(name, conv, groups, ranks)
    placements = plan(create_model(name, conv=conv, groups=groups, device="meta"), ranks)
    assert placements and all(placement.kind != "whole" for placement in placements.values())


@pytest.mark.parametrize(("name", "classes"), [("wrn-10-1", 10), ("imagenet-wrn-34-2", 1000), ("mobilenet_v2", 1000)])
def test_classes_where_nothing_says(name: str, classes: int) -> None:
    assert default_classes(name) == classes
    model = create_model(name, device="meta")
    assert [m.out_features for m in model.modules() if isinstance(m, nn.Linear)] == [classes]
