"""The parallel layers by kind of placement, and a model of such layers.

Two-level, balanced and shuffled group convolutions run on plain shares, with collectives of their own. Others compute
by the rule of each operator, unless a model says that its code between layers leaves channels apart
(``channels_apart``), as this package's own do: then shares go from layer to layer as plain tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, SupportsIndex

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tlgc_mp.errors import UsageError, must_be
from tlgc_mp.nn.window import AXES, memory_format_of
from tlgc_mp.parallel.collectives import coarse_gather, copy_to_ranks, exchange_channels, sum_partials
from tlgc_mp.parallel.exchange import CoarseExchange, CoarseSum
from tlgc_mp.parallel.layout import Layout, take_share
from tlgc_mp.parallel.plan import Placement, unsplit_class
from tlgc_mp.parallel.sharded import (
    HOOKS,
    Reduced,
    Region,
    ShardedLayer,
    check_not_transformed,
    is_engines,
    keep_gradient_plain,
    reduced,
    split_class,
)
from tlgc_mp.parallel.signatures import Args
from tlgc_mp.parallel.split_functions import hook_of_whole
from tlgc_mp.parallel.split_tensor import SplitTensor, enter_leaves, enter_ranks, from_share, to_share, whole

CHANNELS = Layout(1, None)


class LocalLayer(ShardedLayer):
    """A layer that runs on plain shares of channels, dimension 1, and has collectives of its own."""

    def forward(self, x: Tensor) -> Tensor:
        if self.tlgc_region.plain:
            return super().forward(x)
        layer: Any = self
        channels, dims = layer.in_channels, layer.dims
        if x.dim() == dims + 1:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        if x.dim() != dims + 2 or x.shape[1] != channels:
            axes = ", ".join(AXES[dims])
            raise UsageError(f"input must be of shape (B, {channels}, {axes}), got {tuple(x.shape)}")
        return self._tlgc_on_shares(x)

    def _tlgc_on_shares(self, x: Tensor) -> Tensor:
        memory_format = memory_format_of(x)
        if not isinstance(x, SplitTensor):
            x = enter_ranks(x, self.tlgc_region.ranks)  # its gradient is plain, too
        share = to_share(x, CHANNELS, self.tlgc_region.ranks)  # of a whole tensor, a view with gaps
        share = share.contiguous(memory_format=memory_format)
        with self.tlgc_region.set_plain(True):
            y = super().forward(share)
        return from_share(y, CHANNELS, self.tlgc_region.ranks)


class ParallelTwoLevel(LocalLayer):
    """G = N / P groups of a two-level group convolution, or of its prototype; representatives are gathered, or summed,
    in a collective."""

    def _tlgc_adjust(self) -> None:
        layer: Any = self
        ranks = self.tlgc_region.ranks
        layer.local_groups = layer.groups // ranks.size
        if layer.coarse_sum:
            layer.exchange = CoarseSum(ranks.group_name)
        else:
            layer.exchange = CoarseExchange(ranks.size, ranks.group_name, self.tlgc_region.over_network)


class ParallelBalanced(LocalLayer):
    """G = N / P groups of a balanced group convolution; the sum over all groups is a collective, and so is that of its
    gradient."""

    def _tlgc_adjust(self) -> None:
        self.groups //= self.tlgc_region.ranks.size  # type: ignore[attr-defined]

    def mean_of_groups(self, x: Tensor) -> Tensor:
        ranks = self.tlgc_region.ranks
        own = super().mean_of_groups(x) / ranks.size  # type: ignore[misc]
        mean: Tensor = copy_to_ranks(sum_partials(own, ranks.group_name), ranks.group_name)
        return mean.contiguous(memory_format=memory_format_of(x))


class ParallelShuffle(LocalLayer):
    """G = N / P groups of a group convolution whose output channels are shuffled over all ranks.

    (B, n / P, H, W) -> (B, m / P, h, w). All but one in P of its output's channels cross ranks, in an all-to-all.
    """

    receive_order: Tensor

    def _tlgc_adjust(self) -> None:
        """Works out who sends how many channels to whom: group g's channel k moves to place k N + g, and a rank holds
        consecutive groups before, and consecutive places after."""
        layer: Any = self
        ranks, own = self.tlgc_region.ranks.size, self.tlgc_region.ranks.rank
        places = torch.arange(layer.out_channels).view(-1, layer.groups)  # m/N, N
        goes_to = places // (layer.out_channels // ranks)
        comes_from = (torch.arange(layer.groups) // (layer.groups // ranks)).expand_as(places)
        self._sends = goes_to[comes_from == own].bincount(minlength=ranks).tolist()
        sources = comes_from[goes_to == own]  # by place
        self._receives = sources.bincount(minlength=ranks).tolist()
        order = sources.argsort(stable=True).argsort().to(layer.weight.device)
        layer.register_buffer("receive_order", order, persistent=False)
        layer.groups //= ranks

    def _shuffled(self, y: Tensor) -> Tensor:
        by_place: Tensor = y.unflatten(1, (self.groups, -1)).transpose(0, 2).flatten(0, 1)  # type: ignore[attr-defined]
        received: Tensor = exchange_channels(by_place, self._sends, self._receives, self.tlgc_region.ranks.group_name)
        shuffled = received.index_select(0, self.receive_order).transpose(0, 1)
        return shuffled.contiguous(memory_format=memory_format_of(y))


class ParallelSyncNorm(LocalLayer):
    """A SyncBatchNorm with a share of its channels, whose statistics are over the replicas alone."""

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        return None if self.tlgc_region.replicas is None else self.tlgc_region.replicas.group

    @process_group.setter
    def process_group(self, group: object) -> None:
        """It follows from the region."""

    def forward(self, x: Tensor) -> Tensor:
        if self.tlgc_region.plain or not self.training:  # type: ignore[attr-defined]
            return super(LocalLayer, self).forward(x)
        if x.device.type == "meta":  # to be measured
            return nn.BatchNorm2d.forward(self, x)  # type: ignore[arg-type]
        return self._tlgc_on_shares(x)


class ParallelGroupConv(ShardedLayer):
    """N / P groups of a group (or depthwise) convolution. No communication."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        layer: Any = self
        if not self.tlgc_region.plain or self.tlgc_region.ranks.size == 1:
            return super().forward(*args, **kwargs)
        (x,) = args
        groups = layer.groups // self.tlgc_region.ranks.size
        return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, groups)


