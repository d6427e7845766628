"""Split layers as members of a DeepSpeed engine.

DeepSpeed knows tensor-parallel layers by its class ``TensorParallel_Layer``: over such it sums gradient norms, of such
it writes consolidated 16-bit saves and describes checkpoints, and where there are any it looks for no others to split.
:func:`join` has every split layer of a model become one; each keeps its class's name and its code.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO
from deepspeed.module_inject.layers import (
    TensorParallel_Layer,
    collect_autotp_universal_checkpoint_info,
    set_autotp_mode,
)
from torch import Tensor, nn

from tlgc_mp.errors import UsageError
from tlgc_mp.parallel.plan import Placement, plan
from tlgc_mp.parallel.sharded import Region, ShardedLayer, split_class

_DEEPSPEEDS = {
    *("mp_group", "tp_world_size", "tp_index", "is_tp_parallel", "support_training"),
    *(
        name
        for name, value in vars(TensorParallel_Layer).items()
        if not name.startswith("__") and (callable(value) or isinstance(value, bool | property | classmethod))
    ),
}
"""Names under which DeepSpeed keeps something in a tensor-parallel layer."""


def check_names(model: nn.Module, ranks: int) -> None:
    """Refuses layers with attributes or methods of their own that are called as DeepSpeed calls its.

    Raises:
        UsageError: naming the first.
    """
    taken = _DEEPSPEEDS - set(dir(nn.Module))
    for name in plan(model, ranks):
        layer = model.get_submodule(name)
        own = sorted(taken.intersection(dir(layer)))
        if own and not isinstance(layer, TensorParallel_Layer):
            raise UsageError(
                f"{name or 'model'}.{own[0]} of a {type(layer).__name__} must have another name, got one of "
                "DeepSpeed's tensor-parallel layers; rename it"
            )


def join(model: nn.Module) -> None:
    """Makes every split layer of ``model`` one of DeepSpeed's, in place: nothing is left to search for, and every split
    described."""
    set_autotp_mode(training=True)
    for layer in model.modules():
        if isinstance(layer, ShardedLayer):
            _join(layer)
    model.ds_autotp_parsed = True  # type: ignore[assignment]
    setattr(model, UNIVERSAL_CHECKPOINT_INFO, collect_autotp_universal_checkpoint_info(model))


def _join(layer: Any) -> None:
    names = vars(layer).copy()
    layer.__class__ = split_class(type(layer), EngineLayer)
    TensorParallel_Layer.__init__(layer, None)
    layer.__dict__.update(names)
    ranks = layer.tlgc_region.ranks
    layer.tp_world_size, layer.tp_index, layer.is_tp_parallel = ranks.size, ranks.rank, ranks.size > 1
    layer.support_training = True
    for key, param in layer._parameters.items():
        if param is not None and layer.tlgc_placement.layout(key).dim is not None:
            layer.config_tp_params(param)


class EngineLayer:
    """What the class of a split layer begins with in an engine."""

    tlgc_behind = (TensorParallel_Layer,)
    tlgc_region: Region
    tlgc_placement: Placement
    _parameters: dict[str, nn.Parameter | None]

    @property
    def mp_group(self) -> dist.ProcessGroup:
        """DeepSpeed's name for the tensor-parallel group."""
        group: dist.ProcessGroup = self.tlgc_region.tp_ranks.group
        return group

    @mp_group.setter
    def mp_group(self, group: dist.ProcessGroup) -> None:
        """It follows from the region."""

    @torch.no_grad()
    def gather_params(self, params_list: list[Tensor]) -> None:
        """Replaces each given parameter's data by the whole one. DeepSpeed calls it around a consolidated save."""
        layer: Any = self
        for param in params_list:
            key = next((key for key, own in self._parameters.items() if own is param), None)
            if key in self.tlgc_placement.dims:
                full = layer.tlgc_gather_whole(key)
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
        ranks = self.tlgc_region.ranks.size
        for key, param in layer.named_parameters(recurse=False, remove_duplicate=False):
            dim = self.tlgc_placement.dims.get(key)
            shape = list(getattr(param, "ds_shape", param.shape))  # ds_shape: before ZeRO 3 partitions it
            if dim is not None:
                share = shape[dim]
                shape[dim] *= ranks
            layer._set_param_uc_meta(
                param,
                partition_type="row" if dim == 1 else "column",
                partition_dim=dim,
                logical_shape=tuple(shape),
                original_shape=tuple(shape),
                partition_sizes=None if dim is None else (share,) * ranks,
                sub_param_shard_widths=self._tlgc_widths(key),
                is_bias=key == "bias",
                replicated=dim is None,
            )

    def _tlgc_widths(self, key: str) -> list[list[int]] | None:
        """What each rank holds of each segment of the parameter ``key``; ``None`` where it is one piece."""
        segments, ranks = self.tlgc_placement.layout(key).segments, self.tlgc_region.ranks.size
        return None if segments is None else [[segment // ranks] * ranks for segment in segments]
