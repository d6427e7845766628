"""Models by name."""

from __future__ import annotations

import functools

import torch
from torch import nn

from tlgc_mp.models.names import TWO_LEVEL, check_coarse_level, check_model, parse_model
from tlgc_mp.models.wide_resnet import ConvFactory, WideResNet
from tlgc_mp.nn import (
    FullyLearnableGroupConv2d,
    ShuffleConv2d,
    TwoLevelConv2d,
    TwoLevelPrototypeConv2d,
    init_parameters,
)

_CONVOLUTIONS: dict[str, ConvFactory] = {
    "sc": functools.partial(nn.Conv2d, bias=False),
    "gc": functools.partial(nn.Conv2d, bias=False),
    "gc-2l": TwoLevelConv2d,
    "gc-2l-proto": TwoLevelPrototypeConv2d,
    "shuffle": ShuffleConv2d,
    "flgc": FullyLearnableGroupConv2d,
}


def create_model(
    name: str,
    *,
    conv: str = "gc-2l",
    groups: int = 1,
    num_classes: int | None = None,
    device: torch.device | str | None = None,
    coarse_kernel_size: int | None = None,
    coarse_init: str = "he",
) -> nn.Module:
    """Builds a model by name.

    The initial weights depend on ``torch.initial_seed()`` and on nothing else: after ``torch.manual_seed(s)`` the same
    call gives the same weights, on any device, and each rank of a split model gets its part of them. (Two calls after
    one ``manual_seed`` therefore give equal models; seed again for another draw.)

    Args:
        name: ``"wrn-<depth>-<width>"``, depth = 6 u + 4.
        conv: ``"sc"`` (dense), ``"gc"`` (group convolution), ``"gc-2l"`` (two-level group convolution),
            ``"gc-2l-proto"`` (its prototype), ``"shuffle"`` (group convolution with shuffled channels) or ``"flgc"``
            (fully learnable group convolution).
        groups: N, a divisor of the narrowest layer's channels; 1 for ``"sc"``.
        num_classes: of the classifier; 10 where not given.
        device: where the parameters live. On ``"meta"`` nothing is allocated: :func:`tlgc_mp.initialize` and
            :func:`tlgc_mp.shard` then draw each rank's part only.
        coarse_kernel_size, coarse_init: d0 and the initial weights of two-level convolutions, as
            :class:`tlgc_mp.nn.TwoLevelConv2d` takes them.

    Raises:
        UsageError: an argument that cannot work.
    """
    check_model(name, conv, groups, num_classes)
    check_coarse_level(conv, coarse_kernel_size, coarse_init)
    depth, width = parse_model(name)
    coarse = {"coarse_kernel_size": coarse_kernel_size, "coarse_init": coarse_init} if conv in TWO_LEVEL else {}
    factory = functools.partial(_CONVOLUTIONS[conv], groups=groups, **coarse)
    with torch.device("meta"):
        model = WideResNet(depth, width, 10 if num_classes is None else num_classes, factory)
    model.to(memory_format=torch.channels_last)  # filters as the activations, which a convolution need not reorder
    target = torch.get_default_device() if device is None else torch.device(device)
    if target.type == "meta":
        return model
    model.to_empty(device=target)
    init_parameters(model, torch.initial_seed())
    return model
