"""Any torch CNN with its dense convolutions replaced. Knows nothing of ranks."""

from __future__ import annotations

import fnmatch
import inspect
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tlgc_mp.errors import UsageError, divisors, must_be, one_of
from tlgc_mp.models.factory import CONVOLUTION_LAYERS, convolution
from tlgc_mp.models.names import COARSE_INITS, COARSE_LEVEL, CoarseLevel, check_coarse_level
from tlgc_mp.models.wide_resnet import ConvFactory
from tlgc_mp.nn import FullyLearnableGroupConv2d, PermutedGroupConv2d
from tlgc_mp.nn.arguments import check_module
from tlgc_mp.nn.balanced import BalancedConvNd
from tlgc_mp.nn.from_dense import balanced_filters, group_filters, two_level_filters
from tlgc_mp.nn.two_level import TwoLevelConvNd
from tlgc_mp.nn.window import channels_last_of

Where = Callable[[str, nn.Module], bool] | str
"""Which convolutions: a function of a layer's name and the layer, or a pattern of names such as ``"layer4.*"``."""

INITS = {
    "random": tuple(conv for conv in CONVOLUTION_LAYERS if conv != "sc"),
    "from_dense": ("gc", "gc-2l", "bgc"),
}
"""Where new weights can come from -> the convolutions that can take them from there."""

Dense = nn.Conv1d | nn.Conv2d | nn.Conv3d

