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
from typing import Any

import torch
from torch import Tensor, nn

from tlgc_mp.errors import UsageError, must_be
from tlgc_mp.nn.arguments import check_module
from tlgc_mp.nn.balanced import BalancedConvNd
from tlgc_mp.nn.fully_learnable import FullyLearnableGroupConv2d
from tlgc_mp.nn.two_level import TwoLevelConvNd


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
        for part in block if block.dim() > 2 else (block,):  # filter by filter, in whichever memory format
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
    1 / fan-in. BatchNorm: ones and zeros. Biases: zeros. Other layers: as their ``reset_parameters`` draws them from a
    random stream of the layer's own. The same ``seed`` always gives the same values, whatever was drawn before,
    whatever the device, and whatever the split.

    Args:
        model: on a real device.
        seed: any int.
        shard_index: which of its equal shards this model holds, when it is one; 0 when it is whole. A layer whose
            parameters are as large as its attributes (``out_channels`` and so on) say is whole in any case.

    Raises:
        UsageError: ``model`` is no module, ``seed`` no int, or a module has parameters of its own that nothing draws.
    """
    check_module("model", model)
    if not isinstance(seed, int):
        raise must_be("seed", "an int", seed)
    for name, module in model.named_modules():
        if drawn_by_blocks(module):
            draw_by_blocks(name, module, seed, shard_index)
        elif own := [key for key, param in module._parameters.items() if param is not None]:
            _check_reset(name, module, own)
            _reset(name, module, seed, own)


def materialize(model: nn.Module, device: torch.device, seed: int) -> None:
    """Moves ``model`` from the meta device to ``device``, with the values that :func:`init_parameters` draws, in place.

    What has values keeps them, and tied parameters stay tied.

    Raises:
        UsageError: as :func:`check_drawable`.
    """
    check_drawable(model)
    made: dict[int, Tensor] = {}
    for name, module in model.named_modules():
        if drawn_by_blocks(module):
            keys = _on_meta(module)
            _allocate(module, device, made)
            if keys:
                draw_by_blocks(name, module, seed)
        else:
            draw_whole(name, module, seed, made)
            module._apply(lambda tensor: tensor.to(device), recurse=False)


def check_drawable(model: nn.Module) -> None:
    """Raises :class:`UsageError` where a module has parameters or buffers on the meta device that nothing draws."""
    for name, module in model.named_modules():
        keys = _on_meta(module)
        if keys and not drawn_by_blocks(module):
            _check_reset(name, module, keys)


def drawn_by_blocks(module: nn.Module) -> bool:
    """Whether all that the module itself holds is drawn block by block, so that a rank can draw its share alone."""
    held = {key for key, tensor in {**module._parameters, **module._buffers}.items() if tensor is not None}
    if isinstance(module, TwoLevelConvNd | FullyLearnableGroupConv2d | BalancedConvNd):
        return held <= {*module.initial_deviations(), "bias"}
    if isinstance(module, nn.Conv2d | nn.Linear):
        return "weight" in module._parameters and held <= {"weight", "bias"}
    if isinstance(module, nn.BatchNorm2d):
        return held <= {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    return False


@torch.no_grad()
def draw_by_blocks(name: str, module: Any, seed: int, shard_index: int = 0) -> None:
    """Draws what a module holds for which :func:`drawn_by_blocks` is true: as :func:`init_parameters`, in place."""
    prefix = f"{name}." if name else ""
    if isinstance(module, TwoLevelConvNd | FullyLearnableGroupConv2d):
        here = module.local_groups if isinstance(module, TwoLevelConvNd) else module.groups
        for key, std in module.initial_deviations().items():
            blocks = (here, module.groups)
            _normal_blocks(getattr(module, key), std, blocks, seed, prefix + key, shard_index)
    elif isinstance(module, BalancedConvNd):
        for key, std in module.initial_deviations().items():
            blocks = (module.weight.shape[0], module.out_channels)
            _normal_blocks(getattr(module, key), std, blocks, seed, prefix + key, shard_index)
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
    else:
        module.reset_running_stats()
        if module.affine:
            module.weight.fill_(1.0)
    if getattr(module, "bias", None) is not None:
        module.bias.fill_(0.0)


def draw_whole(name: str, module: nn.Module, seed: int, made: dict[int, Tensor]) -> None:
    """Gives what the module itself holds on the meta device values on the CPU, as :func:`init_parameters` draws them.

    Args:
        made: by the id of the tensor on the meta device, what has taken its place so far.

    Raises:
        UsageError: ``reset_parameters`` leaves some of it out.
    """
    keys = [key for key in _on_meta(module) if id({**module._parameters, **module._buffers}[key]) not in made]
    _allocate(module, torch.device("cpu"), made)
    if keys and drawn_by_blocks(module):
        draw_by_blocks(name, module, seed)
    elif keys:
        _reset(name, module, seed, keys)


def _on_meta(module: nn.Module) -> list[str]:
    """The names of what the module itself holds on the meta device."""
    held = {**module._parameters, **module._buffers}
    return [key for key, tensor in held.items() if tensor is not None and tensor.is_meta]


def _allocate(module: nn.Module, device: torch.device, made: dict[int, Tensor]) -> None:
    for entries in (module._parameters, module._buffers):
        for key, tensor in entries.items():
            if tensor is not None and tensor.is_meta:
                if id(tensor) not in made:
                    empty = torch.empty_like(tensor, device=device)
                    made[id(tensor)] = (
                        nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
                    )
                entries[key] = made[id(tensor)]  # type: ignore[assignment]


def _check_reset(name: str, module: nn.Module, keys: list[str]) -> None:
    if not hasattr(module, "reset_parameters"):
        raise UsageError(
            f"model: {_told(name, module)} must have a reset_parameters() that gives {', '.join(keys)} initial values, "
            "got none; write one, or build the model on a real device"
        )


def _told(name: str, module: nn.Module) -> str:
    return f"{name or 'the model itself'}, a {type(module).__name__},"


@torch.no_grad()
def _reset(name: str, module: Any, seed: int, keys: list[str]) -> None:
    """Calls ``reset_parameters``, from a random stream of the module's own, and sees that it has filled ``keys``."""
    for tensor in (getattr(module, key) for key in keys):
        if tensor.dtype != torch.bool:
            real = tensor.is_floating_point() or tensor.is_complex()
            tensor.fill_(math.nan if real else torch.iinfo(tensor.dtype).min)
    before = torch.get_rng_state()
    try:
        torch.default_generator.manual_seed(block_seed(seed, name, 0))
        module.reset_parameters()
    finally:
        torch.set_rng_state(before)
    for key in keys:
        tensor = getattr(module, key)
        real = tensor.is_floating_point() or tensor.is_complex()
        left = (
            tensor.isnan() if real else tensor == torch.iinfo(tensor.dtype).min if tensor.dtype != torch.bool else None
        )
        if left is not None and left.any():
            raise UsageError(
                f"model: {_told(name, module)} must give {key} initial values in reset_parameters(), got none; have it "
                "do so, or build the model on a real device"
            )
