"""A model for inference: its two-level and balanced layers in plain torch, with BatchNorm folded into its convolutions.

*Two-level Group Convolution* (https://arxiv.org/abs/2110.05060), Equation (3.5), is linear: y = (A + S R_0) x. In
evaluation BatchNorm is a factor and a summand for each channel, which go into A, S and the bias.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tlgc_mp.errors import UsageError, told
from tlgc_mp.models.conversion import become, has_hooks
from tlgc_mp.nn.arguments import check_module
from tlgc_mp.nn.balanced import BalancedConvNd
from tlgc_mp.nn.composed import composed
from tlgc_mp.nn.two_level import TwoLevelConvNd
from tlgc_mp.nn.window import Window, channels_last_of

NARROW = 256
"""min(n, m) / N * d * d, below which one convolution is preferred: there is little to gain with three for it."""

PASS_INPUT, PASS_OUTPUT, GROUP_WIDTH = 20, 60, 32
"""Of the two levels apart, in multiplications of a dense convolution: what restricting an input channel costs for each
tap, what adding up an output channel costs, and the width at which a group convolution takes twice its arithmetic. One
thread of a Xeon, 1x1 and 3x3, 16 to 1024 channels, N = 2 to 16; docs/lab/performance.md."""


Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_CONVOLUTIONS: dict[int, type[Convolution]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_PADDINGS: dict[int, Callable[[Any], nn.Module]] = {1: nn.ZeroPad1d, 2: nn.ZeroPad2d, 3: nn.ZeroPad3d}


@dataclass(frozen=True)
class Folding:
    """What :func:`fold` did to a model; printed, it is a table.

    Attributes:
        layers: name of each two-level or balanced layer -> what it is now.
        batch_norms: name of each BatchNorm that is folded into the convolution before it.
        left: name of each that is not -> why.
    """

    layers: dict[str, str]
    batch_norms: list[str]
    left: dict[str, str]

    def __str__(self) -> str:
        rows = dict(self.layers) | {name: f"left: {reason}" for name, reason in self.left.items()}
        width = max(map(len, rows), default=0)
        total = f"{len(self.layers)} two-level or balanced layers and {len(self.batch_norms)} of BatchNorm folded"
        return "\n".join([*(f"{name:{width}}  {text}" for name, text in rows.items()), total])


class SumOfLevels(nn.Module):
    """A layer as three convolutions: fine(x) + prolongation(restriction(x))."""

    def __init__(self, fine: Convolution, restriction: nn.Module, prolongation: Convolution) -> None:
        super().__init__()
        self.fine = fine
        self.restriction = restriction
        self.prolongation = prolongation

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, H, W) -> (B, m, h, w), or of other dimensions."""
        y: Tensor = self.fine(x)
        return y.add_(self.prolongation(self.restriction(x)))


def fold(model: nn.Module) -> nn.Module:
    """A copy of ``model`` for inference, which computes the same in evaluation mode.

    Every two-level layer becomes one convolution of torch's with the filters A_k + S_k R_0 where that is about as
    fast, else a group convolution, a restriction and a 1x1 prolongation; a balanced one likewise, the mean of the
    groups being its restriction. Each BatchNorm that takes the output of one
    convolution, and is the only one to take it, goes into that convolution. What follows what is read from the graph
    that torch.fx makes of the model; where it makes none, BatchNorm stays.

    Args:
        model: any model on one device, as of :func:`tlgc_mp.create_model`, :func:`tlgc_mp.convert` or
            :func:`tlgc_mp.load_model`. It stays as it is.

    Returns:
        The copy, in evaluation mode, none of whose parameters asks for gradients. Its attribute ``folding`` is the
        :class:`Folding`.

    Raises:
        UsageError: a model that is split over ranks, or a two-level layer with hooks or code of its own.
    """
    check_module("model", model)
    for name, module in model.named_modules():
        _check(name, module)
    folded = copy.deepcopy(model).eval().requires_grad_(False)
    layers = {}
    for name, module in list(folded.named_modules()):
        if isinstance(module, TwoLevelConvNd | BalancedConvNd):
            become(module, plain := _plain(module) if isinstance(module, TwoLevelConvNd) else _balanced(module))
            layers[name] = repr(plain).partition("(")[0]
    batch_norms, left = _fold_batch_norms(folded)
    folded.folding = Folding(layers, batch_norms, left)  # type: ignore[assignment]
    return folded


