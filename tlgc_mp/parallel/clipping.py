"""Gradient clipping by the norm over all parameters, of a model whose parameters are held in shares."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tlgc_mp.errors import UsageError
from tlgc_mp.nn.arguments import check_module
from tlgc_mp.parallel.gradient_shares import norm_over_ranks
from tlgc_mp.parallel.sharded import Region, ShardedLayer


@torch.no_grad()
def clip_grad_norm_(
    model: nn.Module, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> Tensor:
    """Scales the gradients of a model that :func:`tlgc_mp.shard` split, so that their norm is at most ``max_norm``, in
    place. Collective.

    As :func:`torch.nn.utils.clip_grad_norm_` does, which takes a collective for each parameter, and this one for all.
    A DeepSpeed engine clips by itself (``gradient_clipping``).

    Args:
        model: split, or on one device.
        max_norm: largest norm of all gradients as one vector.
        norm_type: p of the p-norm; ``inf`` for the largest value.
        error_if_nonfinite: whether a norm that is not finite is an error.

    Returns:
        The norm before, of the whole model: one value, the same on every rank of the replica.

    Raises:
        UsageError: an argument of another kind.
        RuntimeError: the norm is not finite, and that is an error.
    """
    check_module("model", model)
    if not isinstance(norm_type, int | float) or not norm_type > 0:
        raise UsageError(
            f"norm_type must be positive, got {norm_type!r}; use 2.0, or float('inf') for the largest value"
        )
    region = getattr(model, "tlgc_region", None)
    shares: list[Tensor] = []
    others: list[Tensor] = []
    seen: set[int] = set()
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is None or param.grad is None or id(param) in seen:
                continue
            seen.add(id(param))
            cut = isinstance(module, ShardedLayer) and name in module.tlgc_placement.dims
            (shares if cut else others).append(param.grad.as_subclass(Tensor))
    total = _norm(others, norm_type)
    if isinstance(region, Region) and region.ranks.size > 1:
        total = _over_ranks(_norm(shares, norm_type), total, norm_type, region)
    else:
        total = torch.linalg.vector_norm(torch.stack([total, _norm(shares, norm_type)]), norm_type)
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(f"the norm of the gradients is {total.item()}, and error_if_nonfinite is set")
    torch.nn.utils.clip_grads_with_norm_([p for p in model.parameters() if p.grad is not None], max_norm, total)
    return total


def _norm(gradients: list[Tensor], norm_type: float) -> Tensor:
    return torch.nn.utils.get_total_norm(gradients, norm_type) if gradients else torch.zeros(())


def _over_ranks(own: Tensor, others: Tensor, norm_type: float, region: Region) -> Tensor:
    """The norm of the shares of all ranks, of which ``own`` is that of this one's, and of what is whole."""
    own = own.to(others.device, torch.promote_types(own.dtype, others.dtype))
    total = norm_over_ranks(own, norm_type, region.ranks)
    norm: Tensor = torch.linalg.vector_norm(torch.stack([total, others.to(total.dtype)]), norm_type)
    return norm