class ParallelColumnConv(ShardedLayer):
    """A dense convolution with a share of its output channels.

    Between plain shares it is the stem: the whole input on every rank, and no communication unless the gradient of the
    input is asked for.
    """

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        if self.tlgc_region.plain and self.tlgc_region.ranks.size > 1 and args[0].requires_grad:
            args = (copy_to_ranks(args[0], self.tlgc_region.ranks.group_name),)
        return super().forward(*args, **kwargs)


class GatheredConv(ShardedLayer):
    """A dense convolution between plain shares: n input channels gathered, m / P output channels kept. Exact.

    (B, n / P, H, W) -> (B, m / P, h, w). Sends a whole feature map where a two-level layer sends one channel a group.
    """

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        ranks = self.tlgc_region.ranks
        if self.tlgc_region.plain and ranks.size > 1:
            gathered = coarse_gather(args[0].transpose(0, 1), ranks.size, ranks.group_name)  # n, B, H, W
            args = (gathered.transpose(0, 1).contiguous(memory_format=torch.channels_last),)
        return super().forward(*args, **kwargs)


class ParallelDropout(ShardedLayer):
    """Dropout, between plain shares of channels, which are dimension 1. No communication.

    Each rank draws, from torch's random state of its device, what one device would drop of all channels, and takes its
    own of them.
    """

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        layer: Any = self
        ranks = self.tlgc_region.ranks
        if not self.tlgc_region.plain or ranks.size == 1 or not layer.training or layer.p == 0:
            return super().forward(*args, **kwargs)
        x: Tensor
        (x,) = args
        shape = (x.shape[0], x.shape[1] * ranks.size, *x.shape[2:])
        form = memory_format_of(x)  # values are drawn in memory's order
        drawn = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form).bernoulli_(1 - layer.p)
        kept = take_share(drawn, CHANNELS, ranks)
        scaled = kept.div_(1 - layer.p) if layer.p < 1 else kept
        return x.mul_(scaled) if layer.inplace else x * scaled


