"""Models by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from tlgc_mp.errors import UsageError
from tlgc_mp.models import libraries
from tlgc_mp.models.names import (
    IMAGENET_WIDE_RESNET,
    MOBILENET_V2,
    TWO_LEVEL,
    CoarseLevel,
    ModelArguments,
    check_coarse_level,
    check_model,
    default_classes,
    library_model,
    parse_model,
)
from tlgc_mp.models.wide_resnet import ConvFactory, cifar_wide_resnet, imagenet_wide_resnet
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
    TwoLevelPrototypeConv1d,
    TwoLevelPrototypeConv2d,
    TwoLevelPrototypeConv3d,
    init_parameters,
)
from tlgc_mp.nn.arguments import check_device

if TYPE_CHECKING:
    from typing_extensions import Unpack


_TORCHS: dict[int, ConvFactory] = {
    1: functools.partial(nn.Conv1d, bias=False),
    2: functools.partial(nn.Conv2d, bias=False),
    3: functools.partial(nn.Conv3d, bias=False),
}
CONVOLUTION_LAYERS: dict[str, dict[int, ConvFactory]] = {
    "sc": _TORCHS,
    "gc": _TORCHS,
    "gc-2l": {1: TwoLevelConv1d, 2: TwoLevelConv2d, 3: TwoLevelConv3d},
    "gc-2l-proto": {1: TwoLevelPrototypeConv1d, 2: TwoLevelPrototypeConv2d, 3: TwoLevelPrototypeConv3d},
    "shuffle": {1: ShuffleConv1d, 2: ShuffleConv2d, 3: ShuffleConv3d},
    "flgc": {2: FullyLearnableGroupConv2d},
    "bgc": {1: BalancedConv1d, 2: BalancedConv2d, 3: BalancedConv3d},
}
"""Name of a convolution -> by its dimensions, what makes one from the arguments of torch's."""


def convolution(conv: str, groups: int, coarse: CoarseLevel, dims: int = 2) -> ConvFactory:
    """What makes a convolution of that name with N groups, and the coarse level described if it has one."""
    make = functools.partial(CONVOLUTION_LAYERS[conv][dims], groups=groups)
    return functools.partial(make, **coarse) if conv in TWO_LEVEL else make


