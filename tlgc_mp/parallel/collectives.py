"""Every collective of a forward or backward pass, each beside its conjugate.

    forward                         backward
    coarse_gather: all-gather       coarse_reduce_scatter: reduce-scatter
    sum_partials: all-reduce        identity; of a sum that each rank takes on by itself, sum_partials
    identity                        copy_to_ranks: all-reduce
    exchange_channels: all-to-all   itself, with what is sent and received swapped

All are ``torch.library`` operators in the namespace ``tlgc_mp`` with a fake (shape-only) form, so that torch.compile,
FakeTensor and profilers see them by name. A process group is passed by its name, as torch's own functional
collectives do. Where DeepSpeed's communication layer is up, they go through it and appear in its communication log.

Below autograd, :func:`all_gather`, :func:`all_reduce` and :func:`reduce_scatter` do the same for code that has rules of
its own for gradients.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group

from tlgc_mp.parallel.waiting import Call, begin, complete

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import GroupName


recorders: list[Callable[[str, int], None]] = []
"""Called with the name of each collective that is started and the bytes that this rank gives to it. Empty but for
reports and tests."""

_REDUCED_AS = {torch.bool: torch.uint8, torch.int16: torch.int32}
"""Types that Gloo does not reduce, and what they are reduced as."""
_SWAPS = ("coarse_gather", "coarse_reduce_scatter", "all_gather", "reduce_scatter")
_TAGS = {name: tag for tag, name in enumerate(_SWAPS)}
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_GATHERED = {*_FLOATS, torch.int64, torch.int32, torch.int8, torch.uint8}
"""Types that every backend gathers; others are gathered as bytes."""


class TensorParallelRanks(Protocol):
    """The ranks that hold one replica, as the collectives here need to know them."""

    size: int
    rank: int
    group_name: str

    @property
    def group(self) -> dist.ProcessGroup: ...


def resolve_group(name: str) -> dist.ProcessGroup:
    """The process group of that name."""
    return _resolve_process_group(cast("GroupName", name))


def _comm(name: str, torch_name: str) -> Callable[..., Any]:
    """The collective ``name`` of DeepSpeed's communication layer where that is up, else torch's ``torch_name``."""
    deepspeed_comm = sys.modules.get("deepspeed.comm.comm")
    if deepspeed_comm is not None and deepspeed_comm.cdb is not None and deepspeed_comm.cdb.is_initialized():
        return getattr(deepspeed_comm, name)  # type: ignore[no-any-return]
    return getattr(dist, torch_name, None) or getattr(dist, name)  # type: ignore[no-any-return]


def _begin(name: str, sent: Tensor, group: dist.ProcessGroup) -> Call:
    """Notes that this rank begins a collective; every wait for it then goes through :func:`complete`."""
    _note(name, sent)
    return begin(name, group)


def _note(name: str, sent: Tensor) -> None:
    for record in recorders:
        record(name, sent.numel() * sent.element_size())


@torch.library.custom_op("tlgc_mp::coarse_gather", mutates_args=())
def coarse_gather(share: Tensor, ranks: int, group_name: str) -> Tensor:
    """All-gather along the first dimension: (G, ...) on each of P ranks -> (P G, ...) on all, in rank order."""
    return start_coarse_gather(share, ranks, group_name)()


def start_coarse_gather(share: Tensor, ranks: int, group_name: str, by_sends: bool = True) -> Callable[[], Tensor]:
    """Starts :func:`coarse_gather`; the function returned waits for its result."""
    share = _in_memory(share)
    full = share.new_empty(ranks * share.shape[0], *share.shape[1:])
    if share.is_meta or not share.numel():
        _note("coarse_gather", share)
        return lambda: full
    stacked = full.view(ranks, *share.shape)
    arrived = _gather("coarse_gather", share, stacked, resolve_group(group_name), by_sends=by_sends)
    return lambda: arrived().view(full.shape)


def _gather(
    name: str, share: Tensor, stacked: Tensor, group: dist.ProcessGroup, *, of_pass: bool = True, by_sends: bool = True
) -> Callable[[], Tensor]:
    """Starts gathering ``share`` of each rank in ``stacked``, P of them; the function returned waits for it."""
    call = _begin(name, share, group)
    if by_sends and is_gloo(group):
        share = share.detach()
        stacked[dist.get_rank(group)] = share
        return _start_swap(call, share.expand_as(stacked), stacked, group)
    names = ("all_gather_into_tensor", "all_gather_single")
    start = _comm(*names) if of_pass else getattr(dist, names[1], None) or getattr(dist, names[0])
    work = complete(call, start, stacked.view(-1), share.view(-1), group=group, async_op=True)
    return _arrival(call, work, stacked, share)


def _scatter_sum(
    name: str, stacked: Tensor, row: Tensor, group: dist.ProcessGroup, *, by_sends: bool = True
) -> Callable[[], Tensor]:
    """Starts summing ``stacked``, one part for each of P ranks, into ``row``; the function returned waits for it."""
    call = _begin(name, stacked, group)
    if by_sends and is_gloo(group):
        stacked, received = stacked.detach(), torch.empty_like(stacked)
        received[dist.get_rank(group)] = stacked[dist.get_rank(group)]
        arrived = _start_swap(call, stacked, received, group)
        return lambda: torch.sum(arrived(), 0, dtype=row.dtype, out=row)
    start = _comm("reduce_scatter_tensor", "reduce_scatter_single")
    work = complete(call, start, row.view(-1), stacked.view(-1), group=group, async_op=True)
    return _arrival(call, work, row, stacked)


def _in_memory(tensor: Tensor) -> Tensor:
    """``tensor`` as contiguous numbers, also where it is but known to be zeros, conjugated or negated."""
    if tensor._is_zerotensor():  # the gradient of torch.sgn, say
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor.resolve_conj().resolve_neg().contiguous()


def is_gloo(group: dist.ProcessGroup) -> bool:
    return bool(group.name() == "gloo")


def _start_swap(call: Call, sent: Tensor, received: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Starts giving ``sent[r]`` to every other rank r of a Gloo group and taking ``received[r]`` from it; the function
    returned waits and gives ``received``.

    Gloo's own reduce-scatter is an all-reduce, which sends twice the bytes. In its other collectives the word that a
    rank is ready to receive may queue behind what it sends, and the two directions of a slow link then take turns.
    Sends take time of the thread that starts them, which Gloo's collectives leave to a thread of Gloo's.
    """
    ranks, own = dist.get_process_group_ranks(group), dist.get_rank(group)
    others = [(own + distance) % len(ranks) for distance in range(1, len(ranks))]
    receive, send = _comm("irecv", "irecv"), _comm("isend", "isend")
    tag = _TAGS[call[0]] + len(_TAGS) * (call[2] % 2**28)  # no other collective reads it
    works = [complete(call, receive, received[rank], ranks[rank], group=group, tag=tag) for rank in others]
    works += [complete(call, send, sent[rank], ranks[rank], group=group, tag=tag) for rank in others]

    def wait(sent: Tensor = sent) -> Tensor:
        for work in works:
            complete(call, work.wait)
        return received

    return wait


