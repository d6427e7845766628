"""Initial weights that do not depend on how a model is split.

Every parameter is drawn block by block, each block from a random stream of its own that depends only on (seed,
parameter name, block index). A block is what no split ever cuts: a group of a two-level layer, an output channel of any
other convolution, an input feature of the classifier. So a rank that holds blocks 4 to 7 draws exactly the values
that one device draws for them, and draws nothing else.

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
def _normal_blocks(param: Tensor, std: float, blocks: int, first: int, seed: int, name: str, dim: int = 0) -> None:
    generator = torch.Generator()
    for index, block in enumerate(param.tensor_split(blocks, dim=dim)):
        generator.manual_seed(block_seed(seed, name, first + index))
        for part in block if block.dim() == 4 else (block,):  # filter by filter, in whichever memory format
            part.copy_(torch.empty(part.shape).normal_(0.0, std, generator=generator))


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
        shard_index: which of its equal shards this model holds, when it is one; 0 when it is whole.

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
            count, first = module.local_groups, module.local_groups * shard_index
            for key, std in module.initial_deviations().items():
                _normal_blocks(getattr(module, key), std, count, first, seed, prefix + key)
        elif isinstance(module, FullyLearnableGroupConv2d):
            for key, std in module.initial_deviations().items():
                _normal_blocks(getattr(module, key), std, module.groups, 0, seed, prefix + key)
        elif isinstance(module, nn.Conv2d):
            count = module.weight.shape[0]
            std = math.sqrt(2.0 / module.weight[0].numel())
            _normal_blocks(module.weight, std, count, count * shard_index, seed, prefix + "weight")
        elif isinstance(module, nn.Linear):
            local = module.weight.shape[1]
            std = math.sqrt(1.0 / module.in_features)
            _normal_blocks(module.weight, std, local, local * shard_index, seed, prefix + "weight", dim=1)
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
