"""Which part of which layer a tensor-parallel rank holds.

Activations stay split by channel from the stem to the head, in P equal contiguous shares. Every layer that has
parameters or draws random numbers falls in one of the kinds below; anything else is refused by name, and so is a fully
learnable group convolution on more than one rank. The plan reads shapes only, so it works on the meta device and
without a process group: splitting a model and counting its parameters follow the same plan.

    column      the stem: whole input, output channels split; no communication
    grouped     group (and depthwise) convolution: local
    two-level   two-level group convolution: local, but for the coarse gather
    prototype   its prototype: the same
    shuffle     group convolution with shuffled channels: local, but for an all-to-all of its output
    gathered    a dense convolution in the middle: input channels gathered, output channels split; exact and expensive
    channels    BatchNorm, and subclasses that hold what it holds: local
    dropout     local: its channels of what is dropped of all
    row         the head: input features split, partial logits summed
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from tlgc_mp.errors import UsageError, divisors, one_of
from tlgc_mp.models.names import FLGC_ACROSS_RANKS
from tlgc_mp.nn import FullyLearnableGroupConv2d, ShuffleConv2d, TwoLevelConv2d, TwoLevelPrototypeConv2d


@dataclass(frozen=True)
class Placement:
    """How one layer is split.

    Attributes:
        kind: one of the kinds in this module's docstring.
        dims: parameter or buffer name -> the dimension cut into P shares. What is not named is whole on every rank.
    """

    kind: str
    dims: dict[str, int]


def plan(model: nn.Module, tensor_parallel: int) -> dict[str, Placement]:
    """Module name -> placement, for every layer of ``model`` that holds parameters or draws random numbers.

    The first convolution is the stem, and the one linear layer the head.

    Args:
        model: on any device, the meta device included.
        tensor_parallel: P.

    Raises:
        UsageError: a layer that cannot be split over P ranks, by name, with what would work.
    """
    _check_ties(model)
    placements: dict[str, Placement] = {}
    stem_found = False
    head_name = ""
    for name, module in model.named_modules():
        if isinstance(module, TwoLevelConv2d):
            _check_share("groups", module.groups, tensor_parallel, name)
            kind = "prototype" if isinstance(module, TwoLevelPrototypeConv2d) else "two-level"
            placements[name] = Placement(kind, dict.fromkeys(_names(module), 0))
            stem_found = True
        elif isinstance(module, ShuffleConv2d):
            _check_share("groups", module.groups, tensor_parallel, name)
            placements[name] = Placement("shuffle", dict.fromkeys(_names(module), 0))
            stem_found = True
        elif isinstance(module, FullyLearnableGroupConv2d):
            if tensor_parallel > 1:
                raise UsageError(f"{name}: a FullyLearnableGroupConv2d {FLGC_ACROSS_RANKS}; use replicas")
            stem_found = True
        elif type(module) is nn.Conv2d:
            if not stem_found:
                kind = "column"
                _check_share("out_channels", module.out_channels, tensor_parallel, name)
            elif module.groups > 1:
                kind = "grouped"
                _check_share("groups", module.groups, tensor_parallel, name)
            else:
                kind = "gathered"
                _check_share("in_channels", module.in_channels, tensor_parallel, name)
                _check_share("out_channels", module.out_channels, tensor_parallel, name)
            if kind != "grouped" and module.groups > 1:
                raise UsageError(f"{name}: a stem with groups={module.groups} cannot be split; use a dense one")
            placements[name] = Placement(kind, dict.fromkeys(_names(module), 0))
            stem_found = True
        elif isinstance(module, nn.BatchNorm2d) and {*module._parameters, *module._buffers} == _BATCH_NORM:
            _check_share("num_features", module.num_features, tensor_parallel, name)
            names = [n for n in (*_names(module), "running_mean", "running_var") if getattr(module, n) is not None]
            placements[name] = Placement("channels", dict.fromkeys(names, 0))
        elif type(module) is nn.Linear:
            if head_name:
                raise UsageError(f"{name}: a second linear layer after {head_name} cannot be split; one head is")
            head_name = name
            _check_share("in_features", module.in_features, tensor_parallel, name)
            placements[name] = Placement("row", {"weight": 1})
        elif type(module) is nn.Dropout:
            if head_name or not stem_found:
                raise UsageError(
                    f"{name or 'the model'}: Dropout before the stem or after the head cannot be split, since every "
                    "rank holds all of its input; put it between them"
                )
            placements[name] = Placement("dropout", {})
        elif isinstance(module, _UNKNOWN) or _names(module):
            raise UsageError(
                f"{name or 'the model'}: {type(module).__name__} mixes channels, holds parameters or draws at random, "
                "and how to split it is not known; use convolutions, BatchNorm2d, Dropout, and one Linear as the head"
            )
    return placements


_UNKNOWN = (
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    nn.ChannelShuffle,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.Softmax,
    nn.Softmax2d,
    nn.LogSoftmax,
    nn.MultiheadAttention,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    nn.RReLU,
)
"""Without parameters, and yet not to be left as they are: they mix channels or draw random numbers."""


_BATCH_NORM = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


def _names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters(recurse=False)]


def _check_ties(model: nn.Module) -> None:
    """Raises :class:`UsageError` where two layers hold the same parameter, which would become two."""
    holders: dict[int, str] = {}
    for name, module in model.named_modules():
        for key, param in module._parameters.items():
            if param is not None and holders.setdefault(id(param), f"{name}.{key}") != f"{name}.{key}":
                raise UsageError(
                    f"{name}.{key}: it is the same parameter as {holders[id(param)]}, and how to split what is tied is "
                    "not known; give each layer its own"
                )


def _check_share(what: str, count: int, ranks: int, name: str) -> None:
    if ranks < 1 or count % ranks:
        raise UsageError(
            f"tensor_parallel={ranks} does not divide {what}={count} of {name}; use {one_of(divisors(count))}"
        )


def parameter_counts(model: nn.Module, tensor_parallel: int) -> dict[str, int]:
    """``{"total": ..., "per_rank": ...}``: parameters of the whole model, and of the part one of P ranks holds.

    Of a fully learnable group convolution, the weights count that survive where its groups are equal, as in Table 3 of
    https://arxiv.org/abs/2110.05060.
    """
    placements = plan(model, tensor_parallel)
    total = per_rank = 0
    for name, module in model.named_modules():
        if isinstance(module, FullyLearnableGroupConv2d):
            total += module.balanced_parameters
            per_rank += module.balanced_parameters
            continue
        for key, param in module.named_parameters(recurse=False):
            total += param.numel()
            split = name in placements and key in placements[name].dims
            per_rank += param.numel() // (tensor_parallel if split else 1)
    return {"total": total, "per_rank": per_rank}