def _arrival(call: Call, work: dist.Work, result: Tensor, sent: Tensor) -> Callable[[], Tensor]:
    """A function that waits for ``work`` and gives its ``result``; it holds what is ``sent``, to live until then."""

    def wait(sent: Tensor = sent) -> Tensor:
        complete(call, work.wait)
        return result

    return wait


@coarse_gather.register_fake
def _(share: Tensor, ranks: int, group_name: str) -> Tensor:
    return share.new_empty(ranks * share.shape[0], *share.shape[1:])


@torch.library.custom_op("tlgc_mp::coarse_reduce_scatter", mutates_args=())
def coarse_reduce_scatter(full: Tensor, ranks: int, group_name: str) -> Tensor:
    """The sum over P ranks of (P G, ...), of which each rank keeps its own (G, ...)."""
    return start_coarse_reduce_scatter(full, ranks, group_name)()


@coarse_reduce_scatter.register_fake
def _(full: Tensor, ranks: int, group_name: str) -> Tensor:
    return full.new_empty(full.shape[0] // ranks, *full.shape[1:])


def start_coarse_reduce_scatter(
    full: Tensor, ranks: int, group_name: str, by_sends: bool = True
) -> Callable[[], Tensor]:
    """Starts :func:`coarse_reduce_scatter`; the function returned waits for its result."""
    full = _in_memory(full)
    share = full.new_empty(full.shape[0] // ranks, *full.shape[1:])
    if full.is_meta or not share.numel():
        _note("coarse_reduce_scatter", full)
        return lambda: share
    stacked, group = full.view(ranks, *share.shape), resolve_group(group_name)
    return _scatter_sum("coarse_reduce_scatter", stacked, share, group, by_sends=by_sends)


class _Context(FunctionCtx):
    """What the operators below keep for backward."""

    ranks: int
    group_name: str
    sends: list[int]
    receives: list[int]


def _gather_context(ctx: _Context, inputs: tuple[Tensor, int, str], output: Tensor) -> None:
    _, ctx.ranks, ctx.group_name = inputs


def _gather_backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None, None]:
    return coarse_reduce_scatter(grad, ctx.ranks, ctx.group_name), None, None


coarse_gather.register_autograd(_gather_backward, setup_context=_gather_context)


@torch.library.custom_op("tlgc_mp::sum_partials", mutates_args=())
def sum_partials(partial: Tensor, group_name: str) -> Tensor:
    """Sum over the ranks of a group; every rank gets it. The gradient of the sum is each rank's own, unchanged."""
    return start_sum_partials(partial, group_name)()


def start_sum_partials(partial: Tensor, group_name: str) -> Callable[[], Tensor]:
    """Starts :func:`sum_partials`; the function returned waits for its result."""
    total = partial.clone(memory_format=torch.contiguous_format)
    if total.is_meta or not total.numel():
        _note("sum_partials", total)
        return lambda: total
    group = resolve_group(group_name)
    call = _begin("sum_partials", total, group)
    work = complete(call, _comm("all_reduce", "all_reduce"), total, group=group, async_op=True)
    return _arrival(call, work, total, total)


@sum_partials.register_fake
def _(partial: Tensor, group_name: str) -> Tensor:
    _note("sum_partials", partial)
    return torch.empty_like(partial, memory_format=torch.contiguous_format)


sum_partials.register_autograd(lambda ctx, grad: (grad, None))


@torch.library.custom_op("tlgc_mp::copy_to_ranks", mutates_args=())
def copy_to_ranks(whole: Tensor, group_name: str) -> Tensor:
    """The conjugate of :func:`sum_partials`: a whole tensor as it is; its gradient is summed over the ranks."""
    return whole.clone()


@copy_to_ranks.register_fake
def _(whole: Tensor, group_name: str) -> Tensor:
    return torch.empty_like(whole)


def _copy_context(ctx: _Context, inputs: tuple[Tensor, str], output: Tensor) -> None:
    _, ctx.group_name = inputs


copy_to_ranks.register_autograd(
    lambda ctx, grad: (sum_partials(grad, ctx.group_name), None), setup_context=_copy_context
)


@torch.library.custom_op(
    "tlgc_mp::exchange_channels",
    mutates_args=(),
    schema="(Tensor channels, int[] sends, int[] receives, str group_name) -> Tensor",  # torch 2.6 reads no list[int]
)
def exchange_channels(channels: Tensor, sends: list[int], receives: list[int], group_name: str) -> Tensor:
    """All-to-all along the first dimension: the first ``sends[0]`` channels go to rank 0, the next to rank 1, ...

    (sum of ``sends``, ...) -> (sum of ``receives``, ...), ``receives[s]`` of them from rank s, in rank order.
    """
    channels = _in_memory(channels)
    received = channels.new_empty(sum(receives), *channels.shape[1:])
    group = resolve_group(group_name)
    call = _begin("exchange_channels", channels, group)
    complete(call, _comm("all_to_all_single", "all_to_all_single"), received, channels, receives, sends, group=group)
    return received


@exchange_channels.register_fake
def _(channels: Tensor, sends: list[int], receives: list[int], group_name: str) -> Tensor:
    _note("exchange_channels", channels)
    return channels.new_empty(sum(receives), *channels.shape[1:])


def _exchange_context(ctx: _Context, inputs: tuple[Tensor, list[int], list[int], str], output: Tensor) -> None:
    _, ctx.sends, ctx.receives, ctx.group_name = inputs


def _exchange_backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return exchange_channels(grad, ctx.receives, ctx.sends, ctx.group_name), None, None, None


exchange_channels.register_autograd(_exchange_backward, setup_context=_exchange_context)


def all_gather(share: Tensor, ranks: TensorParallelRanks) -> Tensor:
    """The shares of all P ranks, in rank order: ``share`` of any shape and type -> (P, *share.shape), contiguous.

    Not differentiable. Of a tensor on the meta device, the shape only.
    """
    return start_all_gather(share, ranks)()


def start_all_gather(share: Tensor, ranks: TensorParallelRanks, *, of_pass: bool = True) -> Callable[[], Tensor]:
    """Starts :func:`all_gather`; the function returned waits for its result.

    Args:
        of_pass: whether it is one of a forward or backward pass, of which DeepSpeed's communication log is to know.
    """
    if _is_traced(share):
        result = coarse_gather(share.unsqueeze(0), ranks.size, ranks.group_name)
        return lambda: result
    stacked = share.new_empty((ranks.size, *share.shape))
    if share.is_meta or not share.numel():
        _note("all_gather", share)
        return lambda: stacked
    sent, received = _in_memory(share).view(-1), stacked.view(ranks.size, -1)
    if share.dtype not in _GATHERED:
        sent = sent.as_strided(sent.shape, (1,))  # a single element may have any stride
        sent, received = sent.view(torch.uint8), received.view(torch.uint8)
    # Torch 2.14's profiler crashes where a send that began under it ends after it, as one of no pass may.
    arrived = _gather("all_gather", sent, received, ranks.group, of_pass=of_pass, by_sends=of_pass)

    def wait() -> Tensor:
        arrived()
        return stacked

    return wait


def all_reduce(tensor: Tensor, ranks: TensorParallelRanks, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """The sum over the ranks of a tensor, or what ``op`` says, as a new tensor in the memory format of ``tensor``.

    Not differentiable. Of a tensor on the meta device, the shape only.
    """
    if _is_traced(tensor) and op == dist.ReduceOp.SUM:
        return sum_partials(tensor, ranks.group_name)  # type: ignore[no-any-return]
    total = tensor.to(_REDUCED_AS.get(tensor.dtype, tensor.dtype), copy=True)
    if total.is_meta or not total.numel():
        _note("all_reduce", total)
        return total.to(tensor.dtype)
    flat = total.as_strided((total.numel(),), (1,), 0)  # a copy is dense
    if flat.is_complex():
        flat = torch.view_as_real(flat)
    call = _begin("all_reduce", flat, ranks.group)
    complete(call, _comm("all_reduce", "all_reduce"), flat, op, group=ranks.group)
    return total.to(tensor.dtype)


def reduce_scatter(stacked: Tensor, ranks: TensorParallelRanks) -> Tensor:
    """This rank's row of the sum over the P ranks: (P, *shape) -> shape, contiguous.

    Not differentiable. Of a tensor on the meta device, the shape only.
    """
    return start_reduce_scatter(stacked, ranks)()


def start_reduce_scatter(stacked: Tensor, ranks: TensorParallelRanks) -> Callable[[], Tensor]:
    """Starts :func:`reduce_scatter`; the function returned waits for its result."""
    if _is_traced(stacked):
        result = coarse_reduce_scatter(stacked, ranks.size, ranks.group_name).squeeze(0)
        return lambda: result
    row = stacked.new_empty(stacked.shape[1:])
    if stacked.is_meta or not row.numel():
        _note("reduce_scatter", stacked)
        return lambda: row
    as_type = _REDUCED_AS.get(stacked.dtype, stacked.dtype)
    given, kept = _in_memory(stacked).to(as_type), row.to(as_type)
    arrived = _scatter_sum(
        "reduce_scatter",
        torch.view_as_real(given) if given.is_complex() else given,
        torch.view_as_real(kept) if kept.is_complex() else kept,
        ranks.group,
    )

    def wait() -> Tensor:
        arrived()
        return row if kept is row else row.copy_(kept)

    return wait


def _is_traced(tensor: Tensor) -> bool:
    """Whether a graph is being made, of which the collective becomes an operator."""
    return type(tensor) is not Tensor and type(tensor) is not nn.Parameter
