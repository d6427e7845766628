"""The parallel layers: single-device layers over one rank's share of their parameters.

Each takes over an existing layer and inherits its forward pass, so parallel code is the same computation on a slice.
Each is also a ``TensorParallel_Layer`` of DeepSpeed's, which is how the engine's gradient norm, its consolidated 16-bit
save and its checkpoint metadata treat it as one of its own.
"""

from __future__ import annotations

import functools
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

from tlgc_mp.nn import ShuffleConv2d, TwoLevelConv2d, TwoLevelPrototypeConv2d
from tlgc_mp.parallel.collectives import (
    CoarseExchange,
    coarse_gather,
    copy_to_ranks,
    exchange_channels,
    resolve_group,
    sum_partials,
)
from tlgc_mp.parallel.plan import Placement


class ShardedLayer(TensorParallel_Layer):
    """A layer that holds one of P equal shares of its parameters along the planned dimensions.

    Args:
        layer: the single-device layer to take over; on the meta device its share is allocated, not copied.
        placement: which dimension of which parameter is cut.
        tp_group: the tensor-parallel process group, whose rank order is the order of the shares.
        coarse_group: the group for collectives of forward and backward passes; the same ranks.
        device: where the share is to live; ``None`` keeps the layer's own.
    """

    coarse_group_name: str

    def __init__(
        self,
        layer: nn.Module,
        placement: Placement,
        tp_group: dist.ProcessGroup,
        coarse_group: dist.ProcessGroup,
        device: torch.device | None = None,
    ) -> None:
        # With a group, the base class would ask deepspeed.comm about it, which plain torch.distributed leaves unset.
        TensorParallel_Layer.__init__(self, None)
        own = ("_parameters", "_buffers", "_modules")
        self.__dict__.update({key: value for key, value in vars(layer).items() if key not in own})
        self.mp_group = tp_group
        self.tp_world_size = self.world_size = dist.get_world_size(tp_group)
        self.tp_index = self.rank = dist.get_rank(tp_group)
        self.is_tp_parallel = self.tp_world_size > 1
        self.support_training = True
        self.placement = placement
        self.coarse_group_name = coarse_group.group_name
        set_autotp_mode(training=True)

        for key, param in layer._parameters.items():
            shard = None
            if param is not None:
                shard = nn.Parameter(self._share(key, param.data, device), requires_grad=param.requires_grad)
                if key in placement.dims:
                    self.config_tp_params(shard)
            self.register_parameter(key, shard)
        for key, buffer in layer._buffers.items():
            persistent = key not in layer._non_persistent_buffers_set
            share = None if buffer is None else self._share(key, buffer, device)
            self.register_buffer(key, share, persistent=persistent)
        self._modules.update(layer._modules)
        self._adjust(self.tp_world_size)

    def _adjust(self, ranks: int) -> None:
        """Sets the counts that the inherited forward pass reads to those of the share."""

    def _share(self, key: str, tensor: Tensor, device: torch.device | None) -> Tensor:
        """This rank's share of a whole parameter or buffer, in storage of its own."""
        if key in self.placement.dims:
            dim = self.placement.dims[key]
            length = tensor.shape[dim] // self.tp_world_size
            tensor = tensor.narrow(dim, self.tp_index * length, length)
        if tensor.is_meta:
            return torch.empty_like(tensor, device=device or torch.device("cpu"))
        return tensor.to(device=device or tensor.device, copy=True)

    def gather_whole(self, key: str) -> Tensor:
        """The whole parameter or buffer ``key``, assembled from the shares of all ranks of the group. Collective."""
        tensor = getattr(self, key).detach()
        if key not in self.placement.dims:
            return tensor.clone()
        dim = self.placement.dims[key]
        tensor = tensor.contiguous()
        shares = [torch.empty_like(tensor) for _ in range(self.tp_world_size)]
        dist.all_gather(shares, tensor, group=self.mp_group)
        return torch.cat(shares, dim=dim)

    def _key_of(self, param: Tensor) -> str | None:
        return next((key for key, own in self._parameters.items() if own is param), None)

    @torch.no_grad()
    def gather_params(self, params_list: list[Tensor]) -> None:
        """Replaces each given parameter's data by the whole one. DeepSpeed calls it around a consolidated save."""
        for param in params_list:
            key = self._key_of(param)
            if key in self.placement.dims:
                whole = self.gather_whole(key)
                param.data_partition = param.data  # type: ignore[attr-defined]
                param.data = whole

    @torch.no_grad()
    def _tp_partition(self, params_list: list[Tensor]) -> None:
        """Undoes :meth:`gather_params`: each given parameter holds this rank's share again."""
        for param in params_list:
            if hasattr(param, "data_partition"):
                param.data = param.data_partition
                del param.data_partition

    def _mark_uc_metadata(self) -> None:
        """Describes each parameter's split for DeepSpeed's universal checkpoints."""
        for key, param in self._parameters.items():
            if param is None:
                continue
            dim = self.placement.dims.get(key)
            shape = list(self._shape_before_zero3_partition(param))
            if dim is not None:
                share = shape[dim]
                shape[dim] *= self.tp_world_size
            self._set_param_uc_meta(
                param,
                partition_type="row" if dim == 1 else "column",
                partition_dim=dim,
                logical_shape=tuple(shape),
                original_shape=tuple(shape),
                partition_sizes=None if dim is None else (share,) * self.tp_world_size,
                is_bias=key == "bias",
                replicated=dim is None,
            )


