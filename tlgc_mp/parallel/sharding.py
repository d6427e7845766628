"""Splitting a single-device model over the ranks of a process group, and putting it together again."""

from __future__ import annotations

import datetime

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tlgc_mp.errors import UsageError, must_be
from tlgc_mp.host import host_on_network
from tlgc_mp.nn import FullyLearnableGroupConv2d
from tlgc_mp.nn.arguments import check_device, check_module
from tlgc_mp.nn.init import check_drawable, draw_by_blocks, draw_whole, drawn_by_blocks
from tlgc_mp.parallel.collectives import is_gloo
from tlgc_mp.parallel.joins import agreed_joins
from tlgc_mp.parallel.layers import make_root, shard_layer
from tlgc_mp.parallel.layout import Layout, Ranks, new_group
from tlgc_mp.parallel.plan import Placement, goes_plain, plan
from tlgc_mp.parallel.replicas import agree_on_model, watch_replicas
from tlgc_mp.parallel.report import static_report
from tlgc_mp.parallel.sharded import EXTRA, Region, ShardedLayer, extra_state, zero3_gathered
from tlgc_mp.parallel.split_tensor import whole
from tlgc_mp.parallel.waiting import as_timeout

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)
"""How long a rank waits for the others in one coarse collective before it gives up with an error."""


def shard(
    model: nn.Module,
    process_group: dist.ProcessGroup | None = None,
    *,
    device: torch.device | str | None = None,
    seed: int | None = None,
    timeout: datetime.timedelta | float = COLLECTIVE_TIMEOUT,
    data_parallel_group: dist.ProcessGroup | None = None,
    sample_inputs: object = None,
) -> nn.Module:
    """Splits ``model`` over the ranks of ``process_group``, in place, layer by layer. Collective.

    Works under plain torch.distributed; :func:`tlgc_mp.initialize` does it inside a DeepSpeed engine. Every rank passes
    the same whole model, and afterwards holds its share; where values differ, the first rank's are taken, with a
    warning. Any network that runs on one device gives the same outputs and gradients: inputs and outputs are whole and
    plain, and what lies between looks whole to the model's code
    (:class:`~tlgc_mp.parallel.split_tensor.SplitTensor`). ``model.layout`` says how each layer is held, and
    :func:`~tlgc_mp.parallel.layout_report` what a step sends. Parameters are new objects, so build the optimizer
    afterwards.

    Args:
        model: with its values, of which each rank keeps its share; or on the meta device, where each rank draws only
            its share, from ``seed``.
        process_group: the tensor-parallel ranks, in the order of their shares; the default group where not given.
        device: where the shares live; the model's own device where not given (the CPU for the meta device).
        seed: of the initial weights of a model on the meta device; the first rank's ``torch.initial_seed()`` where
            not given. Not used otherwise.
        timeout: how long a rank waits for the others in a forward or backward pass, as a timedelta or in seconds,
            before it raises an error that names who is missing.
        data_parallel_group: the ranks that hold the same share, one of each replica. Only ``nn.SyncBatchNorm`` asks for
            them, and only where there are other ranks than those of ``process_group``.
        sample_inputs: a tensor, or a tuple of what ``model`` takes, of which only shapes and types are looked at; the
            same on every rank. A copy of ``model`` then runs once on the meta device, and parameters that meet joined
            channels (DenseNet, Inception, U-Net) are cut as those lie. It saves collectives and changes no number.

    Returns:
        ``model``.

    Raises:
        UsageError: torch.distributed is not initialized, an argument is of another kind, ``data_parallel_group`` is
            needed and not given, the ranks pass models of other tensors, or a module on the meta device has parameters
            or buffers that nothing gives values. Later, in training, a forward pass raises one where the ranks have
            come to differ in their inputs, their random state or what each holds whole (``replicas.py``).
    """
    split_model(
        model,
        process_group,
        device=device,
        seed=seed,
        timeout=timeout,
        data_parallel_group=data_parallel_group,
        sample_inputs=sample_inputs,
    )
    region: Region = model.tlgc_region  # type: ignore[assignment]
    region.in_engine = False
    marked: set[int] = set()
    for module in model.modules():
        if region.ranks.size > 1 and isinstance(module, ShardedLayer):
            module.tlgc_mark_gradients(marked)
    return model


def split_model(
    model: nn.Module,
    process_group: dist.ProcessGroup | None,
    *,
    device: torch.device | str | None,
    seed: int | None,
    timeout: datetime.timedelta | float,
    data_parallel_group: dist.ProcessGroup | None,
    sample_inputs: object,
) -> nn.Module:
    """:func:`shard` for an engine, which takes norms of shares and adds them up over the ranks by itself."""
    check_module("model", model)
    check_device(device)
    if seed is not None and not isinstance(seed, int):
        raise must_be("seed", "an int", seed)
    if not dist.is_initialized():
        raise UsageError("torch.distributed must be initialized; call torch.distributed.init_process_group first")
    group = process_group if process_group is not None else dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise must_be("process_group", "a group that this rank is in", group)
    bound = as_timeout("timeout", timeout)
    members = dist.get_process_group_ranks(group)
    coarse_group = new_group(members, bound)
    drawn_from = agree_on_model(model, coarse_group, seed)
    ranks = Ranks(coarse_group)
    placements = plan(model, ranks.size)
    if sample_inputs is not None:
        alike = [coarse_group, *([] if data_parallel_group is None else [data_parallel_group])]
        placements = agreed_joins(model, placements, sample_inputs, alike)
    replicas = _replicas(model, members, data_parallel_group)
    over_network = _lie_on_several_hosts(coarse_group)
    region = Region(ranks, Ranks(group), goes_plain(model, placements), replicas, over_network)
    check_drawable(model)
    _check_memory(model)
    target = None if device is None else torch.device(device)
    split_layers(model, placements, region, target, drawn_from)
    watch_replicas(model, ranks, bound)
    return model


