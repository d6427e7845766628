"""Model and convolution names, checked without importing torch, so that a mistyped flag is answered at once."""

from __future__ import annotations

import re

from tlgc_mp.errors import UsageError, divisors, one_of

CONVOLUTIONS = ("sc", "gc", "gc-2l", "gc-2l-proto", "shuffle", "flgc")
"""sc: dense. gc: group convolution. gc-2l: two-level group convolution, gc-2l-proto its prototype. shuffle: group
convolution with shuffled channels. flgc: fully learnable group convolution."""

TWO_LEVEL = ("gc-2l", "gc-2l-proto")
"""Those with a coarse level."""

COARSE_INITS = ("he", "zero", "scaled")
"""What :class:`tlgc_mp.nn.TwoLevelConv2d` takes as ``coarse_init``, the default first."""

FLGC_ACROSS_RANKS = (
    "cannot be split over ranks: its groups are learned, so from step to step any filter may come to read any channel, "
    "and every rank would need them all"
)

_WIDE_RESNET = re.compile(r"wrn-(\d+)-(\d+)")


def parse_model(name: str) -> tuple[int, int]:
    """``"wrn-28-10"`` -> (28, 10), the depth and the width.

    Raises:
        UsageError: not a name of a model, or a depth that is not 6 u + 4.
    """
    match = _WIDE_RESNET.fullmatch(name)
    if match is None:
        raise UsageError(f"model={name!r} is unknown; use wrn-<depth>-<width>, for example wrn-28-10")
    depth, width = int(match[1]), int(match[2])
    if depth < 10 or (depth - 4) % 6:
        raise UsageError(f"model={name!r}: depth {depth} is not 6 u + 4; use one of 10, 16, 22, 28, 34, 40")
    if width < 1:
        raise UsageError(f"model={name!r}: width {width} is not a widening factor; use 1 or more")
    return depth, width


def check_model(name: str, conv: str, groups: int, num_classes: int | None = None) -> None:
    """Raises :class:`UsageError` for any argument with which the model cannot be built."""
    parse_model(name)
    if conv not in CONVOLUTIONS:
        raise UsageError(f"conv={conv!r} is unknown; use {one_of(CONVOLUTIONS)}")
    if conv == "sc" and groups != 1:
        raise UsageError(f"groups={groups}: conv='sc' is the dense convolution and has no groups; use 1")
    if groups < 1 or 16 % groups:
        raise UsageError(f"groups={groups} does not divide the stem's 16 channels; use {one_of(divisors(16))}")
    if num_classes is not None and num_classes < 1:
        raise UsageError(f"num_classes={num_classes} is not a number of classes; use 1 or more")


def check_coarse_level(conv: str, coarse_kernel_size: int | None, coarse_init: str) -> None:
    """Raises :class:`UsageError` unless the model's convolutions have a coarse level as described, or nothing is."""
    if conv not in TWO_LEVEL and (coarse_kernel_size is not None or coarse_init != COARSE_INITS[0]):
        given = f"coarse_init={coarse_init!r}" if coarse_kernel_size is None else f"{coarse_kernel_size=}"
        raise UsageError(f"{given}: conv={conv!r} has no coarse level; use {one_of(TWO_LEVEL)}")
    if coarse_kernel_size is not None and (coarse_kernel_size < 1 or coarse_kernel_size % 2 == 0):
        raise UsageError(f"{coarse_kernel_size=} cannot be centred on kernels of 1 and 3; use an odd one, 1 say")
    if coarse_init not in COARSE_INITS:
        raise UsageError(f"{coarse_init=} is unknown; use {one_of(COARSE_INITS)}")


def check_split(name: str, conv: str, groups: int, tensor_parallel: int) -> None:
    """Raises :class:`UsageError` unless the model splits over ``tensor_parallel`` ranks (P)."""
    if tensor_parallel < 1:
        raise UsageError(f"tensor_parallel={tensor_parallel} is not a number of ranks; use 1 or more")
    if 16 % tensor_parallel:
        raise UsageError(
            f"tensor_parallel={tensor_parallel} does not divide the stem's 16 channels; use {one_of(divisors(16))}"
        )
    if conv == "flgc" and tensor_parallel > 1:
        raise UsageError(f"tensor_parallel={tensor_parallel}: conv='flgc' {FLGC_ACROSS_RANKS}; use 1 and replicas")
    if conv != "sc" and groups % tensor_parallel:
        raise UsageError(
            f"tensor_parallel={tensor_parallel} does not divide groups={groups}; use {one_of(divisors(groups))}"
        )