class ParallelTwoLevelConv2d(TwoLevelConv2d, ShardedLayer):
    """G = N / P groups of a two-level group convolution; the gather is a collective."""

    __init__ = ShardedLayer.__init__

    def _adjust(self, ranks: int) -> None:
        self.local_groups = self.groups // ranks
        self.exchange = CoarseExchange(resolve_group(self.coarse_group_name))


class ParallelTwoLevelPrototypeConv2d(TwoLevelPrototypeConv2d, ShardedLayer):
    """G = N / P groups of the prototype, and as many rows of its coarse convolution; the gather is a collective."""

    __init__ = ShardedLayer.__init__
    _adjust = ParallelTwoLevelConv2d._adjust


class ParallelGroupConv2d(nn.Conv2d, ShardedLayer):
    """N / P groups of a group (or depthwise) convolution. No communication."""

    __init__ = ShardedLayer.__init__

    def _adjust(self, ranks: int) -> None:
        self.groups //= ranks
        self.in_channels //= ranks
        self.out_channels //= ranks


class ParallelShuffleConv2d(ShuffleConv2d, ShardedLayer):
    """G = N / P groups of a group convolution whose output channels are shuffled over all ranks.

    (B, n / P, H, W) -> (B, m / P, h, w). All but one in P of its output's channels cross ranks, in an all-to-all.
    """

    __init__ = ShardedLayer.__init__
    receive_order: Tensor

    def _adjust(self, ranks: int) -> None:
        """Works out who sends how many channels to whom: group g's channel k moves to place k N + g, and a rank holds
        consecutive groups before, and consecutive places after."""
        places = torch.arange(self.out_channels).view(-1, self.groups)  # m/N, N
        goes_to = places // (self.out_channels // ranks)
        comes_from = (torch.arange(self.groups) // (self.groups // ranks)).expand_as(places)
        self._sends = goes_to[comes_from == self.tp_index].bincount(minlength=ranks).tolist()
        sources = comes_from[goes_to == self.tp_index]  # by place
        self._receives = sources.bincount(minlength=ranks).tolist()
        order = sources.argsort(stable=True).argsort().to(self.weight.device)
        self.register_buffer("receive_order", order, persistent=False)
        ParallelGroupConv2d._adjust(self, ranks)  # type: ignore[arg-type]

    def _shuffled(self, y: Tensor) -> Tensor:
        channels_last = y.is_contiguous(memory_format=torch.channels_last)
        by_place = y.unflatten(1, (self.groups, -1)).permute(2, 1, 0, 3, 4).flatten(0, 1)  # m/P, B, h, w
        received = exchange_channels(by_place, self._sends, self._receives, self.coarse_group_name)
        shuffled = received.index_select(0, self.receive_order).transpose(0, 1)
        return shuffled.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


class ColumnParallelConv2d(nn.Conv2d, ShardedLayer):
    """The stem: the whole input on every rank, m / P output channels.

    No communication, unless the gradient of the input is asked for: then it is summed over the ranks.
    """

    __init__ = ShardedLayer.__init__

    def _adjust(self, ranks: int) -> None:
        self.out_channels //= ranks

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x = copy_to_ranks(x, self.coarse_group_name)
        return super().forward(x)


class GatheredConv2d(nn.Conv2d, ShardedLayer):
    """A dense convolution of split channels: n input channels gathered, m / P output channels kept. Exact.

    (B, n / P, H, W) -> (B, m / P, h, w). Sends a whole feature map where a two-level layer sends one channel a group.
    """

    __init__ = ShardedLayer.__init__

    def _adjust(self, ranks: int) -> None:
        self.out_channels //= ranks

    def forward(self, x: Tensor) -> Tensor:
        whole = coarse_gather(x.transpose(0, 1), self.tp_world_size, self.coarse_group_name)  # n, B, H, W
        return super().forward(whole.transpose(0, 1).contiguous(memory_format=torch.channels_last))


class ParallelBatchNorm2d(nn.BatchNorm2d, ShardedLayer):
    """BatchNorm of C / P channels. Statistics are per channel, so nothing crosses ranks."""

    __init__ = ShardedLayer.__init__

    def _adjust(self, ranks: int) -> None:
        self.num_features //= ranks


def parallel_batch_norm(layer: nn.BatchNorm2d, *arguments: Any) -> ParallelBatchNorm2d:
    """``layer`` as a :class:`ParallelBatchNorm2d`; one of a subclass, such as BatchNorm with an activation, keeps the
    forward pass of its class, and its children."""
    kind: Any = type(layer)
    return _parallel_batch_norm_class(kind)(layer, *arguments)


@functools.cache
def _parallel_batch_norm_class(kind: Any) -> Any:
    if kind is nn.BatchNorm2d:
        return ParallelBatchNorm2d
    return type(f"Parallel{kind.__name__}", (ParallelBatchNorm2d, kind), {})


class ParallelDropout(nn.Dropout, ShardedLayer):
    """Dropout of split channels, which are dimension 1. No communication.

    Each rank draws, from torch's random state of its device, what one device would drop of all channels, and takes its
    own of them. So ranks seeded alike drop the same at every P > 1, on the CPU what one device drops; and where the
    state is set back, as activation checkpointing does, so is what is dropped. The draw takes the memory of all
    channels for a moment.
    """

    __init__ = ShardedLayer.__init__

    def forward(self, x: Tensor) -> Tensor:
        if self.tp_world_size == 1 or not self.training or self.p == 0:
            return super().forward(x)
        batch, channels, *map_size = x.shape
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)  # values are drawn in memory's order
        whole = torch.empty(
            (batch, channels * self.tp_world_size, *map_size),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last if last else torch.contiguous_format,
        ).bernoulli_(1 - self.p)
        kept = whole.narrow(1, channels * self.tp_index, channels)
        scaled = kept.div_(1 - self.p) if self.p < 1 else kept
        return x.mul_(scaled) if self.inplace else x * scaled


