"""Layers that hold one rank's share of their parameters, and a model of such layers.

A sharded layer keeps its class, its names and its code. What it stores is this rank's share; what its code, and anybody
else's, reads as ``layer.weight`` is a :class:`SplitTensor`, the whole weight to all appearances. So a subclass with a
forward of its own, a hook, or a penalty on weights computes what it does on one device.

Two-level and shuffled group convolutions run on plain shares, with collectives of their own. And where a model says
that its code between layers leaves channels apart (``channels_apart``), as this package's own do, shares go from layer
to layer as plain tensors.

Each layer is a ``TensorParallel_Layer`` of DeepSpeed's, too, which is how the engine's gradient norm, its consolidated
16-bit save and its checkpoint metadata treat it as one of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO
from deepspeed.module_inject.layers import (
    TensorParallel_Layer,
    collect_autotp_universal_checkpoint_info,
    set_autotp_mode,
)
from torch import Tensor, nn

from tlgc_mp.errors import UsageError
from tlgc_mp.parallel.collectives import CoarseExchange, coarse_gather, copy_to_ranks, exchange_channels, sum_partials
from tlgc_mp.parallel.layout import Layout, Ranks, take_share
from tlgc_mp.parallel.plan import Placement
from tlgc_mp.parallel.split_tensor import SplitTensor, from_share, share_in, to_share, whole

CHANNELS = Layout(1, None)


class Region:
    """What the layers of one split model have in common.

    Attributes:
        ranks: the tensor-parallel ranks, on the group for collectives of forward and backward passes.
        tp_group: the same ranks, on the group that the engine knows.
        channels_apart: whether they can, since the model's code between layers leaves channels apart.
        plain: whether shares go from layer to layer as plain tensors, now.
    """

    def __init__(self, ranks: Ranks, tp_ranks: Ranks, channels_apart: bool) -> None:
        self.ranks = ranks
        self.tp_ranks = tp_ranks
        self.channels_apart = channels_apart
        self.plain = ranks.size == 1

    @contextlib.contextmanager
    def set_plain(self, plain: bool) -> Iterator[None]:
        before = self.plain
        self.plain = plain or self.ranks.size == 1
        try:
            yield
        finally:
            self.plain = before


class ShardedLayer:
    """What the class of every sharded layer begins with; :func:`shard_layer` makes one of a layer."""

    region: Region
    placement: Placement

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)  # type: ignore[misc]
        own = self.__dict__
        if "region" not in own or name not in own["placement"].dims or own["region"].plain or value is None:
            return value
        layout = Layout(own["placement"].dims[name], None)
        if isinstance(value, nn.Parameter):
            return from_share(value, layout, own["region"].ranks)
        return SplitTensor(value, layout, own["region"].ranks)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and "region" in self.__dict__ and name in self.placement.dims:
            buffer = name in self._buffers  # type: ignore[attr-defined]
            if buffer and not self.region.plain:
                value = share_in(value, Layout(self.placement.dims[name], None), self.region.ranks).clone()
        super().__setattr__(name, value)

    @property
    def mp_group(self) -> dist.ProcessGroup:
        """DeepSpeed's name for the tensor-parallel group."""
        return self.region.tp_ranks.group

    @mp_group.setter
    def mp_group(self, group: Any) -> None:
        """It follows from the region."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _reduced(self)

    def _adjust(self) -> None:
        """What a layer needs beside its share."""

    def gather_whole(self, key: str) -> Tensor:
        """The whole parameter or buffer ``key``, assembled from the shares of all ranks of the group. Collective."""
        tensor = {**self._parameters, **self._buffers}[key].detach()  # type: ignore[attr-defined]
        if key not in self.placement.dims:
            return tensor.clone()
        made = SplitTensor(tensor.contiguous(), Layout(self.placement.dims[key], None), self.region.tp_ranks)
        return whole(made).clone(memory_format=torch.contiguous_format)

    @torch.no_grad()
    def gather_params(self, params_list: list[Tensor]) -> None:
        """Replaces each given parameter's data by the whole one. DeepSpeed calls it around a consolidated save."""
        for param in params_list:
            key = next((key for key, own in self._parameters.items() if own is param), None)  # type: ignore[attr-defined]
            if key in self.placement.dims:
                full = self.gather_whole(key)
                param.data_partition = param.data  # type: ignore[attr-defined]
                param.data = full

    @torch.no_grad()
    def _tp_partition(self, params_list: list[Tensor]) -> None:
        """Undoes :meth:`gather_params`: each given parameter holds this rank's share again."""
        for param in params_list:
            if hasattr(param, "data_partition"):
                param.data = param.data_partition
                del param.data_partition

    def _mark_uc_metadata(self) -> None:
        """Describes each parameter's split for DeepSpeed's universal checkpoints."""
        layer: Any = self
        for key, param in layer._parameters.items():
            if param is None:
                continue
            dim = self.placement.dims.get(key)
            shape = list(layer._shape_before_zero3_partition(param))
            if dim is not None:
                share = shape[dim]
                shape[dim] *= self.region.ranks.size
            layer._set_param_uc_meta(
                param,
                partition_type="row" if dim == 1 else "column",
                partition_dim=dim,
                logical_shape=tuple(shape),
                original_shape=tuple(shape),
                partition_sizes=None if dim is None else (share,) * self.region.ranks.size,
                is_bias=key == "bias",
                replicated=dim is None,
            )