def _lie_on_several_hosts(group: dist.ProcessGroup) -> bool:
    """Whether the ranks of ``group`` lie on several hosts, if it is Gloo's; the same on every rank. Collective."""
    if not is_gloo(group):
        return False
    hosts: list[object] = [None] * dist.get_world_size(group)
    dist.all_gather_object(hosts, host_on_network(), group=group)
    return len(set(hosts)) > 1


def _check_memory(model: nn.Module) -> None:
    """Refuses a trained parameter that shares memory with another parameter or a buffer: a step of one would move the
    other on one device, and of shares, which are copies, it would not.

    Raises:
        UsageError: naming both.
    """
    parameters = dict(model.named_parameters())
    spans = []
    for name, tensor in (*parameters.items(), *model.named_buffers()):
        if not is_lazy(tensor) and tensor.layout == torch.strided and not tensor.is_meta and tensor.numel():
            steps = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            spans.append((start, start + (steps + 1) * tensor.element_size(), name))
    spans.sort()
    end, last = 0, ""
    for start, stop, name in spans:
        if start < end and any(each in parameters and parameters[each].requires_grad for each in (last, name)):
            raise UsageError(
                f"{last} and {name} must be one parameter or have memory of their own, got two tensors that share it; "
                "assign one parameter to both, or clone one"
            )
        if stop > end:
            end, last = stop, name


def _replicas(model: nn.Module, members: list[int], group: dist.ProcessGroup | None) -> Ranks | None:
    """The ranks over which synchronized layers of ``model`` take their statistics: one of each replica."""
    layers = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    if not layers:
        return None
    given: list[dist.ProcessGroup | None] = [group] if group is not None else [layer.process_group for layer in layers]
    if any(each is None for each in given):
        if len(members) < dist.get_world_size():
            raise UsageError(
                "data_parallel_group must be the ranks that hold the same share of other replicas, got None; "
                "SyncBatchNorm takes its statistics over them"
            )
        return Ranks(new_group([dist.get_rank()]))
    for each in given:
        ranks = dist.get_process_group_ranks(each)
        if len(set(ranks) & set(members)) > 1 or ranks != dist.get_process_group_ranks(given[0]):
            raise UsageError(
                f"data_parallel_group must be ranks of one share, for every SyncBatchNorm the same, got {ranks}; "
                f"the ranks {members} share one replica"
            )
    return Ranks(given[0])


def split_layers(
    model: nn.Module,
    placements: dict[str, Placement],
    region: Region,
    device: torch.device | None,
    seed: int | None = None,
) -> None:
    """Has every layer of ``model`` hold its share, in place. No communication.

    Args:
        seed: of the values that tensors on the meta device get; without one, they get none.
    """
    region.report = static_report(model, placements, region.ranks.size)
    shares: dict[tuple[int, Layout], Tensor] = {}
    made: dict[int, Tensor] = {}
    # Both are by the ids of tensors, which must not be given to others as long as they are looked up.
    alive = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_meta]
    for name, placement in placements.items():
        layer = model.get_submodule(name)
        meta = any(tensor.is_meta for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)))
        by_blocks = drawn_by_blocks(layer) and placement.segments is None
        if meta and seed is not None and not by_blocks:
            draw_whole(name, layer, seed, made)
        shard_layer(layer, placement, region, device, shares)
        if meta and seed is not None and by_blocks:
            with region.set_plain(True):
                draw_by_blocks(name, layer, seed, region.ranks.rank)
    del alive
    make_root(model, region)
    if not hasattr(model, "layout"):
        model.layout = region.report  # type: ignore[assignment]


@torch.no_grad()
def gather_state_dict(model: nn.Module, *, keep: bool = True) -> dict[str, object]:
    """The state dict of the whole model, whatever its split over tensor-parallel ranks and by ZeRO. Collective.

    It loads into the single-device model. One layer is assembled at a time.

    Args:
        keep: whether this rank wants it; one that only helps the others gets an empty dict, and holds one tensor.
    """
    check_module("model", model)
    state: dict[str, object] = {}
    first: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        own = _own_state(module)
        if id(module) in first:
            state |= {prefix + key: state[first[id(module)] + key] for key in own if keep}
            continue
        first[id(module)] = prefix
        with zero3_gathered(list(module.parameters(recurse=False))):
            for key, value in own.items():
                if isinstance(module, ShardedLayer) and key != EXTRA:
                    value = module.tlgc_gather_whole(key)
                elif isinstance(value, Tensor):
                    value = whole(value.detach()).clone()
                if keep:
                    state[prefix + key] = value
    return state


def effective_parameters(model: nn.Module) -> int:
    """Parameters of ``model``, on one device or partitioned by ZeRO. Collective at ZeRO 3.

    Of a fully learnable group convolution those count that its groups leave now.
    """
    total = 0
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        with zero3_gathered(own):
            if isinstance(module, FullyLearnableGroupConv2d):
                total += module.effective_parameters
            else:
                total += sum(param.numel() for param in own)
    return total


def _own_state(module: nn.Module) -> dict[str, object]:
    """What ``module.state_dict()`` holds of the module itself, without its children."""
    transient = module._non_persistent_buffers_set
    entries = {**module._parameters, **{k: v for k, v in module._buffers.items() if k not in transient}}
    return {**{key: value for key, value in entries.items() if value is not None}, **extra_state(module)}
