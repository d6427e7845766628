"""Checksums of tensors that ranks compare with one another: of every bit, or of values up to rounding.

Both depend on where an element stands, so that an image and its mirror image differ. They stay on the tensor's device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tlgc_mp.parallel.layout import memory_order

_COLUMNS = 4096
_ROWS = 256
"""Elements are taken in blocks of rows by columns, to bound the memory that a checksum needs."""

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SEED = 0x7162

ROUNDING = 1e-3
"""Two tensors of which a random projection differs by less, relatively to their norm, count as the same up to rounding.

Different batches differ by about 1, one image in a thousand by 0.03, and what is left of rounding by 1e-6."""

_weights: dict[torch.device, Tensor] = {}


def exact(tensor: Tensor) -> Tensor:
    """A 64-bit checksum of all bits of ``tensor``: an int64 of shape (). One element more or less always changes it."""
    flat = flattened(tensor)
    if flat.is_complex():
        flat = torch.view_as_real(flat).flatten()
    return _weighted_sum(flat.view(_INTEGER[flat.element_size()]), _column_weights(tensor.device))


def rounded(tensor: Tensor) -> Tensor:
    """(a random projection of the elements, their sum of squares): a float64 of shape (2,). Of floats, not complex."""
    values = flattened(tensor).float()
    signs = (_column_weights(tensor.device) >> 32).sign().float()
    return torch.stack([_weighted_sum(values, signs), values.square().sum().double()])


def agree(first: tuple[float, float], second: tuple[float, float]) -> bool:
    """Whether two results of :func:`rounded` are those of tensors that are the same up to rounding."""
    if repr(first) == repr(second):  # NaN, too
        return True
    return abs(first[0] - second[0]) <= ROUNDING * math.sqrt(max(first[1], second[1]))


def flattened(tensor: Tensor) -> Tensor:
    """The elements of ``tensor`` in the order of memory; a view where that can be."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    return tensor.permute(memory_order(tensor)).reshape(-1)


def _weighted_sum(flat: Tensor, columns: Tensor) -> Tensor:
    """The sum of elements, each times a weight for its column and one for its row; int64 (modulo 2^64) or float64."""
    rows = flat.numel() // _COLUMNS
    of_rows = [
        (flat[start * _COLUMNS : min(start + _ROWS, rows) * _COLUMNS].view(-1, _COLUMNS) * columns).sum(1)
        for start in range(0, rows, _ROWS)
    ]
    rest = flat[rows * _COLUMNS :]
    sums = torch.cat([*of_rows, (rest * columns[: rest.numel()]).sum()[None]])
    weights = torch.arange(1, 2 * len(sums) + 1, 2, device=flat.device) * 0x5851F42D4C957F2D
    if sums.is_floating_point():
        return (sums.double() * (weights >> 32) / 2**31).sum()
    return (sums * weights).sum()


def _column_weights(device: torch.device) -> Tensor:
    """Odd 64-bit numbers, the same on every rank."""
    if device not in _weights:
        generator = torch.Generator().manual_seed(_SEED)
        with torch.inference_mode(False):
            drawn = torch.randint(-(2**62), 2**62, (_COLUMNS,), generator=generator)
            _weights[device] = (2 * drawn + 1).to(device)
    return _weights[device]
