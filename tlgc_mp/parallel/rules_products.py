"""Rules of matrix products and of attention, which is one for each head."""

from __future__ import annotations

from torch import Tensor

from tlgc_mp.parallel.layout import WHOLE, Layout, Ranks, scatter_sum
from tlgc_mp.parallel.rules import aten, operators, rule
from tlgc_mp.parallel.rules_layers import cut_dim, ranks_of
from tlgc_mp.parallel.signatures import Args, Kwargs, Operator
from tlgc_mp.parallel.split_tensor import SplitTensor, share_in


def _layout(tensor: object) -> Layout:
    return tensor.cut if type(tensor) is SplitTensor else WHOLE


def _plan(a: Tensor, b: Tensor, batched: int) -> tuple[Layout, Layout, Layout, bool] | None:
    """Layouts in which ``a`` @ ``b`` is computed and comes out, and whether a sum over the ranks is left to do.

    ``batched`` is 1 where a first dimension counts the products, 0 where there is one.
    """
    ranks = ranks_of(a, b)
    rows, inner, columns = batched, 1 + batched, 1 + batched
    if a.shape[:batched] != b.shape[:batched] or a.shape[inner] != b.shape[rows]:
        return None  # torch complains of the whole
    left, right = cut_dim(a), cut_dim(b)
    if batched and 0 in (left, right):
        layout = _layout(a) if left == 0 else _layout(b)
        return layout, layout, layout, False
    row_cut, column_cut = left == rows, right == columns
    if row_cut and column_cut:  # one of the two has to be whole: the smaller
        row_cut, column_cut = (False, True) if a.numel() <= b.numel() else (True, False)
    if row_cut:
        return _layout(a), WHOLE, _layout(a), False
    if column_cut:
        return WHOLE, _layout(b), _layout(b), False
    if left == inner or right == rows:
        # Both cut along what is summed, or one of them, of which the other is a share for nothing.
        layout = _layout(a) if left == inner else _layout(b)
        sent = 2 * a.shape[rows] * b.shape[columns]
        gathered = (a.shape[rows] * a.shape[inner] if left == inner else 0) + (
            b.shape[rows] * b.shape[columns] if right == rows else 0
        )
        if batched and sent > gathered:
            return None
        out = Layout(columns, None) if b.shape[columns] % ranks.size == 0 else WHOLE
        return Layout(inner, layout.segments), Layout(rows, layout.segments), out, True
    return None


def _product(func: Operator, a: Tensor, b: Tensor, batched: int) -> SplitTensor | None:
    found = _plan(a, b, batched)
    if found is None:
        return None
    left, right, out, partial = found
    ranks: Ranks = ranks_of(a, b)
    result = func(share_in(a, left, ranks), share_in(b, right, ranks))
    return SplitTensor(scatter_sum(result, out, ranks) if partial else result, out, ranks)


@rule(aten.mm.default)
def mm(func: Operator, args: Args, kwargs: Kwargs) -> object:
    result = _product(func, args[0], args[1], 0)
    return NotImplemented if result is None else result


@rule(aten.bmm.default)
def bmm(func: Operator, args: Args, kwargs: Kwargs) -> object:
    result = _product(func, args[0], args[1], 1)
    return NotImplemented if result is None else result


@rule(aten.addmm.default)
def addmm(func: Operator, args: Args, kwargs: Kwargs) -> object:
    bias, a, b = args
    if type(a) is not SplitTensor and type(b) is not SplitTensor:
        return NotImplemented
    fits = zip(reversed(bias.shape), (b.shape[1], a.shape[0]), strict=False)
    if bias.dim() > 2 or any(own not in (1, length) for own, length in fits):
        return NotImplemented
    found = _plan(a, b, 0)
    if found is None:
        return NotImplemented
    left, right, out, partial = found
    ranks = ranks_of(a, b)
    place = None if out.dim is None else out.dim - 2 + bias.dim()
    own = WHOLE if place is None or place < 0 or bias.shape[place] == 1 else Layout(place, out.segments)
    added = share_in(bias, own, ranks)
    shares = share_in(a, left, ranks), share_in(b, right, ranks)
    if not partial:
        return SplitTensor(func(added, *shares, **kwargs), out, ranks)
    total = scatter_sum(aten.mm(*shares), out, ranks) * kwargs.get("alpha", 1)
    return SplitTensor(total + added * kwargs.get("beta", 1), out, ranks)


_FLASH = "_scaled_dot_product_flash_attention_for_cpu"


@rule(*operators(f"{_FLASH}.default {_FLASH}_backward.default"))
def attention(func: Operator, args: Args, kwargs: Kwargs) -> object:
    """Heads, which are dimension 1, and images stand for themselves; no dropout, which would be drawn a share."""
    backward = func.overloadpacket is not aten._scaled_dot_product_flash_attention_for_cpu
    tensors = 6 if backward else 3  # grad, query, key, value, output, logsumexp; or query, key, value
    lead = next((t for t in args[:tensors] if type(t) is SplitTensor and t.cut.dim is not None), None)
    probability = args[6] if backward else (args[3] if len(args) > 3 else kwargs.get("dropout_p", 0.0))
    if lead is None or lead.cut.dim not in (0, 1) or probability:
        return NotImplemented
    if any(t.shape[lead.cut.dim] != lead.shape[lead.cut.dim] for t in args[:tensors]):
        return NotImplemented
    mask = kwargs.get("attn_mask")
    local = dict(kwargs)
    if mask is not None:
        place = lead.cut.dim - 4 + mask.dim()
        wide = place >= 0 and mask.shape[place] != 1
        local["attn_mask"] = share_in(mask, Layout(place, lead.cut.segments) if wide else WHOLE, lead.ranks)
    own = [share_in(t, lead.cut, lead.ranks) for t in args[:tensors]]
    out = func(*own, *args[tensors:], **local)
    return tuple(t if t is None else SplitTensor(t, lead.cut, lead.ranks) for t in out)