def create_model(
    name: str,
    *,
    conv: str = "gc-2l",
    groups: int = 1,
    num_classes: int | None = None,
    coarse_everywhere: bool = False,
    coarse_kernel_size: int | None = None,
    coarse_init: str = "zero",
    coarse_channels: int = 1,
    coarse_sum: bool = False,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Builds a model by name.

    The initial weights depend on ``torch.initial_seed()`` and on nothing else: after ``torch.manual_seed(s)`` the same
    call gives the same weights, on any device, and each rank of a split model gets its part of them. (Two calls after
    one ``manual_seed`` therefore give equal models; seed again for another draw.)

    A model of torchvision or timm draws its initial weights by its own rules, which know nothing of shares. So it is
    built whole on the CPU, by every rank, and :func:`tlgc_mp.initialize` and :func:`tlgc_mp.shard` keep a rank's part
    of it. Weights that somebody trained are not loaded.

    Args:
        name: ``"wrn-<depth>-<width>"``, depth = 6 u + 4, ``"imagenet-wrn-34-2"`` or ``"mobilenet_v2"``;
            ``"torchvision:<name>"`` or ``"timm:<name>"``, which :func:`~tlgc_mp.models.convert` changes unless
            ``conv`` is ``"sc"``.
        conv: ``"sc"`` (dense), ``"gc"`` (group convolution), ``"gc-2l"`` (two-level group convolution),
            ``"gc-2l-proto"`` (its prototype), ``"shuffle"`` (group convolution with shuffled channels), ``"flgc"``
            (fully learnable group convolution) or ``"bgc"`` (balanced group convolution).
        groups: N, a divisor of every layer's channels; 1 for ``"sc"``. In a model of torchvision or timm, layers
            whose channels it does not divide stay dense.
        num_classes: of the classifier; where not given, 10, or 1000 for the two models for ImageNet and those of
            torchvision and timm.
        coarse_everywhere: gives the last 1x1 convolution of ``"mobilenet_v2"``, from 320 to 1280 channels, a coarse
            level too. Without it that one is a group convolution, as in the counts of the paper's Table 4.
        coarse_kernel_size, coarse_init, coarse_channels, coarse_sum: d0, the initial weights, r and whether
            representatives are summed, of two-level convolutions, as :class:`tlgc_mp.nn.TwoLevelConv2d` takes them.
        device: where the parameters live. On ``"meta"`` nothing is allocated: :func:`tlgc_mp.initialize` and
            :func:`tlgc_mp.shard` then draw each rank's part only. A model of torchvision or timm is on the CPU then.

    Raises:
        UsageError: an argument that cannot work, or a model that does not give logits (B, classes) for images
            (B, 3, H, W), or for videos (B, 3, T, H, W), in training; a detector, say.
    """
    check_device(device)
    coarse: CoarseLevel = {
        "coarse_kernel_size": coarse_kernel_size,
        "coarse_init": coarse_init,
        "coarse_channels": coarse_channels,
        "coarse_sum": coarse_sum,
    }
    # torch.get_default_device of torch 2.6 does not know of "with torch.device(...)".
    target = torch.empty(0).device if device is None else torch.device(device)
    if library_model(name) is not None:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(torch.initial_seed())
            model = _of_library(
                libraries.build,
                name,
                conv=conv,
                groups=groups,
                num_classes=num_classes,
                coarse_everywhere=coarse_everywhere,
                **coarse,
            )
        return model.to("cpu" if target.type == "meta" else target)
    check_model(name, conv, groups, num_classes, coarse_everywhere)
    check_coarse_level(conv, coarse)
    classes = default_classes(name) if num_classes is None else num_classes
    replacement = convolution(conv, groups, coarse)
    last = convolution("gc", groups, coarse) if conv in TWO_LEVEL and not coarse_everywhere else replacement
    with torch.device("meta"):
        model = _build(name, classes, replacement, last)
    model.to(memory_format=torch.channels_last)  # filters as the activations, which a convolution need not reorder
    if target.type == "meta":
        return model
    model.to_empty(device=target)
    init_parameters(model, torch.initial_seed())
    return model


def create_meta_model(name: str, **arguments: Unpack[ModelArguments]) -> nn.Module:
    """What :func:`create_model` makes of these arguments, on the meta device: to count and compare shapes.

    Models of torchvision and timm are on it too: nothing is allocated but for torchvision's RegNets, for a moment.

    Args:
        arguments: all of those of :func:`create_model` but ``device``.

    Raises:
        UsageError: as :func:`create_model`.
    """
    if library_model(name) is None:
        return create_model(name, **arguments, device="meta")
    return _of_library(libraries.build_on_meta, name, **arguments)


def _of_library(
    build: Callable[[str, int], nn.Module],
    name: str,
    *,
    conv: str,
    groups: int,
    num_classes: int | None,
    coarse_everywhere: bool,
    **coarse: Unpack[CoarseLevel],
) -> nn.Module:
    """What ``build`` makes of (name, classes), with its convolutions replaced unless ``conv`` is ``"sc"``."""
    from tlgc_mp.models.conversion import convert  # which loads this module

    check_model(name, conv, groups, num_classes, coarse_everywhere)
    check_coarse_level(conv, coarse)
    model = build(name, default_classes(name) if num_classes is None else num_classes)
    if conv == "sc":
        return model
    try:
        return convert(model, conv=conv, groups=groups, **coarse)
    except UsageError as error:
        raise UsageError(
            f"model must be one that can be converted, got {name!r}: {error}; or leave it dense with conv='sc'"
        ) from None


def _build(name: str, num_classes: int, conv: ConvFactory, last_conv: ConvFactory) -> nn.Module:
    if name == MOBILENET_V2:
        from tlgc_mp.models.mobilenet_v2 import MobileNetV2  # torchvision takes seconds to import

        return MobileNetV2(num_classes, conv, last_conv)
    if name == IMAGENET_WIDE_RESNET:
        return imagenet_wide_resnet(num_classes, conv)
    return cifar_wide_resnet(*parse_model(name), num_classes, conv)