def _check(name: str, module: nn.Module) -> None:
    if "region" in vars(module):
        raise UsageError(
            "model must be on one device, got one that is split over ranks; fold what tlgc_mp.load_model makes of its "
            "exported checkpoint"
        )
    kind = next((kind for kind in (TwoLevelConvNd, BalancedConvNd) if isinstance(module, kind)), None)
    if kind is None:
        return
    kinds_name = f"{kind.__name__.removesuffix('Nd')}{module.dims}d"
    if has_hooks(module):
        raise UsageError(f"model must have {kinds_name} layers without hooks, got some at {name!r}; remove them first")
    if type(module).forward is not kind.forward:
        raise UsageError(
            f"model must have {kinds_name} layers of this package, got a {type(module).__name__} with a forward of "
            f"its own at {name!r}; put a {kinds_name} in its place"
        )


@torch.no_grad()
def _plain(layer: TwoLevelConvNd) -> nn.Module:
    """The function of a layer as one convolution, or as three."""
    fine, coarse, groups = layer.fine_window, layer.coarse_window, layer.groups
    weight, restriction = layer.lifted(layer.weight).double(), layer.restriction_filters().double()
    prolongation = layer.prolongation_matrix().double()
    bias = None if layer.bias is None else layer.bias.double()
    coarse_groups = 1 if layer.coarse_sum else groups
    both = _around(fine, coarse)
    if both is not None and not _levels_are_faster(layer, both):
        filters = composed(_grown(weight, both), _grown(restriction, both), prolongation, groups=groups)
        return _convolution(layer, filters, bias, both)
    if min(coarse.padding) >= 0:
        restricting: nn.Module = _convolution(layer, restriction, None, coarse, coarse_groups)
    else:  # it reads less far than the fine filters
        cropped = coarse.resized(coarse.kernel, (0,) * len(coarse.kernel))
        inner = _convolution(layer, restriction, None, cropped, coarse_groups)
        restricting = nn.Sequential(_PADDINGS[layer.dims](_at_both_ends(coarse.padding[-layer.dims :])), inner)
    points = prolongation.view(*prolongation.shape, *(1,) * layer.dims)
    prolonging = _convolution(layer, points, None, _point(layer.dims))
    return SumOfLevels(_convolution(layer, weight, bias, fine, groups), restricting, prolonging)


