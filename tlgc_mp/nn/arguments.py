"""The arguments that the convolutions have in common, checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from tlgc_mp.errors import UsageError, divisors, is_count, must_be, one_of

_LARGEST_SIZE = 2**31 - 1
"""Of channels and windows: torch's convolutions count in 32 bits."""
_LARGEST_WEIGHTS = 2**59
"""Elements, whose bytes 64 bits can count."""


def check_module(name: str, value: object) -> None:
    """Raises :class:`UsageError` unless the argument ``name`` is a module."""
    if not isinstance(value, nn.Module):
        raise must_be(name, "a torch.nn.Module", type(value))


def check_device(device: object) -> None:
    """Raises :class:`UsageError` unless ``device`` is ``None`` or names a device that torch knows of."""
    if device is None or isinstance(device, torch.device):
        return
    try:
        torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError):
        raise must_be("device", "a device that torch knows", device, "use e.g. 'cpu', 'cuda' or 'meta'") from None


def check_dtype(dtype: object) -> None:
    """Raises :class:`UsageError` unless ``dtype`` is ``None`` or one that weights can have."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise must_be("dtype", "a floating-point type", dtype, "use e.g. torch.float32")


def check_groups(groups: int, **channels: int) -> None:
    """Raises :class:`UsageError` unless ``groups`` divides every one of the named channel counts."""
    for name, count in channels.items():
        if not is_count(count):
            raise must_be(name, "1 or more", count)
        if count > _LARGEST_SIZE:
            raise must_be(name, f"{_LARGEST_SIZE} or less", count)
    for name, count in channels.items():
        if not is_count(groups) or count % groups:
            common = [d for d in divisors(count) if all(other % d == 0 for other in channels.values())]
            raise must_be("groups", f"a divisor of {name}={count}", groups, f"use {one_of(common)}")


_SEVERAL = {1: "", 2: " or a pair of them", 3: " or three of them"}


def _by_dimension(value: object, dims: int) -> tuple[Any, ...]:
    """One value for all dimensions, or what is given for each."""
    return tuple(value) if isinstance(value, Iterable) else (value,) * dims


def positive_sizes(name: str, value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    """The argument ``name`` for each of ``dims`` dimensions, given as one int or as all."""
    sizes = _by_dimension(value, dims)
    if len(sizes) != dims or not all(is_count(v) for v in sizes):
        raise must_be(name, f"a positive int{_SEVERAL[dims]}", value)
    if max(sizes) > _LARGEST_SIZE:
        raise must_be(name, f"{_LARGEST_SIZE} or less", value)
    return sizes


def check_weights(shape: Sequence[int]) -> None:
    """Raises :class:`UsageError` for filters that no memory holds."""
    if math.prod(shape) > _LARGEST_WEIGHTS:
        sizes = " x ".join(str(size) for size in shape)
        raise UsageError(
            f"in_channels x out_channels x kernel_size must be {_LARGEST_WEIGHTS} weights or fewer, got {sizes}"
        )


def padding_sizes(
    padding: int | tuple[int, ...] | str, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[int, ...]:
    """The padding in numbers: an int, one for each dimension, ``"valid"``, or ``"same"`` where it can be centred."""
    dims = len(kernel)
    if padding == "valid":
        return (0,) * dims
    if padding == "same":
        reach = [step * (d - 1) for step, d in zip(dilation, kernel, strict=True)]
        if max(stride) > 1 or any(r % 2 for r in reach):
            raise UsageError(
                f"padding must be given in numbers unless stride is 1 and dilation * (kernel_size - 1) is even, got "
                f"'same' with stride={stride}, kernel_size={kernel}, dilation={dilation}"
            )
        return tuple(r // 2 for r in reach)
    sizes = _by_dimension(padding, dims)
    if len(sizes) != dims or not all(is_count(v, 0) and v <= _LARGEST_SIZE for v in sizes):
        several = _SEVERAL[dims].replace(" or ", ", ")
        raise must_be("padding", f"a non-negative int{several}, 'same' or 'valid'", padding)
    return sizes
