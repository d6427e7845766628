"""One pass of a split model on the meta device: every rule is asked, nothing is computed and nothing is sent.

So one process sees what each of any number of ranks would do.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tlgc_mp.errors import UsageError
from tlgc_mp.parallel.layout import Ranks
from tlgc_mp.parallel.plan import Placement, goes_plain
from tlgc_mp.parallel.replicas import ReplicaWatch
from tlgc_mp.parallel.sharded import Region, without_engine


def copy_on_meta(model: nn.Module, ranks: int, placements: dict[str, Placement] | None) -> nn.Module:
    """A copy of ``model`` on the meta device, as the first of ``ranks`` that talk to nobody holds it.

    Args:
        model: a one-device model, or one that was split; on any device. It is left as it is.
        ranks: P.
        placements: of a one-device model's layers; ``None`` for one that was split.
    """
    memo: dict[int, object] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        twin = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin
    region = getattr(model, "tlgc_region", None)
    alone = Ranks(size=ranks)
    if isinstance(region, Region):
        memo[id(region)] = Region(alone, alone, region.channels_apart)
        model = without_engine(model, memo.copy())
    copied = copy.deepcopy(model, memo)
    for hooks in (copied._forward_pre_hooks, copied._forward_hooks):  # ranks that are alone have nobody to compare with
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), ReplicaWatch)]:
            del hooks[key]
    if placements is not None:
        from tlgc_mp.parallel.sharding import split_layers

        split_layers(copied, placements, Region(alone, alone, goes_plain(copied, placements)), torch.device("meta"))
    return copied


def run_on_meta(twin: nn.Module, inputs: object) -> object:
    """What a model on the meta device gives for inputs of these shapes.

    Args:
        twin: by :func:`copy_on_meta`.
        inputs: a tensor, or a tuple of what the model takes; on any device.

    Raises:
        UsageError: the model's code reads values.
    """
    arguments = tree_map_only(Tensor, _meta_input, inputs if isinstance(inputs, tuple) else (inputs,))
    try:
        with _random_states_kept():
            return twin(*arguments)
    except (NotImplementedError, RuntimeError) as error:
        raise without_values(error) from error


@contextlib.contextmanager
def _random_states_kept() -> Iterator[None]:
    """Random states are afterwards what they were: a network may draw from Python's and NumPy's, too."""
    own, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(own)
        np.random.set_state(arrays)


def without_values(error: Exception) -> UsageError:
    """The error of a pass on the meta device, in the words of this package."""
    reason = str(error).splitlines()[0][:200]
    return UsageError(f"model cannot be measured without values, got {type(error).__name__}: {reason}")


def _meta_input(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)