class LocalLayer(ShardedLayer):
    """A layer that runs on plain shares of channels, dimension 1, and has collectives of its own."""

    def forward(self, x: Tensor) -> Any:
        if self.region.plain:
            return super().forward(x)  # type: ignore[misc]
        channels = self.in_channels  # type: ignore[attr-defined]
        if x.dim() != 4 or x.shape[1] != channels:
            raise UsageError(f"input of shape {tuple(x.shape)} does not fit; give (B, {channels}, H, W)")
        last = x.is_contiguous(memory_format=torch.channels_last)
        share = to_share(x, CHANNELS, self.region.ranks)  # of a plain tensor, a view with gaps
        share = share.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        with self.region.set_plain(True):
            y = super().forward(share)  # type: ignore[misc]
        return from_share(y, CHANNELS, self.region.ranks)


class ParallelTwoLevel(LocalLayer):
    """G = N / P groups of a two-level group convolution, or of its prototype; the gather is a collective."""

    def _adjust(self) -> None:
        self.local_groups = self.groups // self.region.ranks.size  # type: ignore[attr-defined]
        self.exchange = CoarseExchange(self.region.ranks.group)


class ParallelShuffle(LocalLayer):
    """G = N / P groups of a group convolution whose output channels are shuffled over all ranks.

    (B, n / P, H, W) -> (B, m / P, h, w). All but one in P of its output's channels cross ranks, in an all-to-all.
    """

    receive_order: Tensor

    def _adjust(self) -> None:
        """Works out who sends how many channels to whom: group g's channel k moves to place k N + g, and a rank holds
        consecutive groups before, and consecutive places after."""
        layer: Any = self
        ranks, own = self.region.ranks.size, self.region.ranks.rank
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
        channels_last = y.is_contiguous(memory_format=torch.channels_last)
        by_place = y.unflatten(1, (self.groups, -1)).permute(2, 1, 0, 3, 4).flatten(0, 1)  # type: ignore[attr-defined]
        received = exchange_channels(by_place, self._sends, self._receives, self.region.ranks.group_name)
        shuffled = received.index_select(0, self.receive_order).transpose(0, 1)
        return shuffled.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