STEM = "the stem"
HEAD = "the head"
NOT_SELECTED = "not selected by where"


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert` did to a model; printed, it is a table.

    Attributes:
        conv: the convolution asked for.
        groups: N.
        replaced: name of each layer that was replaced -> its number of parameters before, and after.
        left: name of each convolution that was not -> why.
    """

    conv: str
    groups: int
    replaced: dict[str, tuple[int, int]]
    left: dict[str, str]

    def __str__(self) -> str:
        kind = f"{self.conv}, {self.groups} groups"
        rows = {name: f"{kind}: {old:,} -> {new:,} parameters" for name, (old, new) in self.replaced.items()}
        rows |= {name: f"left: {reason}" for name, reason in self.left.items()}
        width = max(map(len, rows))
        old, new = (sum(counts) for counts in zip(*self.replaced.values(), strict=True))
        total = f"{len(self.replaced)} replaced, {len(self.left)} left: {old:,} -> {new:,} parameters"
        return "\n".join([*(f"{name:{width}}  {text}" for name, text in rows.items()), total])


class _Found(NamedTuple):
    """A convolution of the model, and every name it has there."""

    layer: nn.Module
    names: list[str]


def convert(
    model: nn.Module,
    *,
    conv: str = "gc-2l",
    groups: int,
    where: Where | None = None,
    init: str = "random",
    coarse_kernel_size: int | None = None,
    coarse_init: str = COARSE_INITS[0],
    coarse_channels: int = 1,
    coarse_sum: bool = False,
) -> nn.Module:
    """Replaces the dense convolutions of ``model``, in place, by ``conv`` with ``groups`` groups.

    Replaced is every :class:`torch.nn.Conv1d`, :class:`torch.nn.Conv2d` and :class:`torch.nn.Conv3d` but the first,
    which is the stem. A layer keeps its stride, padding, dilation, bias, type, device, memory format, training mode and
    whether it is trained. These are left as they are, each with its reason in ``model.conversion``:

    - the stem, and the head: a 1x1 convolution with bias that comes last in a model without a linear layer;
    - layers that ``where`` does not select;
    - layers that have groups already, whose channels ``groups`` does not divide, or whose padding is not of zeros;
    - layers whose parameters another layer has too, or that carry hooks or a parametrization;
    - subclasses that do more than to make such a layer, and convolutions of other kinds; Conv1d and Conv3d for
      ``"flgc"``.

    To convert a part of a model, select it by ``where``: of a part passed alone, the first convolution would be
    taken for the stem.

    Args:
        model: any torch model, on any device. Parameters are new objects afterwards, so build the optimizer then.
        conv: ``"gc"``, ``"gc-2l"``, ``"gc-2l-proto"``, ``"shuffle"``, ``"flgc"`` or ``"bgc"``, as in
            :func:`~tlgc_mp.models.create_model`.
        groups: N.
        where: which layers may be replaced: a function of (name, layer), or a pattern of names as in a shell, such as
            ``"layer4.*"``. All where not given.
        init: ``"random"``: new weights, drawn from torch's random state as each layer draws its own.
            ``"from_dense"``: those that come closest to the dense weights, for ``"gc"`` (the diagonal blocks),
            ``"bgc"`` and ``"gc-2l"`` (:func:`~tlgc_mp.nn.from_dense.two_level_filters`); biases are kept.
        coarse_kernel_size, coarse_init: d0 and the initial weights of two-level convolutions, as
            :class:`tlgc_mp.nn.TwoLevelConv2d` takes them; for ``init="random"``.
        coarse_channels, coarse_sum: r and whether representatives are summed, as well. With ``init="from_dense"`` the
            error falls with r, to none.

    Returns:
        ``model``, whose attribute ``conversion`` is the :class:`Conversion`.

    Raises:
        UsageError: an argument that cannot work, or nothing that could be replaced; the model is then unchanged.
    """
    check_module("model", model)
    _check_arguments(conv, groups, where, init)
    coarse: CoarseLevel = {
        "coarse_kernel_size": coarse_kernel_size,
        "coarse_init": coarse_init,
        "coarse_channels": coarse_channels,
        "coarse_sum": coarse_sum,
    }
    check_coarse_level(conv, coarse)
    if init == "from_dense" and any(
        coarse[name] != COARSE_LEVEL[name] for name in ("coarse_kernel_size", "coarse_init")
    ):
        raise UsageError(
            "coarse_kernel_size and coarse_init must be left out with init='from_dense', which sets the coarse level "
            f"itself, got {coarse['coarse_kernel_size']} and {coarse['coarse_init']!r}; leave them out"
        )
    convolutions = _convolutions(model)
    makers = {dims: convolution(conv, groups, coarse, dims) for dims in CONVOLUTION_LAYERS[conv]}
    planned, left = _plan(model, convolutions, conv, groups, where, makers)
    if not planned:
        raise UsageError(_why_nothing(convolutions, left, groups, where))
    if init == "from_dense" and any(param.is_meta for found, _ in planned for param in found.layer.parameters()):
        raise UsageError(
            "init must be 'random' for a model on the meta device, which holds no weights, got 'from_dense'"
        )
    for found, new in planned:  # before any is put in its place: fitting fails where weights are not finite
        _fill(new, found.layer, init)
    replaced = {found.names[0]: (_count(found.layer), _count(new)) for found, new in planned}
    for found, new in planned:
        become(found.layer, new)
    model.conversion = Conversion(conv, groups, replaced, left)  # type: ignore[assignment]
    return model


def become(layer: nn.Module, new: nn.Module) -> None:
    """Makes ``layer`` what ``new`` is, in place: a list that holds it beside the model holds the new layer, too."""
    layer.__class__ = type(new)
    vars(layer).clear()
    vars(layer).update(vars(new))


def has_hooks(layer: nn.Module) -> bool:
    """Whether something else is to run when ``layer`` does."""
    return any((layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks))


def _check_arguments(conv: str, groups: int, where: Where | None, init: str) -> None:
    if conv not in INITS["random"]:
        raise must_be("conv", one_of(INITS["random"]), conv)
    if not isinstance(init, str) or init not in INITS:
        raise must_be("init", one_of(INITS), init)
    if conv not in INITS[init]:
        raise UsageError(f"conv must be {one_of(INITS[init])} with init={init!r}, got {conv!r}; use init='random'")
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1:
        raise must_be("groups", "1 or more", groups)
    if where is not None and not isinstance(where, str) and not callable(where):
        raise must_be("where", "a function of (name, layer), or a pattern", where, "use e.g. 'layer4.*'")
    if callable(where) and not _takes_two(where):
        raise must_be("where", "a function of (name, layer)", where)


def _takes_two(function: Callable[..., object]) -> bool:
    try:
        inspect.signature(function).bind("", None)
    except TypeError:
        return False
    except ValueError:  # some that are built in do not say
        return True
    return True


def _convolutions(model: nn.Module) -> list[_Found]:
    """Every convolution of ``model``, in the order of its modules; one that has several names stands once."""
    kinds = (_ConvNd, TwoLevelConvNd, FullyLearnableGroupConv2d, PermutedGroupConv2d)
    found: dict[int, _Found] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, kinds):
            found.setdefault(id(module), _Found(module, [])).names.append(name)
    return list(found.values())


def _plan(
    model: nn.Module,
    convolutions: list[_Found],
    conv: str,
    groups: int,
    where: Where | None,
    makers: dict[int, ConvFactory],
) -> tuple[list[tuple[_Found, nn.Module]], dict[str, str]]:
    """The convolutions to replace, each with its replacement on the meta device; and name -> reason of the others."""
    owners = Counter(id(param) for module in model.modules() for param in module._parameters.values())
    head = _head(model, convolutions)
    planned: list[tuple[_Found, nn.Module]] = []
    left: dict[str, str] = {}
    for index, found in enumerate(convolutions):
        if index == 0:
            reason: str | None = STEM
        elif found.layer is head:
            reason = HEAD
        elif not _selected(where, found):
            reason = NOT_SELECTED
        else:
            reason = _obstacle(found.layer, groups, owners)
        if reason is None:
            try:
                planned.append((found, _on_meta(found.layer, conv, makers)))
            except UsageError as error:
                reason = f"no such {conv} layer: {str(error).partition(';')[0]}"
        if reason is not None:
            left[found.names[0]] = reason
    return planned, left


def _head(model: nn.Module, convolutions: list[_Found]) -> nn.Module | None:
    if not convolutions or any(isinstance(module, nn.Linear) for module in model.modules()):
        return None
    last = convolutions[-1].layer
    is_head = isinstance(last, Dense) and _is_plain(last) and max(last.kernel_size) == 1 and last.bias is not None
    return last if is_head else None


def _selected(where: Where | None, found: _Found) -> bool:
    """A layer with several names is selected by any of them."""
    if where is None:
        return True
    if isinstance(where, str):
        return any(fnmatch.fnmatchcase(name, where) for name in found.names)
    return any(where(name, found.layer) for name in found.names)


def _obstacle(layer: nn.Module, groups: int, owners: Counter[int]) -> str | None:
    """Why ``layer`` cannot be replaced, as ``kind: detail``; ``None`` where it can."""
    if not isinstance(layer, Dense) or not _is_plain(layer):
        return f"not a plain Conv1d, Conv2d or Conv3d: {type(layer).__name__}"
    if layer.groups > 1:
        return f"grouped already: groups={layer.groups}"
    if layer.padding_mode != "zeros":
        return f"padding is not of zeros: padding_mode={layer.padding_mode!r}"
    if has_hooks(layer) or set(layer._parameters) != {"weight", "bias"} or layer._buffers or layer._modules:
        return "hooks or a parametrization would be lost"
    shared = [key for key, param in layer._parameters.items() if param is not None and owners[id(param)] > 1]
    if shared:
        return f"tied to another layer: {' and '.join(shared)}"
    if layer.in_channels % groups or layer.out_channels % groups:
        return f"groups={groups} does not divide its channels: {layer.in_channels} to {layer.out_channels}"
    return None


_OF_EVERY_CLASS = frozenset((*vars(type("_", (), {})), "__init__", "__annotations__", "__firstlineno__"))


def _is_plain(layer: nn.Module) -> bool:
    """Whether ``layer`` is torch's, or of a subclass that says how one is made and no more, as of torchvision's
    networks for videos."""
    for cls in type(layer).__mro__:
        if cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
            return True
        own = {name for name, value in vars(cls).items() if not isinstance(value, staticmethod)}
        if not own <= _OF_EVERY_CLASS:
            return False
    return False


def _on_meta(layer: nn.Module, conv: str, makers: dict[int, ConvFactory]) -> nn.Module:
    assert isinstance(layer, Dense)
    dims = len(layer.kernel_size)
    if dims not in makers:
        raise must_be("convolution", f"of {one_of(makers)} dimensions", dims)
    return makers[dims](
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        bias=layer.bias is not None,
        device="meta",
        dtype=layer.weight.dtype,
    )


@torch.no_grad()
def _fill(new: nn.Module, old: nn.Module, init: str) -> None:
    """Gives ``new``, which is on the meta device, its weights; where and as ``old`` has its own."""
    assert isinstance(old, Dense)
    last = channels_last_of(old.weight)
    if not old.weight.is_contiguous() and old.weight.is_contiguous(memory_format=last):
        new.to(memory_format=last)
    new.to_empty(device=old.weight.device)
    if init == "random":
        new.reset_parameters()  # type: ignore[operator]
    else:
        _fit(new, old)
    for key, param in new.named_parameters():
        like = old.bias if key == "bias" and old.bias is not None else old.weight
        param.requires_grad_(like.requires_grad)
    new.train(old.training)


def _fit(new: nn.Module, dense: Dense) -> None:
    """Gives ``new`` the weights that come closest to those of ``dense``."""
    assert isinstance(new, TwoLevelConvNd | Dense)
    weight, groups = dense.weight, new.groups
    fitted: dict[str, Tensor]
    if isinstance(new, TwoLevelConvNd):
        values = two_level_filters(weight, groups, new.coarse_channels, new.coarse_sum)
        fitted = dict(zip(("weight", "restriction", "prolongation"), values, strict=True))
    elif isinstance(new, BalancedConvNd):
        fitted = dict(zip(("weight", "mean_weight"), balanced_filters(weight, groups), strict=True))
    else:
        fitted = {"weight": group_filters(weight, groups)}
    for name, value in fitted.items():
        new.get_parameter(name).copy_(value)
    if dense.bias is not None and new.bias is not None:
        new.bias.copy_(dense.bias)


def _count(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


def _why_nothing(convolutions: list[_Found], left: dict[str, str], groups: int, where: Where | None) -> str:
    """The message where no convolution can be replaced: the commonest reason, and what would work."""
    if not convolutions:
        return "model must have convolutions to replace, got none; give one with torch.nn.Conv2d layers"
    candidates = {name: reason for name, reason in left.items() if reason != STEM} or left
    (kind, count), *_ = Counter(reason.partition(":")[0] for reason in candidates.values()).most_common()
    text = f"none of its {len(left)} convolutions can be replaced: {kind} ({count} of them)"
    if kind == NOT_SELECTED:
        return f"where must select layers, got {where!r}: {text}; select names such as {next(iter(candidates))!r}"
    if kind.startswith("groups="):
        layers = [found.layer for found in convolutions if left[found.names[0]].startswith(kind)]
        counts = [count for layer in layers for count in (layer.in_channels, layer.out_channels)]
        common = divisors(math.gcd(*counts))  # type: ignore[arg-type]
        return f"groups must be {one_of(common)}, got {groups}: {text}"
    return f"model must have dense convolutions after the first, got others: {text}"