@torch.no_grad()
def _balanced(layer: BalancedConvNd) -> nn.Module:
    """The function of a balanced layer as one convolution, or as three, whose restriction is the groups' mean."""
    n, m, groups = layer.in_channels, layer.out_channels, layer.groups
    window: Any = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)  # which may be padded by name
    bias = None if layer.bias is None else layer.bias.double()
    ones = [1] * layer.dims
    mean = torch.eye(n // groups, dtype=torch.float64).view(n // groups, n // groups, *ones).repeat(1, groups, *ones)
    weight, of_mean = layer.weight.double(), layer.mean_weight.double()
    if groups <= 2 or min(n, m) // groups * math.prod(layer.kernel_size) < NARROW:
        filters = composed(
            weight, of_mean.new_zeros(groups, *weight.shape[1:]), weight.new_zeros(m, groups), groups=groups
        )
        return _convolution(layer, filters + of_mean.repeat(1, groups, *ones) / groups, bias, window)
    restricting = _convolution(layer, mean / groups, None, _point(layer.dims))
    return SumOfLevels(
        _convolution(layer, weight, bias, window, groups), restricting, _convolution(layer, of_mean, None, window)
    )


def _point(dims: int) -> Window:
    """Where a 1x1 convolution reads."""
    return Window((1,) * dims, (1,) * dims, (0,) * dims, (1,) * dims)


def _at_both_ends(lengths: Sequence[int]) -> list[int]:
    """What torch's padding takes, to add ``lengths`` at both ends of the last dimensions."""
    return [each for length in reversed(lengths) for each in (length, length)]


def _around(fine: Window, coarse: Window) -> Window | None:
    """The least window that holds both; ``None`` where their taps lie between each other's."""
    if any((d0 - d) % 2 for d, d0 in zip(fine.kernel, coarse.kernel, strict=True)):
        return None
    own, given = (zip(each.kernel, each.padding, strict=True) for each in (fine, coarse))
    kernel, padding = zip(*map(max, own, given), strict=True)
    return fine.resized(kernel, padding)


def _grown(filters: Tensor, window: Window) -> Tensor:
    """``filters`` with zeros around them, up to the kernel of ``window``."""
    margins = [(d - d0) // 2 for d, d0 in zip(window.kernel, filters.shape[2:], strict=True)]
    return F.pad(filters, _at_both_ends(margins))


def _levels_are_faster(layer: TwoLevelConvNd, both: Window) -> bool:
    """Whether the two levels apart clearly beat one convolution over the window ``both``."""
    n, m, groups = layer.in_channels, layer.out_channels, layer.groups
    taps, coarse_taps = math.prod(layer.kernel_size), math.prod(layer.coarse_kernel_size)
    if min(n, m) // groups * taps < NARROW:
        return False
    apart = n * m * taps / groups * (1 + GROUP_WIDTH * groups / n)
    apart += (PASS_INPUT + layer.coarse_channels - 1) * n * coarse_taps
    return apart + m * (PASS_OUTPUT + layer.shared_maps) < n * m * math.prod(both.kernel)


def _convolution(
    layer: TwoLevelConvNd | BalancedConvNd, filters: Tensor, bias: Tensor | None, window: Any, groups: int = 1
) -> Convolution:
    """A convolution with these weights, in the type and memory format of the layer's. Filters and window may be those
    of images one row high, in the place of waveforms."""
    dims = layer.dims
    if filters.dim() > dims + 2:
        filters = filters.squeeze(2)
    channels = (filters.shape[1] * groups, filters.shape[0])
    kernel, stride, padding, dilation = (each if isinstance(each, str) else each[-dims:] for each in window)
    make: Callable[..., Convolution] = _CONVOLUTIONS[dims]
    convolution = make(
        *channels, kernel, stride, padding, dilation, groups=groups, bias=bias is not None, device="meta"
    )
    last = channels_last_of(layer.weight)
    is_last = layer.weight.is_contiguous(memory_format=last) and not layer.weight.is_contiguous()
    memory_format = last if is_last else torch.contiguous_format
    weights = filters.to(layer.weight.dtype).contiguous(memory_format=memory_format)
    convolution.weight = nn.Parameter(weights, requires_grad=False)
    if bias is not None:
        convolution.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=False)
    return convolution.eval()


class _Tracer(fx.Tracer):
    """Goes into no sum of levels, which is folded as a whole."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, SumOfLevels) or super().is_leaf_module(module, name)


def _fold_batch_norms(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Folds what can be; the names of what has been, and name -> reason of the rest."""
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    if not norms:
        return [], {}
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # the model's own code may raise anything
        reason = f"torch.fx makes no graph of the model: {told(error)}"
        return [], dict.fromkeys(norms, reason)
    calls = {node: model.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}
    counts = Counter(id(module) for module in calls.values())
    read = {id(model.get_submodule(str(n.target).rpartition(".")[0])) for n in graph.nodes if n.op == "get_attr"}
    before: dict[int, nn.Module] = {}
    for node, norm in calls.items():
        source = node.args[0] if node.args else None
        convolution = calls.get(source) if isinstance(source, fx.Node) and list(source.users) == [node] else None
        pair = (convolution, norm)
        if convolution is not None and all(counts[id(each)] == 1 and id(each) not in read for each in pair):
            before[id(norm)] = convolution
    done, left = [], {}
    for name, norm in norms.items():
        convolution = before.get(id(norm))
        if convolution is None or not _is_plain(convolution):
            left[name] = "it does not follow one convolution alone"
        elif type(norm) not in _NORMS or norm.running_mean is None or has_hooks(norm):
            left[name] = "it has hooks, code of its own or no running statistics"
        else:
            _fold_batch_norm(convolution, norm)
            become(norm, nn.Identity().eval())
            done.append(name)
    return done, left


_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _is_plain(module: nn.Module) -> bool:
    return type(module) in (*_CONVOLUTIONS.values(), SumOfLevels) and not has_hooks(module)


@torch.no_grad()
def _fold_batch_norm(convolution: nn.Module, norm: _BatchNorm) -> None:
    """norm(A x + b) = (factor A) x + factor (b - mean) + norm.bias, factor = norm.weight / sqrt(variance + eps)."""
    assert norm.running_mean is not None and norm.running_var is not None
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    summand = -norm.running_mean.double()
    first = convolution.fine if isinstance(convolution, SumOfLevels) else convolution
    assert isinstance(first, Convolution)
    if first.bias is not None:
        summand = summand + first.bias.double()
    summand = factor * summand
    if norm.bias is not None:
        summand = summand + norm.bias.double()
    first.bias = nn.Parameter(summand.to(first.weight.dtype), requires_grad=False)
    scaled = (first, convolution.prolongation) if isinstance(convolution, SumOfLevels) else (first,)
    for each in scaled:
        scaled_weight = each.weight.double() * factor.view(-1, *[1] * (each.weight.dim() - 1))
        each.weight = nn.Parameter(scaled_weight.to(each.weight.dtype), requires_grad=False)
