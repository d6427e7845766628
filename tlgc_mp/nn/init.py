"""Initial weights that do not depend on how a model is split.

Every parameter is drawn block by block, each block from a random stream of its own that depends only on (seed,
parameter name, block index). A block is a group of a two-level layer, an output channel of any other convolution, an
input feature of a linear layer. So a rank that holds blocks 4 to 7 draws exactly the values that one device draws for
them, and draws nothing else. A rank that holds a part of every block draws the blocks one by one, and keeps its parts.

He initialization with the fan of one group, Section 4 of https://arxiv.org/abs/2110.05060.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from tlgc_mp.errors import UsageError
from tlgc_mp.nn.arguments import check_module
from tlgc_mp.nn.fully_learnable import FullyLearnableGroupConv2d
from tlgc_mp.nn.two_level import TwoLevelConv2d


def block_seed(seed: int, name: str, block: int) -> int:
    """The seed of one block's random stream: 63 bits of a hash of the three."""
    digest = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@torch.no_grad()
def _normal_blocks(
    param: Tensor,
    std: float,
    blocks: tuple[int, int],
    seed: int,
    name: str,
    shard_index: int,
    *,
    dim: int = 0,
    length: int | None = None,
) -> None:
    """Fills ``param``, which is whole or an equal share.

    Args:
        blocks: how many blocks ``param`` has along ``dim``, and how many the whole parameter has.
        length: of the whole parameter along its other dimension, where that may be the one that is cut.
    """
    first = _start(*blocks, shard_index)
    generator = torch.Generator()
    for index, block in enumerate(param.tensor_split(blocks[0], dim=dim)):
        generator.manual_seed(block_seed(seed, name, first + index))
        for part in block if block.dim() == 4 else (block,):  # filter by filter, in whichever memory format
            own = part.shape[0]
            drawn = torch.empty(length or own, *part.shape[1:]).normal_(0.0, std, generator=generator)
            part.copy_(drawn.narrow(0, _start(own, length or own, shard_index), own))


def _start(own: int, whole: int, shard_index: int) -> int:
    """Where in ``whole`` the equal share begins that is ``own`` long, or 0 where that is all of it."""
    return own * shard_index if own < whole else 0


@torch.no_grad()
def init_parameters(model: nn.Module, seed: int, *, shard_index: int = 0) -> None:
    """Draws every parameter of ``model`` and resets its running statistics, in place.

    Convolutions: normal with variance 2 / fan-in, the fan-in that of one group; two-level and fully learnable ones as
    their ``initial_deviations`` say. Classifier: normal with variance
    1 / fan-in. BatchNorm: ones and zeros. Biases: zeros. The same ``seed`` always gives the same values, whatever was
    drawn before, whatever the device, and whatever the split.

    Args:
        model: built of convolutions, BatchNorm and linear layers, on a real device.
        seed: any int.
        shard_index: which of its equal shards this model holds, when it is one; 0 when it is whole. A layer whose
            parameters are as large as its attributes (``out_channels`` and so on) say is whole in any case.

    Raises:
        UsageError: ``model`` is no module, or ``seed`` no int.
        TypeError: a module holds parameters of its own that no rule here covers.
    """
    check_module("model", model)
    if not isinstance(seed, int):
        raise UsageError(f"seed={seed!r} is no seed; use an int")
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        if isinstance(module, TwoLevelConv2d):
            groups = (module.local_groups, module.groups)
            for key, std in module.initial_deviations().items():
                _normal_blocks(getattr(module, key), std, groups, seed, prefix + key, shard_index)
        elif isinstance(module, FullyLearnableGroupConv2d):
            groups = (module.groups, module.groups)
            for key, std in module.initial_deviations().items():
                _normal_blocks(getattr(module, key), std, groups, seed, prefix + key, shard_index)
        elif isinstance(module, nn.Conv2d):
            weight = module.weight
            all_filters = weight.shape[0] == module.out_channels  # of which a rank may hold some input channels
            length = module.in_channels if all_filters and module.groups == 1 else weight.shape[1]
            std = math.sqrt(2.0 / (length * weight[0, 0].numel()))
            filters = (weight.shape[0], module.out_channels)
            _normal_blocks(weight, std, filters, seed, prefix + "weight", shard_index, length=length)
        elif isinstance(module, nn.Linear):
            std = math.sqrt(1.0 / module.in_features)
            features = (module.weight.shape[1], module.in_features)
            length = module.out_features
            _normal_blocks(module.weight, std, features, seed, prefix + "weight", shard_index, dim=1, length=length)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            if module.affine:
                module.weight.fill_(1.0)
                module.bias.fill_(0.0)
            continue
        elif any(True for _ in module.parameters(recurse=False)):
            raise TypeError(f"{module_name or 'the model'} is a {type(module).__name__}, which has no initial values")
        if getattr(module, "bias", None) is not None:
            module.bias.fill_(0.0)  # type: ignore[union-attr, operator]
