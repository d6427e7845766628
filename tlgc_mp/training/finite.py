"""Whether a run has anything left worth saving: losses and weights that are numbers."""

from __future__ import annotations

import math

import torch


class NonFiniteError(ArithmeticError):
    """The loss, or a weight, is NaN or infinite."""


def check_finite(loss_sum: float, epoch: int, step: int) -> None:
    """The sum of an epoch's losses stays NaN or infinite once it is."""
    if not math.isfinite(loss_sum):
        raise NonFiniteError(_not_finite(f"the loss is {loss_sum}", epoch, step))


@torch.no_grad()
def check_weights(model: torch.nn.Module, epoch: int, step: int) -> None:
    """The last step before a checkpoint may have spoilt weights that no loss has shown yet."""
    for name, param in model.named_parameters():
        held = getattr(param, "ds_tensor", param)  # under ZeRO 3 this rank's part
        if not torch.isfinite(held).all():
            raise NonFiniteError(_not_finite(f"the weights {name} are not finite", epoch, step))


def _not_finite(what: str, epoch: int, step: int) -> str:
    return (
        f"{what} in epoch {epoch + 1} after step {step}; nothing of it is saved; lower --learning-rate, or --resume "
        "from an earlier checkpoint"
    )
