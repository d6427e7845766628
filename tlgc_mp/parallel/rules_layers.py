"""Rules of normalizations, pooling and resampling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tlgc_mp.nn.window import memory_format_of
from tlgc_mp.parallel import collectives
from tlgc_mp.parallel.layout import WHOLE, Layout, Ranks, contiguous_geometry, gather_shares, take_share
from tlgc_mp.parallel.rules import aten, operators, pointwise, pointwise_in_place, rule, wrap, wrap_all
from tlgc_mp.parallel.signatures import Args, Kwargs, Operator
from tlgc_mp.parallel.split_tensor import SplitTensor, share_in

CHANNELS = Layout(1, None)


def cut_dim(tensor: object) -> int | None:
    """The dimension along which ``tensor`` is cut."""
    return tensor.cut.dim if type(tensor) is SplitTensor else None


def ranks_of(*tensors: object) -> Ranks:
    return next(t.ranks for t in tensors if type(t) is SplitTensor)


def optional(tensor: Tensor | None, layout: Layout, ranks: Ranks) -> Tensor | None:
    return None if tensor is None else share_in(tensor, layout, ranks)


# Normalizations.


def vectors(tensors: list[Tensor | None], layout: Layout, ranks: Ranks) -> list[Tensor | None]:
    """Tensors of one value a channel, as shares in ``layout``; those that lie otherwise are gathered together."""
    others = [
        t for t in tensors if type(t) is SplitTensor and t.cut.dim is not None and t.cut != layout and t.dim() == 1
    ]
    found: dict[int, Tensor] = {}
    if len(others) > 1 and all(t.cut == others[0].cut and t.dtype == others[0].dtype for t in others):
        together = SplitTensor(torch.stack([t.share for t in others]), Layout(1, others[0].cut.segments), ranks)
        rows = share_in(together, WHOLE if layout.dim is None else Layout(1, layout.segments), ranks)
        for tensor, data in zip(others, rows, strict=True):
            found[id(tensor)] = data
    return [
        t if t is None else found[id(t)] if id(t) in found else share_in(t, layout, ranks).contiguous() for t in tensors
    ]


def _update(statistics: list[Tensor | None], new: list[Tensor | None], layout: Layout, ranks: Ranks) -> None:
    """Writes running statistics back where they were computed in another layout than they are kept in."""
    moved = [
        (old, value)
        for old, value in zip(statistics, new, strict=True)
        if old is not None and value is not None and not (type(old) is SplitTensor and old.cut == layout)
    ]
    if not moved or (layout.dim is None and all(type(old) is not SplitTensor for old, _ in moved)):
        return
    together = SplitTensor(torch.stack([value for _, value in moved]), Layout(1, layout.segments), ranks)
    data = gather_shares(together) if layout.dim is not None else together.share
    for (old, _), value in zip(moved, data, strict=True):
        if type(old) is SplitTensor:
            old.share.copy_(take_share(value, old.cut, ranks))
            if old.family is not None:
                old.family.written()
        else:
            old.copy_(value)


@rule(
    *operators(
        "native_batch_norm.default cudnn_batch_norm.default miopen_batch_norm.default _batch_norm_with_update.default "
        "_native_batch_norm_legit.default _native_batch_norm_legit.no_stats _batch_norm_no_update.default"
    )
)
def batch_norm(func: Operator, args: Args, kwargs: Kwargs) -> object:
    """(x, weight, bias, [running_mean, running_var,] ...) -> (y, mean, inverse deviation, ...)."""
    x = args[0]
    ranks = next(t.ranks for t in args if type(t) is SplitTensor)
    if cut_dim(x) not in (None, 1):
        return NotImplemented
    kept = 3 if func is aten._native_batch_norm_legit.no_stats else 5
    layout = Layout(0, x.cut.segments) if cut_dim(x) == 1 else WHOLE
    own = vectors(list(args[1:kept]), layout, ranks)
    out = func(share_in(x, x.cut if cut_dim(x) == 1 else WHOLE, ranks), *own, *args[kept:], **kwargs)
    if kept == 5 and func is not getattr(aten._batch_norm_no_update, "default", None):
        _update(list(args[3:5]), own[2:4], layout, ranks)
    y = _in_batch_norms_format(out[0], x) if cut_dim(x) == 1 else SplitTensor(out[0], WHOLE, ranks)
    return (y, *(_statistic(t, layout, ranks) for t in out[1:]))


def _in_batch_norms_format(share: Tensor, x: SplitTensor) -> SplitTensor:
    """A result in the format that the kernels give it: contiguous, unless ``x`` is channels_last."""
    if share.shape[1] > 1 or not share.is_contiguous():
        return wrap(share, x.cut, x)
    if memory_format_of(x) != torch.contiguous_format and not x.is_contiguous():
        return wrap(share, x.cut, x)
    return SplitTensor(share, x.cut, x.ranks, contiguous_geometry(share, x.cut, x.ranks))


def _statistic(tensor: Tensor, layout: Layout, ranks: Ranks) -> SplitTensor:
    """A statistic a channel; some kernels return none, as an empty tensor, or bytes of their own."""
    per_channel = tensor.numel() > 0 and tensor.dim() == 1 and tensor.dtype != torch.uint8
    return SplitTensor(tensor, layout if per_channel else WHOLE, ranks)


@rule(*operators("native_batch_norm_backward.default batch_norm_backward.default"))
def batch_norm_backward(func: Operator, args: Args, kwargs: Kwargs) -> object:
    """(grad, x, weight, running_mean, running_var, mean, inverse deviation, training, eps, mask, ...)"""
    return _batch_norm_backward(func, args, kwargs, x=args[1], full=(0, 1), channel=range(2, 7))


@rule(*operators("cudnn_batch_norm_backward.default miopen_batch_norm_backward.default"))
def cudnn_batch_norm_backward(func: Operator, args: Args, kwargs: Kwargs) -> object:
    """(x, grad, weight, running_mean, running_var, mean, inverse deviation, eps, ...)"""
    return _batch_norm_backward(func, args, kwargs, x=args[0], full=(0, 1), channel=range(2, 7))


def _batch_norm_backward(
    func: Operator, args: Args, kwargs: Kwargs, x: Tensor, full: Sequence[int], channel: Sequence[int]
) -> object:
    ranks = next(t.ranks for t in args if type(t) is SplitTensor)
    lead = x if type(x) is SplitTensor and cut_dim(x) is not None else None
    if cut_dim(x) not in (None, 1):
        return NotImplemented
    shape = lead.cut if lead is not None else WHOLE
    layout = Layout(0, shape.segments) if lead is not None else WHOLE
    own = list(args)
    for index in full:
        own[index] = _one_batch(share_in(args[index], shape, ranks))
    empty = [i for i in channel if isinstance(args[i], Tensor) and args[i].numel() == 0]
    for index, value in (
        zip(channel, vectors([args[i] for i in channel], layout, ranks), strict=True) if not empty else ()
    ):
        own[index] = value
    if empty:
        for index in channel:
            own[index] = optional(args[index], WHOLE if index in empty else layout, ranks)
    own = [share_in(t, WHOLE, ranks) if type(t) is SplitTensor else t for t in own]
    to_input, *to_vectors = func(*own, **kwargs)
    result = None
    if to_input is not None:
        result = _in_batch_norms_format(to_input, lead) if lead is not None else SplitTensor(to_input, WHOLE, ranks)
    return (result, *(None if t is None else SplitTensor(t, layout, ranks) for t in to_vectors))


def _one_batch(share: Tensor) -> Tensor:
    """``share``, where it is of one image, with the stride of a batch. With another, as the tokens of attention pass
    back through an instance norm, torch's backward takes a gradient in the order of channels_last for a contiguous one:
    wrong on one device, and right here."""
    if share.shape[0] != 1 or share.stride(0) == share.numel() or not share.numel():
        return share
    return share.as_strided(share.shape, (share.numel(), *share.stride()[1:]))


def _sum_over_ranks(values: list[Tensor], ranks: Ranks) -> list[Tensor]:
    return list(collectives.all_reduce(torch.stack(values), ranks))


def _moments(share: Tensor, dims: list[int], count: int, eps: float, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Mean and inverse deviation over dimensions of which one is cut: two sums a position."""
    data = share.float() if share.dtype in (torch.float16, torch.bfloat16) else share
    mean = collectives.all_reduce(data.sum(dims, keepdim=True), ranks) / count
    variance = collectives.all_reduce((data - mean).square().sum(dims, keepdim=True), ranks) / count
    return mean, (variance + eps).rsqrt()