class ParallelGroupConv(ShardedLayer):
    """N / P groups of a group (or depthwise) convolution. No communication."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer: Any = self
        if not self.region.plain or self.region.ranks.size == 1:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        groups = layer.groups // self.region.ranks.size
        return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, groups)


class ParallelColumnConv(ShardedLayer):
    """A dense convolution with a share of its output channels.

    Between plain shares it is the stem: the whole input on every rank, and no communication unless the gradient of the
    input is asked for.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.region.plain and x.requires_grad and self.region.ranks.size > 1:
            x = copy_to_ranks(x, self.region.ranks.group_name)
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]


class GatheredConv(ShardedLayer):
    """A dense convolution between plain shares: n input channels gathered, m / P output channels kept. Exact.

    (B, n / P, H, W) -> (B, m / P, h, w). Sends a whole feature map where a two-level layer sends one channel a group.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        ranks = self.region.ranks
        if self.region.plain and ranks.size > 1:
            gathered = coarse_gather(x.transpose(0, 1), ranks.size, ranks.group_name)  # n, B, H, W
            x = gathered.transpose(0, 1).contiguous(memory_format=torch.channels_last)
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]


class ParallelDropout(ShardedLayer):
    """Dropout, between plain shares of channels, which are dimension 1. No communication.

    Each rank draws, from torch's random state of its device, what one device would drop of all channels, and takes its
    own of them.
    """

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self
        ranks = self.region.ranks
        if not self.region.plain or ranks.size == 1 or not layer.training or layer.p == 0:
            return super().forward(x)  # type: ignore[misc]
        shape = (x.shape[0], x.shape[1] * ranks.size, *x.shape[2:])
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)  # values are drawn in memory's order
        form = torch.channels_last if last else torch.contiguous_format
        drawn = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form).bernoulli_(1 - layer.p)
        kept = take_share(drawn, CHANNELS, ranks)
        scaled = kept.div_(1 - layer.p) if layer.p < 1 else kept
        return x.mul_(scaled) if layer.inplace else x * scaled


class ParallelRow(ShardedLayer):
    """A layer with a share of its inputs. Between plain shares it is the head: (B, n / P) features of each rank ->
    (B, C) logits, summed over the ranks; the bias is added once."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer: Any = self
        if not self.region.plain or self.region.ranks.size == 1:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        logits = sum_partials(F.linear(x, layer.weight), self.region.ranks.group_name)
        return logits if layer.bias is None else logits + layer.bias


LAYERS: dict[str, type[ShardedLayer]] = {
    "column": ParallelColumnConv,
    "grouped": ParallelGroupConv,
    "two-level": ParallelTwoLevel,
    "prototype": ParallelTwoLevel,
    "shuffle": ParallelShuffle,
    "gathered": GatheredConv,
    "channels": ShardedLayer,
    "dropout": ParallelDropout,
    "row": ParallelRow,
}
"""Kind of placement -> what is put before the class of the layer that carries it out."""


class SplitModel:
    """What the class of a split model begins with: its outputs are plain and whole."""

    region: Region

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        region = self.region
        if region.ranks.size == 1:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        if region.channels_apart and not _is_watched(self):  # type: ignore[arg-type]
            with region.set_plain(True):
                return super().forward(*args, **kwargs)  # type: ignore[misc]
        if torch.compiler.is_compiling():
            return _run_eagerly(super().forward, args, kwargs)  # type: ignore[misc]
        return whole(super().forward(*args, **kwargs))  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _reduced(self)


@torch.compiler.disable  # a graph of split tensors would lose gradients
def _run_eagerly(forward: Any, args: Any, kwargs: Any) -> Any:
    return whole(forward(*args, **kwargs))


def _is_watched(model: nn.Module) -> bool:
    """Whether any hook of the user's would see a plain share where one device has the whole tensor."""
    if torch.nn.modules.module._has_any_global_hook():
        return True
    for module in model.modules():
        if module is model:
            continue
        if any(not _is_engines(hook) for name in _HOOKS for hook in vars(module)[name].values()):
            return True
    return False


