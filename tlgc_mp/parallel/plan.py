"""Which part of which layer a tensor-parallel rank holds.

Every parameter may be cut along any dimension, or held whole by every rank: a network computes the same in any case,
since code that reads a parameter sees all of it (``layers.py``), and each operator takes what it needs
(``split_tensor.py``). The plan decides what a step costs. It reads shapes only, so it works on the meta device and
without a process group, and it refuses nothing but layers that have no shapes yet.

    column      a dense convolution or linear layer: its input whole, its output channels cut
    row         the same: its input channels cut, and a sum over the ranks; in each group, of a group convolution
                of which P does not divide the groups
    gathered    column, in a network whose code between layers is known to leave channels apart
    grouped     group (and depthwise) convolution: local
    two-level   two-level group convolution: local, but for the coarse gather
    prototype   its prototype: the same
    balanced    balanced group convolution: local, but for a sum of n/N feature maps
    shuffle     group convolution with shuffled channels: local, but for an all-to-all of its output
    channels    normalization, PReLU: a value a channel; local, or a sum a position
    synchronized  SyncBatchNorm: the same, with statistics over the replicas
    heads       multi-head attention: column, each rank its heads
    dropout     nothing to hold; it draws what one device draws
    whole       held by every rank
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from tlgc_mp.errors import UsageError, is_count
from tlgc_mp.nn import (
    BalancedConv2d,
    FullyLearnableGroupConv2d,
    ShuffleConv2d,
    TwoLevelConv2d,
    TwoLevelPrototypeConv2d,
)
from tlgc_mp.nn.balanced import BalancedConvNd
from tlgc_mp.nn.prototype import TwoLevelPrototypeConvNd
from tlgc_mp.nn.shuffle import ShuffleConvNd
from tlgc_mp.nn.two_level import TwoLevelConvNd
from tlgc_mp.parallel.layout import WHOLE, Layout


@dataclass(frozen=True)
class Placement:
    """How one layer is held.

    Attributes:
        kind: one of the kinds in this module's docstring.
        dims: parameter or buffer name -> the dimension cut into P shares. What is not named is whole on every rank.
        reason: why a layer is whole; empty otherwise.
        segments: sizes of the pieces that each cut dimension is a row of, each cut by itself; ``None`` for one piece.
    """

    kind: str
    dims: dict[str, int] = field(default_factory=dict)
    reason: str = ""
    segments: tuple[int, ...] | None = None

    def layout(self, name: str) -> Layout:
        """How the parameter or buffer ``name`` is cut."""
        return Layout(self.dims[name], self.segments) if name in self.dims else WHOLE


def plan(model: nn.Module, tensor_parallel: int) -> dict[str, Placement]:
    """Module name -> placement, for every layer of ``model`` that holds parameters or draws random numbers.

    Args:
        model: on any device, the meta device included.
        tensor_parallel: P.

    Raises:
        UsageError: P is not a number of ranks, or a lazy layer has not seen its first batch.
    """
    if not is_count(tensor_parallel):
        raise UsageError(f"tensor_parallel must be a number of ranks, got {tensor_parallel!r}; use 1 or more")
    placements: dict[str, Placement] = {}
    channels_apart = channels_stay_apart(model)
    stem = next((m for m in model.modules() if isinstance(m, _ConvNd)), None)
    only_linear = sum(type(m) is nn.Linear for m in model.modules()) == 1
    for name, module in model.named_modules():
        for key, param in module.named_parameters(recurse=False):
            if is_lazy(param):
                raise UsageError(f"{name}.{key} must have a shape, got none yet; run one batch through the model first")
        placement = _placement(module, tensor_parallel, name)
        if placement is None:
            continue
        if isinstance(module, _ConvNd) and placement.kind == "row" and (module is stem or channels_apart):
            placement = (_column(module, tensor_parallel) if module.groups == 1 else None) or placement
        if channels_apart and placement.kind == "column" and module is not stem:
            placement = Placement("gathered", placement.dims)
        if type(module) is nn.Linear and only_linear and module.in_features % tensor_parallel == 0:
            placement = Placement("row", {"weight": 1})
        placements[name] = placement
    _keep_ties_whole(model, placements)
    return placements


_LEAVES = (
    *(nn.Conv2d, nn.BatchNorm2d, nn.Linear, nn.Dropout, nn.Identity, nn.Flatten, nn.ReLU, nn.ReLU6, nn.Sequential),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, TwoLevelConv2d, TwoLevelPrototypeConv2d, ShuffleConv2d),
    BalancedConv2d,
)


def channels_stay_apart(model: nn.Module) -> bool:
    """Whether it is known of all code of ``model`` that, between layers, a share of the channels is as good as all.

    A model's class vouches for itself and for the classes of its parts in ``channels_apart``; a subclass, a part of
    another class that somebody put in, or a forward of its own, is not vouched for.
    """
    cls = unsplit_class(model)
    if "channels_apart" not in vars(cls):
        return False
    vouched = (cls, *vars(cls)["channels_apart"], *_LEAVES)
    return all(unsplit_class(module) in vouched and not _has_own_forward(module) for module in model.modules())


def _has_own_forward(module: nn.Module) -> bool:
    """Whether somebody gave this very module another forward; this package's activation checkpointing may."""
    return "forward" in vars(module) and not is_recomputed(module)


