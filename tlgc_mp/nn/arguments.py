"""The arguments that the convolutions have in common, checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from tlgc_mp.errors import UsageError, divisors, is_count, one_of

_LARGEST_SIZE = 2**31 - 1
"""Of channels and windows: torch's convolutions count in 32 bits."""
_LARGEST_WEIGHTS = 2**59
"""Elements, whose bytes 64 bits can count."""


def check_module(name: str, value: object) -> None:
    """Raises :class:`UsageError` unless the argument ``name`` is a module."""
    if not isinstance(value, nn.Module):
        raise UsageError(f"{name}: a {type(value).__name__} is none; give a torch.nn.Module")


def check_device(device: object) -> None:
    """Raises :class:`UsageError` unless ``device`` is ``None`` or names a device that torch knows of."""
    if device is None or isinstance(device, torch.device):
        return
    try:
        torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError):
        raise UsageError(f"device={device!r} is none; use 'cpu', 'cuda' or 'meta', say") from None


def check_dtype(dtype: object) -> None:
    """Raises :class:`UsageError` unless ``dtype`` is ``None`` or one that weights can have."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UsageError(f"dtype={dtype!r} is none for weights; use torch.float32, say")


def check_groups(groups: int, **channels: int) -> None:
    """Raises :class:`UsageError` unless ``groups`` divides every one of the named channel counts."""
    for name, count in channels.items():
        if not is_count(count):
            raise UsageError(f"{name}={count} is not a number of channels; use 1 or more")
        if count > _LARGEST_SIZE:
            raise UsageError(f"{name}={count} is too large; use {_LARGEST_SIZE} or less")
    for name, count in channels.items():
        if not is_count(groups) or count % groups:
            common = [d for d in divisors(count) if all(other % d == 0 for other in channels.values())]
            raise UsageError(f"groups={groups} does not divide {name}={count}; use {one_of(common)}")


def _pair(value: object) -> tuple[Any, ...]:
    """One value for both directions, or what is given for each."""
    return tuple(value) if isinstance(value, Iterable) else (value, value)


def positive_pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """(vertical, horizontal) of the argument ``name``, given as one int or as both."""
    pair = _pair(value)
    if len(pair) != 2 or not all(is_count(v) for v in pair):
        raise UsageError(f"{name}={value!r} is not a positive int or a pair of them")
    if max(pair) > _LARGEST_SIZE:
        raise UsageError(f"{name}={value!r} is too large; use {_LARGEST_SIZE} or less")
    return tuple(pair)


def check_weights(shape: Sequence[int]) -> None:
    """Raises :class:`UsageError` for filters that no memory holds."""
    if math.prod(shape) > _LARGEST_WEIGHTS:
        sizes = " x ".join(str(size) for size in shape)
        raise UsageError(f"in_channels, out_channels and kernel_size ask for {sizes} weights; use smaller ones")


def padding_pair(
    padding: int | tuple[int, int] | str, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int]:
    """The padding in numbers: an int, a pair, ``"valid"``, or ``"same"`` where it can be centred."""
    if padding == "valid":
        return (0, 0)
    if padding == "same":
        reach = [step * (d - 1) for step, d in zip(dilation, kernel, strict=True)]
        if stride != (1, 1) or any(r % 2 for r in reach):
            raise UsageError(
                f"padding='same' needs stride 1 and an even dilation * (kernel_size - 1), got stride={stride}, "
                f"kernel_size={kernel}, dilation={dilation}; give the padding in numbers"
            )
        return (reach[0] // 2, reach[1] // 2)
    pair = _pair(padding)
    if len(pair) != 2 or not all(is_count(v, 0) and v <= _LARGEST_SIZE for v in pair):
        raise UsageError(f"padding={padding!r} is not a non-negative int, a pair of them, 'same' or 'valid'")
    return tuple(pair)
