"""Model and convolution names, checked without importing torch, so that a mistyped flag is answered at once."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TypedDict, cast

from tlgc_mp.errors import UsageError, check_installed, check_representatives, divisors, is_count, must_be, one_of

CONVOLUTIONS = ("sc", "gc", "gc-2l", "gc-2l-proto", "shuffle", "flgc", "bgc")
"""sc: dense. gc: group convolution. gc-2l: two-level group convolution, gc-2l-proto its prototype. shuffle: group
convolution with shuffled channels. flgc: fully learnable group convolution. bgc: balanced group convolution."""

TWO_LEVEL = ("gc-2l", "gc-2l-proto")
"""Those with a coarse level."""

COARSE_INITS = ("zero", "scaled", "he")
"""What :class:`tlgc_mp.nn.TwoLevelConv2d` takes as ``coarse_init``, the default first."""


class CoarseLevel(TypedDict):
    """The coarse level of a two-level convolution, as :class:`tlgc_mp.nn.TwoLevelConv2d` takes it."""

    coarse_kernel_size: int | None
    coarse_init: str
    coarse_channels: int
    coarse_sum: bool


COARSE_LEVEL: CoarseLevel = {
    "coarse_kernel_size": None,
    "coarse_init": COARSE_INITS[0],
    "coarse_channels": 1,
    "coarse_sum": False,
}
"""The default, which is the paper's."""

FLGC_ACROSS_RANKS = (
    "cannot be split over ranks: its groups are learned, so from step to step any filter may come to read any channel, "
    "and every rank would need them all"
)

IMAGENET_WIDE_RESNET = "imagenet-wrn-34-2"
MOBILENET_V2 = "mobilenet_v2"

LIBRARIES = ("torchvision", "timm")
"""Whose models there are by name as well, as ``"torchvision:resnet50"``."""

LARGEST_DEPTH = 1000
LARGEST_WIDTH = 10_000
LARGEST_CLASSES = 1_000_000
LARGEST_KERNEL = 255
"""Beyond any network that fits a machine, and small enough that its parameters can be counted."""

_WIDE_RESNET = re.compile(r"wrn-([0-9]{1,9})-([0-9]{1,9})")

_LIBRARY_MODEL = re.compile(f"({'|'.join(LIBRARIES)}):([A-Za-z0-9_]{{1,100}})")

_SHARED_CHANNELS = {
    IMAGENET_WIDE_RESNET: {"the stem's": 64},
    MOBILENET_V2: {"the stem's": 32, "features.1's": 16, "features.2's": 24},
}
"""Of the layers that groups and ranks share: every other layer's channels are a multiple of one of these."""


class ModelArguments(TypedDict):
    """Of :func:`~tlgc_mp.models.create_model`, all but the name and the device."""

    conv: str
    groups: int
    num_classes: int | None
    coarse_everywhere: bool
    coarse_kernel_size: int | None
    coarse_init: str
    coarse_channels: int
    coarse_sum: bool


class NamedModel(ModelArguments):
    """With the name."""

    name: str


def parse_model(name: str) -> tuple[int, int]:
    """``"wrn-28-10"`` -> (28, 10), the depth and the width of a WideResNet for images of CIFAR's size.

    Raises:
        UsageError: not such a name, or a depth that is not 6 u + 4.
    """
    match = _WIDE_RESNET.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise must_be(
            "model",
            f"wrn-<depth>-<width>, {IMAGENET_WIDE_RESNET}, {MOBILENET_V2}, torchvision:<name> or timm:<name>",
            name,
            "use e.g. wrn-28-10",
        )
    depth, width = int(match[1]), int(match[2])
    if depth < 10 or (depth - 4) % 6:
        raise must_be("model", "of a depth 6 u + 4", name, "use one of 10, 16, 22, 28, 34, 40")
    if depth > LARGEST_DEPTH:
        raise must_be("model", f"of a depth of {LARGEST_DEPTH} or less", name)
    if width < 1:
        raise must_be("model", "of a widening factor of 1 or more", name)
    if width > LARGEST_WIDTH:
        raise must_be("model", f"of a widening factor of {LARGEST_WIDTH} or less", name)
    return depth, width


def library_model(name: str) -> tuple[str, str] | None:
    """``"torchvision:resnet50"`` -> ("torchvision", "resnet50"); ``None`` for a model of this package.

    Whether the library has such a model shows when it is loaded.

    Raises:
        UsageError: what follows the library is no name of a model, or timm is not installed.
    """
    library = name.partition(":")[0] if isinstance(name, str) else None
    if library not in LIBRARIES or ":" not in name:
        return None
    match = _LIBRARY_MODEL.fullmatch(name)
    if match is None:
        plain = f"{library}:{name.partition(':')[2].partition('.')[0]}"
        hint = f"use {plain}, without trained weights" if _LIBRARY_MODEL.fullmatch(plain) else f"use {library}:<name>"
        raise UsageError(f"model must be the name of a model, of letters, digits and _, got {name!r}; {hint}")
    if library == "timm":
        check_installed("timm", "timm", f"model={name!r}")
    return match[1], match[2]


