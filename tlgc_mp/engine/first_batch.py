"""Whether the ranks of a replica are given the same first batch, whatever it is made of.

DeepSpeed's engine compares the first inputs where they are tensors; those of a detector are lists and dicts.
"""

from __future__ import annotations

import hashlib
import io

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map_only

from tlgc_mp.engine.protocols import Engine
from tlgc_mp.errors import UsageError


def check_first_batch(engine: Engine, group: dist.ProcessGroup) -> None:
    """Has the first forward pass of ``engine`` raise :class:`UsageError` where the inputs differ over ``group``."""
    if engine.first_dataloader_check is not None:
        engine.first_dataloader_check.remove()

    def check(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        handle.remove()
        digests: list[str | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(digests, _digest((args, kwargs)), group=group)
        if len(set(digests)) > 1:
            raise UsageError(
                "inputs must be the same on every tensor-parallel rank of a replica, got different ones; have the data "
                "loader go by the rank of the replica, not by that of the process"
            )

    handle = engine.module.register_forward_pre_hook(check, prepend=True, with_kwargs=True)
    engine.first_dataloader_check = handle


def _digest(inputs: object) -> str:
    def plain(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().cpu().contiguous().clone()

    file = io.BytesIO()
    torch.save(tree_map_only(torch.Tensor, plain, inputs), file)
    return hashlib.sha256(file.getvalue()).hexdigest()
