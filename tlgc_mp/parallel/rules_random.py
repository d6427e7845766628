"""Rules of random draws: every rank draws what one device draws of the whole tensor, and keeps its share.

So ranks that are seeded alike stay alike, and drop what one device drops. The order of a draw is that of memory: a
whole tensor is drawn in the strides that it has on one device. The draw takes the memory of the whole for a moment.
"""

from __future__ import annotations

import torch

from tlgc_mp.parallel.layout import take_share
from tlgc_mp.parallel.rules import _first, aten, operators, rule, wrap, written
from tlgc_mp.parallel.signatures import Args, Kwargs, Operator
from tlgc_mp.parallel.split_tensor import SplitTensor


def _blank(x: SplitTensor) -> torch.Tensor:
    """A plain tensor as the whole of ``x`` lies on one device, with nothing in it yet."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


@rule(
    *operators(
        "bernoulli_.float normal_ uniform_ exponential_ random_.default random_.from random_.to log_normal_ cauchy_ "
        "geometric_"
    )
)
def draw_in_place(func: Operator, args: Args, kwargs: Kwargs) -> object:
    """What stood in the tensor plays no part."""
    x = _first(args)
    if x is None:
        return NotImplemented
    x.share.copy_(take_share(func(_blank(x), *args[1:], **kwargs), x.cut, x.ranks))
    return written(x)


@rule(*operators("rand_like.default randn_like.default randint_like.default randint_like.low_dtype"))
def draw_like(func: Operator, args: Args, kwargs: Kwargs) -> object:
    x = _first(args)
    if x is None:
        return NotImplemented
    return wrap(take_share(func(_blank(x), *args[1:], **kwargs), x.cut, x.ranks).clone(), x.cut, x)


@rule(aten.native_dropout)
def native_dropout(func: Operator, args: Args, kwargs: Kwargs) -> object:
    x = _first(args)
    if x is None:
        return NotImplemented
    scaled, mask = func(_blank(x).fill_(1), *args[1:], **kwargs)
    share = take_share(scaled, x.cut, x.ranks) * x.share
    return wrap(share, x.cut, x), wrap(take_share(mask, x.cut, x.ranks).clone(), x.cut, x)