class RowParallelLinear(nn.Linear, ShardedLayer):
    """The head: (B, n / P) features of each rank -> (B, C) logits, summed over the ranks; the bias is added once."""

    __init__ = ShardedLayer.__init__

    def _adjust(self, ranks: int) -> None:
        self.local_features = self.in_features // ranks

    def forward(self, x: Tensor) -> Tensor:
        logits = sum_partials(F.linear(x, self.weight), self.coarse_group_name)
        return logits if self.bias is None else logits + self.bias


LAYERS: dict[str, Any] = {
    "column": ColumnParallelConv2d,
    "grouped": ParallelGroupConv2d,
    "two-level": ParallelTwoLevelConv2d,
    "prototype": ParallelTwoLevelPrototypeConv2d,
    "shuffle": ParallelShuffleConv2d,
    "gathered": GatheredConv2d,
    "channels": parallel_batch_norm,
    "dropout": ParallelDropout,
    "row": RowParallelLinear,
}
"""Kind of placement -> what makes the layer that carries it out."""


def collect_checkpoint_info(model: nn.Module) -> None:
    """Marks a split model as DeepSpeed marks its own: nothing left to search for, and every split described."""
    model.ds_autotp_parsed = True  # type: ignore[assignment]
    setattr(model, UNIVERSAL_CHECKPOINT_INFO, collect_autotp_universal_checkpoint_info(model))