def default_classes(name: str) -> int:
    """The classes of a model where nothing says: ImageNet's for the two models that are for it and for those of
    torchvision and timm, else CIFAR-10's."""
    return 1000 if name in _SHARED_CHANNELS or library_model(name) is not None else 10


def check_model(
    name: str, conv: str, groups: int, num_classes: int | None = None, coarse_everywhere: bool = False
) -> None:
    """Raises :class:`UsageError` for any argument with which the model cannot be built."""
    channels = _shared_channels(name)
    if conv not in CONVOLUTIONS:
        raise must_be("conv", one_of(CONVOLUTIONS), conv)
    if conv == "sc" and groups != 1:
        raise must_be("groups", "1 with conv='sc', the dense convolution", groups)
    _check_divides("groups", groups, channels)
    if not is_count(groups):
        raise UsageError(f"groups must be a number of groups, got {groups!r}; use 1 or more")
    if num_classes is not None and not is_count(num_classes):
        raise must_be("num_classes", "1 or more", num_classes)
    if num_classes is not None and num_classes > LARGEST_CLASSES:
        raise must_be("num_classes", f"{LARGEST_CLASSES} or less", num_classes)
    if not isinstance(coarse_everywhere, bool):
        raise must_be("coarse_everywhere", "True or False", coarse_everywhere)
    if coarse_everywhere and (name != MOBILENET_V2 or conv not in TWO_LEVEL):
        raise UsageError(
            f"coarse_everywhere must be False but for {MOBILENET_V2} with {one_of(TWO_LEVEL)}, got True with "
            f"model={name!r} and conv={conv!r}"
        )


def coarse_level_of(source: object) -> CoarseLevel:
    """What ``source`` says of the coarse level: options, or a mapping that may leave some at their defaults."""
    of_mapping = isinstance(source, Mapping)
    found = {
        name: source.get(name, default) if of_mapping else getattr(source, name)  # type: ignore[attr-defined]
        for name, default in COARSE_LEVEL.items()
    }
    return cast(CoarseLevel, found)


def check_coarse_level(conv: str, coarse: CoarseLevel) -> None:
    """Raises :class:`UsageError` unless the model's convolutions have a coarse level as described, or nothing is."""
    default: Mapping[str, object] = COARSE_LEVEL
    given = [f"{name}={value!r}" for name, value in coarse.items() if value != default[name]]
    if conv not in TWO_LEVEL and given:
        raise UsageError(f"conv must be {one_of(TWO_LEVEL)} with {given[0]}, got {conv!r}, which has no coarse level")
    check_representatives(coarse["coarse_channels"], coarse["coarse_sum"])
    coarse_kernel_size, coarse_init = coarse["coarse_kernel_size"], coarse["coarse_init"]
    if coarse_kernel_size is not None and (not is_count(coarse_kernel_size) or coarse_kernel_size % 2 == 0):
        raise must_be(
            "coarse_kernel_size", "odd, to be centred on kernels of 1 and 3", coarse_kernel_size, "use e.g. 1"
        )
    if coarse_kernel_size is not None and coarse_kernel_size > LARGEST_KERNEL:
        raise must_be("coarse_kernel_size", f"{LARGEST_KERNEL} or less", coarse_kernel_size)
    if coarse_init not in COARSE_INITS:
        raise must_be("coarse_init", one_of(COARSE_INITS), coarse_init)


def check_split(name: str, conv: str, groups: int, tensor_parallel: int) -> None:
    """Raises :class:`UsageError` unless the model splits over ``tensor_parallel`` ranks (P)."""
    if not is_count(tensor_parallel):
        raise must_be("tensor_parallel", "1 or more", tensor_parallel)
    _check_divides("tensor_parallel", tensor_parallel, _shared_channels(name))
    if conv == "flgc" and tensor_parallel > 1:
        raise must_be(
            "tensor_parallel", f"1 with conv='flgc', which {FLGC_ACROSS_RANKS}", tensor_parallel, "use replicas"
        )
    if conv != "sc" and groups % tensor_parallel:
        raise must_be(
            "tensor_parallel", f"a divisor of groups={groups}", tensor_parallel, f"use {one_of(divisors(groups))}"
        )


def _shared_channels(name: str) -> dict[str, int]:
    """Whose channels -> how many, of the layers that groups and ranks have to divide.

    None for a model of a library: a layer that groups do not divide stays dense there, and :func:`tlgc_mp.shard`
    leaves one whole that ranks do not divide.
    """
    if library_model(name) is not None:
        return {}
    if isinstance(name, str) and name in _SHARED_CHANNELS:
        return _SHARED_CHANNELS[name]
    parse_model(name)
    return {"the stem's": 16}


def _check_divides(what: str, count: int, channels: dict[str, int]) -> None:
    for whose, width in channels.items():
        if not is_count(count) or width % count:
            common = divisors(math.gcd(*channels.values()))
            raise must_be(what, f"a divisor of {whose} {width} channels", count, f"use {one_of(common)}")
