"""Activation checkpointing: a block keeps only its input for backward, where it is computed once more.

It is DeepSpeed's own (``deepspeed.checkpointing``), with what that leaves to its caller: BatchNorm counts a batch once,
and what ran under autocast runs under it again.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import TypeAlias, cast

import torch
from deepspeed.runtime.activation_checkpointing import checkpointing
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from tlgc_mp.errors import UsageError, must_be
from tlgc_mp.nn.arguments import check_module
from tlgc_mp.parallel.sharded import ShardedLayer

CheckpointFunction = checkpointing.CheckpointFunction
"""The function of autograd in which a block runs."""

Blocks: TypeAlias = type[nn.Module] | tuple[type[nn.Module], ...]


def checkpoint_activations(model: nn.Module, blocks: Blocks | None = None) -> nn.Module:
    """Has every block of ``model`` keep only its input for backward, in place, before or after ``model`` is split.

    Losses and BatchNorm's statistics stay bit for bit what they are, and gradients up to rounding: the gradient of a
    block's input is stored in the strides of that input, and kernels may sum in another order where they were others.
    A step costs one more forward pass of the blocks, their collectives included. Names of parameters and modules stay
    as they are.

    Args:
        blocks: the class or classes of the blocks, of which the outermost count: torchvision's ``BasicBlock``, say;
            the residual blocks of this package's models where not given. A block takes tensors by position, returns
            one, and does not change its inputs in place.

    Returns:
        ``model``.

    Raises:
        UsageError: ``model`` has no such block, or one that holds no layers.
    """
    if blocks is None:
        blocks = getattr(model, "block_types", None)
        if blocks is None:
            raise UsageError(
                f"blocks must be given for a {type(model).__name__}, got none; give the classes of its blocks"
            )
    check_module("model", model)
    classes = blocks if isinstance(blocks, tuple) else (blocks,)
    if not classes or not all(isinstance(block, type) and issubclass(block, nn.Module) for block in classes):
        raise must_be("blocks", "a class of modules, or a tuple of them", blocks)
    found = list(_outermost(model, blocks))
    names = ", ".join(block.__name__ for block in classes)
    if not found:
        raise UsageError(f"blocks must be classes of the model's blocks, got {names}, of which it has none")
    for block in found:
        if next(block.children(), None) is None:  # splitting would replace it
            raise must_be("blocks", "classes of blocks that hold layers", type(block))
        block.forward = functools.partial(_checkpointed, block)
    return model


def _outermost(module: nn.Module, blocks: Blocks) -> Iterator[nn.Module]:
    if isinstance(module, blocks):
        yield module
        return
    for child in module.children():
        yield from _outermost(child, blocks)


def _checkpointed(block: nn.Module, *inputs: Tensor) -> Tensor:
    """The forward pass of ``block`` under activation checkpointing, as far as there is going to be a backward one."""
    forward: Callable[..., Tensor] = functools.partial(type(block).forward, block)
    if not torch.is_grad_enabled():
        return forward(*inputs)
    if checkpointing.PARTITION_ACTIVATIONS and checkpointing.mp_size > 1:
        raise UsageError(
            "activation_checkpointing.partition_activations must be left out, since activations are already split over "
            "the ranks by channel, got true"
        )
    if not any(x.requires_grad for x in inputs):
        # The block's parameters would get no gradient: DeepSpeed goes by the inputs.
        inputs = tuple(x.detach().requires_grad_(x.is_floating_point()) for x in inputs)
    autocast, shares = _current_autocast(inputs[0].device.type), _current_shares(block)
    computed = itertools.count()

    def compute(*inputs: Tensor) -> Tensor:
        if next(computed) == 0:
            return forward(*inputs)
        with autocast, shares(), _statistics_at_rest(block):
            return forward(*inputs)

    if inputs[0].is_meta:  # which DeepSpeed would move to its device
        return cast(Tensor, torch_checkpoint(compute, *inputs, use_reentrant=True, preserve_rng_state=False))
    return cast(Tensor, checkpointing.checkpoint(compute, *inputs))


def _current_autocast(device: str) -> contextlib.AbstractContextManager[object]:
    """The autocast of now, to be entered again: backward runs outside it."""
    if not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext()
    return torch.autocast(
        device,
        dtype=torch.get_autocast_dtype(device),
        enabled=torch.is_autocast_enabled(device),
        cache_enabled=torch.is_autocast_cache_enabled(),
    )


def _current_shares(block: nn.Module) -> Callable[[], contextlib.AbstractContextManager[object]]:
    """What enters again whether plain shares go from layer to layer, as now: backward runs outside the split model."""
    for module in block.modules():
        if isinstance(module, ShardedLayer):
            return functools.partial(module.tlgc_region.set_plain, module.tlgc_region.plain)
    return contextlib.nullcontext


@contextlib.contextmanager
def _statistics_at_rest(block: nn.Module) -> Iterator[None]:
    """Keeps BatchNorm from counting a batch that it has counted; what it computes stays the same."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