def is_recomputed(module: nn.Module) -> bool:
    """Whether this very module is a block under this package's activation checkpointing."""
    forward = vars(module).get("forward")
    return (getattr(getattr(forward, "func", None), "__module__", None) or "").startswith("tlgc_mp.")


def goes_plain(model: nn.Module, placements: dict[str, Placement]) -> bool:
    """Whether shares can go from layer to layer of ``model`` as plain tensors: all are split, and stay apart."""
    return channels_stay_apart(model) and all(
        placement.kind != "whole" and (placement.kind != "row" or isinstance(model.get_submodule(name), nn.Linear))
        for name, placement in placements.items()
    )


def unsplit_class(module: nn.Module) -> type:
    """The class that a module had before it was split."""
    cls: type = type(module)
    while "made_from" in vars(cls):
        cls = vars(cls)["made_from"][0]
    return cls


def _placement(module: nn.Module, ranks: int, name: str) -> Placement | None:
    held = set(_held(module))
    if isinstance(module, TwoLevelConvNd | ShuffleConvNd | BalancedConvNd):
        kind = "shuffle" if isinstance(module, ShuffleConvNd) else "balanced"
        if isinstance(module, TwoLevelConvNd):
            kind = "prototype" if isinstance(module, TwoLevelPrototypeConvNd) else "two-level"
        if module.groups % ranks:
            return Placement("whole", reason=f"{ranks} ranks do not divide its {module.groups} groups")
        return Placement(kind, dict.fromkeys(_parameters(module), 0))
    if isinstance(module, FullyLearnableGroupConv2d):
        return Placement("whole", reason="its groups are learned, and any filter may come to read any channel")
    if isinstance(module, nn.Dropout):
        return Placement("dropout")
    if not held:
        return None
    found: Placement | None = None
    if isinstance(module, _ConvNd) and "weight" in held:
        found = _convolution(module, ranks)
    elif isinstance(module, nn.Linear) and "weight" in held:
        found = _linear(module, ranks, name)
    elif isinstance(module, nn.MultiheadAttention):
        found = _attention(module, ranks)
    elif isinstance(module, _NormBase | nn.GroupNorm | nn.PReLU):
        found = _channels(module, held, ranks)
        if found is not None and isinstance(module, nn.SyncBatchNorm):
            found = Placement("synchronized", found.dims)
    elif isinstance(module, nn.LayerNorm) and module.normalized_shape[0] % ranks == 0:
        found = Placement("channels", dict.fromkeys(_parameters(module), 0))
    if found is not None:
        return found
    if isinstance(module, _ConvNd | nn.Linear | _NormBase | nn.GroupNorm | nn.LayerNorm):
        return Placement("whole", reason=f"{ranks} ranks do not divide its channels, or its weight is computed")
    return Placement("whole", reason=f"no rule for a {type(module).__name__}")


def _parameters(module: nn.Module) -> list[str]:
    """What the module itself holds, and does not compute: to read that may change it, as under ``spectral_norm``."""
    return [name for name, _ in module.named_parameters(recurse=False)]


def _held(module: nn.Module) -> Iterator[str]:
    yield from _parameters(module)
    yield from (name for name, _ in module.named_buffers(recurse=False))


def _convolution(layer: _ConvNd, ranks: int) -> Placement | None:
    transposed = isinstance(layer, _ConvTransposeNd)
    bias = {"bias": 0} if "bias" in _parameters(layer) else {}
    if layer.groups > 1:
        if layer.groups % ranks == 0:
            return Placement("grouped", {"weight": 0, **bias})
        inputs = layer.in_channels // layer.groups
        return None if transposed or inputs % ranks else Placement("row", {"weight": 1})
    # Column-parallel gathers its input twice and scatters a gradient of its size, row-parallel scatters its output and
    # gathers a gradient of that size.
    if layer.in_channels % ranks == 0 and (layer.out_channels <= layer.in_channels or layer.out_channels % ranks):
        return Placement("row", {"weight": 0 if transposed else 1})
    return _column(layer, ranks)