def shard_layer(
    layer: nn.Module,
    placement: Placement,
    region: Region,
    device: torch.device | None,
    shares: dict[int, nn.Parameter],
) -> None:
    """Makes ``layer`` hold its share, in place.

    Args:
        device: where the share is to live; ``None`` keeps the layer's own.
        shares: of parameters cut already, by the id of the whole one; tied ones stay tied.
    """
    names = vars(layer).copy()
    layer.__class__ = split_class(type(layer), LAYERS.get(placement.kind, ShardedLayer))
    if TensorParallel_Layer in type(layer).__mro__:
        TensorParallel_Layer.__init__(layer, None)  # type: ignore[arg-type]
    layer.__dict__.update(names)
    own: Any = layer
    own.placement, own.region = placement, region
    own.tp_world_size = own.world_size = region.ranks.size
    own.tp_index = own.rank = region.ranks.rank
    own.is_tp_parallel = region.ranks.size > 1
    own.support_training = True
    set_autotp_mode(training=True)
    for key, param in layer._parameters.items():
        if param is None:
            continue
        if id(param) not in shares:
            share = nn.Parameter(_share(placement, key, param.data, region, device), requires_grad=param.requires_grad)
            shares[id(param)] = share
        layer._parameters[key] = shares[id(param)]
        if key in placement.dims:
            own.config_tp_params(shares[id(param)])
    for key, buffer in layer._buffers.items():
        if buffer is not None:
            layer._buffers[key] = _share(placement, key, buffer, region, device)
    with region.set_plain(True):
        own._adjust()


def _share(placement: Placement, key: str, tensor: Tensor, region: Region, device: torch.device | None) -> Tensor:
    """This rank's share of a whole parameter or buffer, in storage of its own."""
    if key in placement.dims:
        tensor = take_share(tensor, Layout(placement.dims[key], None), region.ranks)
    if tensor.is_meta:
        return torch.empty_like(tensor, device=device or torch.device("cpu"))
    return tensor.to(device=device or tensor.device, copy=True)


def make_root(model: nn.Module, region: Region) -> None:
    """Makes ``model`` give whole outputs, in place."""
    model.__class__ = split_class(type(model), SplitModel)
    model.region = region  # type: ignore[assignment]


def split_class(base: Any, kind: Any) -> Any:
    """The class of a layer or model of class ``base`` after it is sharded. It bears the same name."""
    if (base, kind) not in _CLASSES:
        joins = kind is not SplitModel and not issubclass(base, TensorParallel_Layer)
        bases = (kind, base, TensorParallel_Layer) if joins else (kind, base)
        names = {"made_from": (base, kind), "__module__": base.__module__, "__doc__": base.__doc__}
        _CLASSES[base, kind] = type(base.__name__, bases, names)
    return _CLASSES[base, kind]


_CLASSES: dict[tuple[Any, Any], Any] = {}


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _reduced(module: Any) -> Any:
    """What pickle and copy keep of a module: all but the hooks of an engine, which belong to that engine alone."""
    state = dict(module.__getstate__() if hasattr(module, "__getstate__") else vars(module))
    for name in _HOOKS:
        kept = {key: hook for key, hook in state[name].items() if not _is_engines(hook)}
        state[name] = type(state[name])(kept)
    return _empty, type(module).made_from, state


def _is_engines(hook: Any) -> bool:
    return (getattr(hook, "__module__", "") or "").startswith("deepspeed")


def _empty(base: Any, kind: Any) -> Any:
    """An object to be filled by what pickle or copy kept of one."""
    if hasattr(base, "made_from"):
        base = split_class(*base.made_from)
    cls = split_class(base, kind)
    return cls.__new__(cls)


def collect_checkpoint_info(model: nn.Module) -> None:
    """Marks a split model as DeepSpeed marks its own: nothing left to search for, and every split described."""
    model.ds_autotp_parsed = True  # type: ignore[assignment]
    setattr(model, UNIVERSAL_CHECKPOINT_INFO, collect_autotp_universal_checkpoint_info(model))
