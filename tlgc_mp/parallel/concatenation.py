"""Joining split tensors, as DenseNet and U-Net do.

Shares stay side by side, so that a join sends nothing. A map that is joined several times enters all joins as one plain
share: the gradients that it gets from them are cut and added up as plain tensors, and become one split tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tlgc_mp.parallel.families import refresh
from tlgc_mp.parallel.layout import Layout
from tlgc_mp.parallel.split_tensor import (
    FUNCTIONS,
    SplitTensor,
    from_share,
    observers,
    through_torch,
    to_share,
)

MOST_SEGMENTS = 256
"""A join of more pieces is computed whole."""


def joined_layout(tensors: Sequence[Tensor], dim: int, lead: SplitTensor) -> tuple[Layout, list[Layout]] | None:
    """The layout of ``tensors`` joined along ``dim``, and those in which their shares have to be.

    Args:
        tensors: split, or plain and alike on every rank.
        dim: as of ``torch.cat``, not negative.
        lead: one of them, which is cut.

    Returns:
        ``None`` where shares cannot be joined, or where it is up to torch to complain.
    """
    before, after = lead.shape[:dim], lead.shape[dim + 1 :]
    if any(t.dim() != lead.dim() or t.shape[:dim] != before or t.shape[dim + 1 :] != after for t in tensors):
        return None
    if dim != lead.cut.dim:
        return lead.cut, [lead.cut] * len(tensors)
    segments: list[int] = []
    own = []
    for tensor in tensors:
        length = tensor.shape[dim]
        if length == 0 or length % lead.ranks.size:
            return None
        own.append(tensor.cut if type(tensor) is SplitTensor and tensor.cut.dim == dim else Layout(dim, None))
        segments.extend(own[-1].pieces(length))
    if len(segments) > MOST_SEGMENTS:
        return None
    return Layout(dim, tuple(segments) if len(segments) > 1 else None), own


def _entered(tensor: SplitTensor) -> Tensor:
    """The share of ``tensor``, plain; the same one each time, until ``tensor`` changes. Differentiable."""
    if not tensor.requires_grad:
        return tensor.share
    state = (tensor._version, tensor.share)
    if tensor.entered is None or tensor.entered[0] != state[0] or tensor.entered[1] is not state[1]:
        tensor.entered = (*state, to_share(tensor, tensor.cut, tensor.ranks))
    return tensor.entered[2]


def _of_a_pass(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``tensor`` is a split result of other operators. A leaf would hold itself through its share."""
    return (
        type(tensor) is SplitTensor
        and tensor.cut.dim is not None
        and tensor.dtype is dtype
        and tensor.held is None
        and not (tensor.is_leaf and tensor.requires_grad)
    )


def _join(tensors: Sequence[Tensor], dim: int) -> Tensor | None:
    """``tensors`` joined, where they lie as they have to; ``None`` otherwise."""
    if not torch.is_grad_enabled() or not all(_of_a_pass(t, tensors[0].dtype) for t in tensors):
        return None
    lead = tensors[0]
    assert isinstance(lead, SplitTensor)
    if not -lead.dim() <= dim < lead.dim():
        return None
    found = joined_layout(tensors, dim % lead.dim(), lead)
    if found is None or found[1] != [t.cut for t in tensors]:  # type: ignore[attr-defined]
        return None
    refresh(tensors)
    share = torch.cat([_entered(t) for t in tensors], dim)  # type: ignore[arg-type]
    for observe in observers:
        observe(torch.ops.aten.cat.default, "shares")
    return from_share(share, found[0], lead.ranks) if share.requires_grad else SplitTensor(share, found[0], lead.ranks)


def _cat(function: Callable[..., Tensor]) -> Callable[..., object]:
    def replace(*args: object, **kwargs: object) -> object:
        named = dict(kwargs)
        tensors = args[0] if args else named.pop("tensors", None)
        dim = args[1] if len(args) == 2 else named.pop("dim", 0)
        if isinstance(tensors, list | tuple) and tensors and isinstance(dim, int) and not named and len(args) <= 2:
            with torch._C.DisableTorchFunctionSubclass():
                joined = _join(tensors, dim)
            if joined is not None:
                return joined
        return through_torch(function, args, kwargs)

    return replace


FUNCTIONS.update({function: _cat(function) for function in (torch.cat, torch.concat, torch.concatenate)})