def _column(layer: _ConvNd, ranks: int) -> Placement | None:
    if layer.out_channels % ranks:
        return None
    bias = {"bias": 0} if "bias" in _parameters(layer) else {}
    return Placement("column", {"weight": 1 if isinstance(layer, _ConvTransposeNd) else 0, **bias})


_FUSED = {"qkv": 3, "kv": 2}
"""Name that a layer goes by -> how many layers of attention are usually one in it, each cut by itself."""


def _linear(layer: nn.Linear, ranks: int, name: str) -> Placement | None:
    """Row-parallel where there are fewer outputs than inputs: where two layers of an MLP follow, column, then row."""
    fused = _FUSED.get(name.rpartition(".")[2], 1)
    if fused > 1 and layer.out_features % (fused * ranks) == 0:
        pieces = (layer.out_features // fused,) * fused
        return Placement("column", dict.fromkeys(_parameters(layer), 0), segments=pieces)
    if layer.in_features >= layer.out_features and layer.in_features % ranks == 0:
        return Placement("row", {"weight": 1})
    if layer.out_features % ranks:
        return None
    return Placement("column", dict.fromkeys(_parameters(layer), 0))


def _attention(layer: nn.MultiheadAttention, ranks: int) -> Placement | None:
    """The heads are cut; queries, keys and values each, where one parameter holds the three."""
    if layer.num_heads % ranks:
        return None
    names = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    dims = {name: 0 for name in names if name in _parameters(layer)}
    if "in_proj_weight" in dims:
        return Placement("heads", dims, segments=(layer.embed_dim,) * 3)
    dims.pop("in_proj_bias", None)  # of three layers, where the weights are of one each
    return Placement("heads", dims) if dims else None


def _channels(layer: nn.Module, held: set[str], ranks: int) -> Placement | None:
    names = sorted(held & {"weight", "bias", "running_mean", "running_var"})
    tensors = [getattr(layer, name) for name in names]
    if not tensors or any(not isinstance(t, Tensor) or t.dim() != 1 or t.shape[0] % ranks for t in tensors):
        return None
    return Placement("channels", dict.fromkeys(names, 0))


def _keep_ties_whole(model: nn.Module, placements: dict[str, Placement]) -> None:
    """A parameter that two layers hold is cut where both cut it alike, and whole otherwise."""
    cuts: dict[int, set[Layout]] = {}
    for name, module in model.named_modules():
        for key, param in module.named_parameters(recurse=False, remove_duplicate=False):
            cut = placements[name].layout(key) if name in placements else WHOLE
            cuts.setdefault(id(param), set()).add(cut)
    for name, placement in list(placements.items()):
        module = model.get_submodule(name)
        tied = [
            key for key in placement.dims if key in module._parameters and len(cuts[id(module._parameters[key])]) > 1
        ]
        if tied and placement.kind in _LOCAL:
            placements[name] = Placement("whole", reason=f"{tied[0]} is tied to another layer's")
        elif tied:
            kept = {key: dim for key, dim in placement.dims.items() if key not in tied}
            reason = f"{tied[0]} is tied to another layer's"
            placements[name] = Placement(placement.kind, kept, reason, placement.segments)


_LOCAL = ("two-level", "prototype", "balanced", "shuffle")


def parameter_counts(model: nn.Module, tensor_parallel: int) -> dict[str, int]:
    """``{"total": ..., "per_rank": ...}``: parameters of the whole model, and of the part one of P ranks holds.

    Of a fully learnable group convolution, the weights count that survive where its groups are equal, as in Table 3 of
    https://arxiv.org/abs/2110.05060.
    """
    placements = plan(model, tensor_parallel)
    total = per_rank = 0
    counted: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, FullyLearnableGroupConv2d):
            total += module.balanced_parameters
            per_rank += module.balanced_parameters
            continue
        for key, param in module.named_parameters(recurse=False):
            if id(param) in counted:
                continue
            counted.add(id(param))
            total += param.numel()
            split = name in placements and key in placements[name].dims
            per_rank += param.numel() // (tensor_parallel if split else 1)
    return {"total": total, "per_rank": per_rank}