class ParallelRow(ShardedLayer):
    """A layer with a share of its inputs. Between plain shares it is the head: (B, n / P) features of each rank ->
    (B, C) logits, summed over the ranks; the bias is added once."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        layer: Any = self
        if self.tlgc_region.ranks.size == 1:
            return super().forward(*args, **kwargs)
        if not self.tlgc_region.plain:
            return super().forward(*self._tlgc_cut(args), **kwargs)
        (x,) = args
        logits: Tensor = sum_partials(F.linear(x, layer.weight), self.tlgc_region.ranks.group_name)
        return logits if layer.bias is None else logits + layer.bias

    def _tlgc_cut(self, args: Args) -> Args:
        """The arguments, with an input that every rank holds whole cut: then autograd keeps this rank's share of it.

        Only for layers whose code is known to leave its input as it is.
        """
        layer: Any = self
        x: Any = args[0] if args else None
        is_whole = x.cut.dim is None if type(x) is SplitTensor else type(x) is Tensor
        if not is_whole or not torch.is_grad_enabled() or unsplit_class(layer) not in _READ_ONLY:
            return args
        linear = isinstance(layer, nn.Linear)
        inputs, groups = (layer.in_features, 1) if linear else (layer.in_channels, layer.groups)
        dim = x.dim() - 1 if linear else x.dim() - layer._parameters["weight"].dim() + 1
        if dim < 0 or x.shape[dim] != inputs:
            return args
        ranks = layer.tlgc_region.ranks
        layout = Layout(dim, (inputs // groups,) * groups if groups > 1 else None)
        x = x if type(x) is SplitTensor else enter_ranks(x, ranks)
        return (from_share(to_share(x, layout, ranks).clone(), layout, ranks), *args[1:])


_READ_ONLY = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


LAYERS: dict[str, type[ShardedLayer]] = {
    "column": ParallelColumnConv,
    "grouped": ParallelGroupConv,
    "two-level": ParallelTwoLevel,
    "prototype": ParallelTwoLevel,
    "balanced": ParallelBalanced,
    "shuffle": ParallelShuffle,
    "gathered": GatheredConv,
    "channels": ShardedLayer,
    "heads": ShardedLayer,
    "synchronized": ParallelSyncNorm,
    "dropout": ParallelDropout,
    "row": ParallelRow,
}
"""Kind of placement -> what is put before the class of the layer that carries it out."""


class SplitModel:
    """What the class of a split model begins with: its outputs are plain and whole."""

    tlgc_region: Region

    def forward(self, *args: object, **kwargs: object) -> object:
        region = self.__dict__.get("tlgc_region")  # a part that was sliced off has none
        if region is None or region.ranks.size == 1:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        if not torch.compiler.is_compiling():
            check_not_transformed()
            _check_not_averaged(region)
        if region.channels_apart and not _is_watched(self):  # type: ignore[arg-type]
            with region.set_plain(True):
                return super().forward(*args, **kwargs)  # type: ignore[misc]
        if torch.compiler.is_compiling():
            return _run_eagerly(super().forward, args, kwargs)  # type: ignore[misc]
        args, kwargs = enter_leaves((args, kwargs), region.ranks)
        return whole(super().forward(*args, **kwargs))  # type: ignore[misc]

    def __reduce_ex__(self, protocol: SupportsIndex) -> Reduced:
        return reduced(self)  # type: ignore[arg-type]


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a graph of split tensors would lose gradients
def _run_eagerly(forward: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    return whole(forward(*args, **kwargs))


def _check_not_averaged(region: Region) -> None:
    """Refuses DistributedDataParallel over ranks that share a replica: it gives all of them the first one's shares. So
    too where its buckets take the place of gradients, which would not know then that they are shares.

    Raises:
        UsageError: within the forward pass of such a wrapper.
    """
    wrapper = DistributedDataParallel._active_ddp_module
    if wrapper is None:
        return
    averaged = dist.get_process_group_ranks(wrapper.process_group)
    members = dist.get_process_group_ranks(region.tp_ranks.group)
    if len(set(averaged) & set(members)) > 1:
        raise UsageError(
            f"process_group of DistributedDataParallel must be ranks that hold the same share, got {averaged}; leave "
            f"out all but one of {members}, and split the model again"
        )
    if wrapper.gradient_as_bucket_view:
        raise must_be("gradient_as_bucket_view", "False of a split model", True, "leave it out")


_HOOKS_OF_ALL_MODULES = (
    *("_global_forward_hooks", "_global_forward_pre_hooks"),
    *("_global_backward_hooks", "_global_backward_pre_hooks"),
)


def _is_watched(model: nn.Module) -> bool:
    """Whether any hook of the user's would see a plain share where one device has the whole tensor, or a layer has been
    given a whole buffer, which it may write to."""
    if any(getattr(nn.modules.module, name) for name in _HOOKS_OF_ALL_MODULES):
        return True
    for module in model.modules():
        if module is model:
            continue
        own = vars(module)
        if any(not is_engines(hook) for name in HOOKS for hook in own[name].values()):
            return True
        shapes = own.get("tlgc_shapes", {})
        if any(
            key in shapes and buffer is not None and buffer.shape == shapes[key]
            for key, buffer in own["_buffers"].items()
        ):
            return True
    return False


def shard_layer(
    layer: nn.Module,
    placement: Placement,
    region: Region,
    device: torch.device | None,
    shares: dict[tuple[int, Layout], Tensor],
) -> None:
    """Makes ``layer`` hold its share, in place.

    Args:
        device: where the share is to live; ``None`` keeps the layer's own.
        shares: of tensors cut already, by the id of the whole one and where it is cut; tied ones stay tied.
    """
    layer.__class__ = split_class(type(layer), LAYERS.get(placement.kind, ShardedLayer))
    own: Any = layer
    own.tlgc_placement, own.tlgc_region = placement, region
    tensors = {**layer._parameters, **layer._buffers}
    own.tlgc_shapes = {key: t.shape for key, t in tensors.items() if key in placement.dims and t is not None}
    for key, param in layer._parameters.items():
        if param is None:
            continue
        layout = placement.layout(key)
        if (id(param), layout) not in shares:
            share = nn.Parameter(_share(placement, key, param.data, region, device), requires_grad=param.requires_grad)
            shares[id(param), layout] = share
            keep_gradient_plain(share, layout.dim, region)
            _keep_hooks(param, share, layout, region)
        layer._parameters[key] = shares[id(param), layout]  # type: ignore[assignment]
    for key, buffer in layer._buffers.items():
        if buffer is None:
            continue
        layout = placement.layout(key)
        if (id(buffer), layout) not in shares:
            shares[id(buffer), layout] = _share(placement, key, buffer, region, device)
        layer._buffers[key] = shares[id(buffer), layout]
    with region.set_plain(True):
        own._tlgc_adjust()


def _keep_hooks(param: nn.Parameter, share: nn.Parameter, layout: Layout, region: Region) -> None:
    """Has the gradient hooks of a whole parameter run for its share; they see the whole gradient."""
    for hook in (param._backward_hooks or {}).values():
        if layout.dim is None:
            share.register_hook(hook)
        else:
            share.register_hook(functools.partial(hook_of_whole, hook, layout, region.ranks))


def _share(placement: Placement, key: str, tensor: Tensor, region: Region, device: torch.device | None) -> Tensor:
    """This rank's share of a whole parameter or buffer, in storage of its own."""
    tensor = take_share(tensor, placement.layout(key), region.ranks)
    if tensor.is_meta:
        return torch.empty_like(tensor, device=device or torch.device("cpu"))
    return tensor.to(device=device or tensor.device, copy=True)


def make_root(model: nn.Module, region: Region) -> None:
    """Makes ``model`` give whole outputs, in place."""
    model.__class__ = split_class(type(model), SplitModel)
    model.tlgc_region = region  # type: ignore[assignment]