def _normalized_backward(
    grad: Tensor,
    share: Tensor,
    mean: Tensor,
    inverse: Tensor,
    scale: Tensor | None,
    dims: list[int],
    count: int,
    ranks: Ranks,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the input of a normalization over dimensions of which one is cut; with the normalized input."""
    normal = (share - mean) * inverse
    scaled = grad if scale is None else grad * scale
    total, along = _sum_over_ranks([scaled.sum(dims, keepdim=True), (scaled * normal).sum(dims, keepdim=True)], ranks)
    return inverse * (scaled - total / count - normal * (along / count)), normal, scaled


@rule(aten.native_layer_norm.default)
def layer_norm(func: Operator, args: Args, kwargs: Kwargs) -> object:
    x, shape, weight, bias, eps = args
    if type(x) is not SplitTensor or cut_dim(x) is None:
        return NotImplemented
    dim, ranks, first = cut_dim(x), x.ranks, x.dim() - len(shape)
    assert dim is not None
    if any(
        tuple(own) != tuple(shape) for own in (x.shape[first:], *[t.shape for t in (weight, bias) if t is not None])
    ):
        return NotImplemented  # torch complains of the whole
    if dim < first:
        affine = [optional(t, WHOLE, ranks) for t in (weight, bias)]
        y, mean, inverse = func(x.share, shape, *affine, eps)
        made = SplitTensor(y, x.cut, ranks, contiguous_geometry(y, x.cut, ranks))
        return made, *(SplitTensor(t, x.cut, ranks) for t in (mean, inverse))
    dims = list(range(first, x.dim()))
    mean, inverse = _moments(x.share, dims, x.shape[first:].numel(), eps, ranks)
    own = Layout(dim - first, x.cut.segments)
    y = (x.share - mean) * inverse
    if weight is not None:
        y = y * share_in(weight, own, ranks)
    if bias is not None:
        y = y + share_in(bias, own, ranks)
    y = y.to(x.dtype).contiguous()  # as that of one device is, however x lies in memory
    made = SplitTensor(y, x.cut, ranks, contiguous_geometry(y, x.cut, ranks))
    return made, *(SplitTensor(t, WHOLE, ranks) for t in (mean, inverse))


@rule(aten.native_layer_norm_backward.default)
def layer_norm_backward(func: Operator, args: Args, kwargs: Kwargs) -> object:
    grad, x, shape, mean, inverse, weight, bias, mask = args
    if type(x) is not SplitTensor or cut_dim(x) is None:
        return NotImplemented
    dim, ranks, first = cut_dim(x), x.ranks, x.dim() - len(shape)
    assert dim is not None
    incoming = share_in(grad, x.cut, ranks)
    if dim < first:
        stats = [share_in(t, x.cut, ranks) for t in (mean, inverse)]
        affine = [optional(t, WHOLE, ranks) for t in (weight, bias)]
        to_input, *sums = func(incoming, x.share, shape, *stats, *affine, mask)
        totals = [None if t is None else SplitTensor(collectives.all_reduce(t, ranks), WHOLE, ranks) for t in sums]
        return (None if to_input is None else wrap(to_input, x.cut, x)), *totals
    dims = list(range(first, x.dim()))
    own = Layout(dim - first, x.cut.segments)
    stats = [share_in(t, WHOLE, ranks) for t in (mean, inverse)]
    scale = optional(weight, own, ranks)
    count = x.shape[first:].numel()
    to_input, normal, _ = _normalized_backward(incoming, x.share, stats[0], stats[1], scale, dims, count, ranks)
    batch = list(range(first))
    to_weight = to_bias = None
    if mask[1]:
        product = incoming * normal
        to_weight = SplitTensor((product.sum(batch) if batch else product).to(weight.dtype), own, ranks)
    if mask[2]:
        to_bias = SplitTensor((incoming.sum(batch) if batch else incoming.clone()).to(bias.dtype), own, ranks)
    return (wrap(to_input.to(x.dtype), x.cut, x) if mask[0] else None), to_weight, to_bias


def _per_channel(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(1, -1, *[1] * (like.dim() - 2))


def _dense(share: Tensor) -> Tensor:
    """``share`` in one of the memory formats that kernels know: its own where that is one of them."""
    return share.contiguous(memory_format=memory_format_of(share))


def _in_group_norms_format(y: Tensor) -> Tensor:
    """``y``, which lies as the input of a group normalization does, in the format of its output."""
    return _dense(y) if y.device.type == "cpu" else y.contiguous()


@rule(aten.native_group_norm.default)
def group_norm(func: Operator, args: Args, kwargs: Kwargs) -> object:
    x, weight, bias, batch, channels, positions, groups, eps = args
    if type(x) is not SplitTensor or cut_dim(x) != 1:
        return NotImplemented
    ranks = x.ranks
    own = Layout(0, x.cut.segments)
    if groups % ranks.size == 0 and x.cut.segments is None:
        affine = [optional(t, own, ranks) for t in (weight, bias)]
        local = (batch, channels // ranks.size, positions, groups // ranks.size, eps)
        y, mean, inverse = func(_dense(x.share), *affine, *local)
        return wrap(y, x.cut, x), *(SplitTensor(t, CHANNELS, ranks) for t in (mean, inverse))
    if groups != 1:
        return NotImplemented
    dims = list(range(1, x.dim()))
    mean, inverse = _moments(x.share, dims, channels * positions, eps, ranks)
    y = (x.share - mean) * inverse
    if weight is not None:
        y = y * _per_channel(share_in(weight, own, ranks), x)
    if bias is not None:
        y = y + _per_channel(share_in(bias, own, ranks), x)
    return wrap(_in_group_norms_format(y.to(x.dtype)), x.cut, x), *(
        SplitTensor(t.view(batch, 1), WHOLE, ranks) for t in (mean, inverse)
    )


@rule(aten.native_group_norm_backward.default)
def group_norm_backward(func: Operator, args: Args, kwargs: Kwargs) -> object:
    grad, x, mean, inverse, weight, batch, channels, positions, groups, mask = args
    if type(x) is not SplitTensor or cut_dim(x) != 1:
        return NotImplemented
    ranks = x.ranks
    own = Layout(0, x.cut.segments)
    incoming = share_in(grad, x.cut, ranks)
    if groups % ranks.size == 0 and x.cut.segments is None:
        stats = [share_in(t, CHANNELS, ranks).contiguous() for t in (mean, inverse)]
        local = (batch, channels // ranks.size, positions, groups // ranks.size, mask)
        scale = optional(weight, own, ranks)
        share = _dense(x.share)
        if incoming.stride() != share.stride():
            incoming = torch.empty_like(share).copy_(incoming)
        to_input, *sums = func(incoming, share, *stats, scale, *local)
        return (None if to_input is None else wrap(to_input, x.cut, x)), *(
            None if t is None else SplitTensor(t, own, ranks) for t in sums
        )
    if groups != 1:
        return NotImplemented
    dims = list(range(1, x.dim()))
    wide = [share_in(t, WHOLE, ranks).view(batch, *[1] * (x.dim() - 1)) for t in (mean, inverse)]
    scale = None if weight is None else _per_channel(share_in(weight, own, ranks), x)
    count = channels * positions
    to_input, normal, _ = _normalized_backward(incoming, x.share, wide[0], wide[1], scale, dims, count, ranks)
    others = [0, *range(2, x.dim())]
    return (
        wrap(_in_group_norms_format(to_input.to(x.dtype)), x.cut, x) if mask[0] else None,
        SplitTensor((incoming * normal).sum(others).to(x.dtype), own, ranks) if mask[1] else None,
        SplitTensor(incoming.sum(others), own, ranks) if mask[2] else None,
    )


# Pointwise, though torch does not mark them so.
rule(
    *operators(
        "_prelu_kernel _prelu_kernel_backward native_dropout_backward hardswish hardswish_backward "
        "hardsigmoid_backward hardtanh_backward leaky_relu_backward elu_backward softplus_backward mish_backward "
        "hardshrink_backward softshrink_backward"
    )
)(pointwise)
rule(*operators("hardswish_ mish_ threshold_ gelu_"))(pointwise_in_place)


# Pooling, resampling and padding: channels and images stand for themselves, positions do not.


def _positions(names: str, count: int) -> None:
    def spatial(func: Operator, args: Args, kwargs: Kwargs) -> object:
        lead = next((t for t in args if type(t) is SplitTensor and t.cut.dim is not None), None)
        if lead is None:
            return NotImplemented
        dim = lead.cut.dim
        if dim is None or dim >= lead.dim() - count:
            return NotImplemented
        own: list[object] = []
        for value in args:
            if isinstance(value, Tensor):
                if value.dim() != lead.dim() or value.shape[dim] != lead.shape[dim]:
                    return NotImplemented
                value = share_in(value, lead.cut, lead.ranks)
            own.append(value)
        if func in _SIZED:
            index = _SIZED[func]
            own[index] = [n // lead.ranks.size if i == dim else n for i, n in enumerate(args[index])]
        out = func(*own, **kwargs)
        return wrap_all(out, lead.cut, lead)

    for operator in operators(names):
        rule(operator)(spatial)
        for index, described in enumerate(operator._schema.arguments):
            if described.name == "input_size":
                _SIZED[operator] = index


_SIZED: dict[object, int] = {}
"""Operators that are told the size of the whole input -> which argument tells it."""


_positions(
    "max_pool1d_with_indices.default avg_pool1d.default adaptive_avg_pool1d.default adaptive_max_pool1d.default "
    "upsample_nearest1d.default upsample_nearest1d_backward.default upsample_linear1d.default "
    "upsample_linear1d_backward.default _upsample_nearest_exact1d.default _upsample_nearest_exact1d_backward.default "
    "reflection_pad1d.default reflection_pad1d_backward.default replication_pad1d.default "
    "replication_pad1d_backward.default",
    1,
)
_positions(
    "max_pool2d_with_indices.default max_pool2d_with_indices_backward.default avg_pool2d.default "
    "avg_pool2d_backward.default _adaptive_avg_pool2d.default _adaptive_avg_pool2d_backward.default "
    "adaptive_max_pool2d.default adaptive_max_pool2d_backward.default upsample_nearest2d.default "
    "upsample_nearest2d_backward.default upsample_bilinear2d.default upsample_bilinear2d_backward.default "
    "upsample_bicubic2d.default upsample_bicubic2d_backward.default _upsample_nearest_exact2d.default "
    "_upsample_nearest_exact2d_backward.default _upsample_bilinear2d_aa.default "
    "_upsample_bilinear2d_aa_backward.default _upsample_bicubic2d_aa.default _upsample_bicubic2d_aa_backward.default "
    "reflection_pad2d.default reflection_pad2d_backward.default replication_pad2d.default "
    "replication_pad2d_backward.default max_unpool2d.default",
    2,
)
_positions(
    "max_pool3d_with_indices.default max_pool3d_with_indices_backward.default avg_pool3d.default "
    "avg_pool3d_backward.default _adaptive_avg_pool3d.default _adaptive_avg_pool3d_backward.default "
    "adaptive_max_pool3d.default adaptive_max_pool3d_backward.default upsample_nearest3d.default "
    "upsample_nearest3d_backward.default upsample_trilinear3d.default upsample_trilinear3d_backward.default "
    "_upsample_nearest_exact3d.default _upsample_nearest_exact3d_backward.default reflection_pad3d.default "
    "reflection_pad3d_backward.default replication_pad3d.default replication_pad3d_backward.default "
    "max_unpool3d.default",
    3,
)
