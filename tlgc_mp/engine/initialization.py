"""A DeepSpeed engine whose model is split over tensor-parallel ranks.

The split uses the engine's own hook for tensor parallelism: with ``tensor_parallel.autotp_size`` in its configuration
the engine makes the groups, checks that the ranks of a replica see the same batch, and sums gradient norms over them.
The split layers become subclasses of its ``TensorParallel_Layer`` (``membership.py``).
"""

from __future__ import annotations

import datetime
import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, cast

from tlgc_mp.engine.config import Config, check_values, read_config, tensor_parallel_size, zero_stage
from tlgc_mp.engine.quiet import quiet_start
from tlgc_mp.engine.start import barrier, start_distributed
from tlgc_mp.errors import UsageError, must_be
from tlgc_mp.json_types import JsonObject
from tlgc_mp.parallel.topology import Topology

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from deepspeed.runtime.dataloader import DeepSpeedDataLoader
    from torch import nn
    from torch.optim import Optimizer
    from torch.utils.data import Dataset

    from tlgc_mp.engine.arguments import Parameters
    from tlgc_mp.engine.protocols import Engine, Scheduler


def initialize(
    args: object = None,
    model: nn.Module | None = None,
    optimizer: Optimizer | Callable[..., Optimizer] | None = None,
    model_parameters: Parameters | None = None,
    training_data: Dataset[object] | None = None,
    lr_scheduler: Scheduler | Callable[..., Scheduler] | None = None,
    distributed_port: int = 29500,
    dist_init_required: bool | None = None,
    collate_fn: Callable[..., object] | None = None,
    config: Config | None = None,
    config_params: Config | None = None,
    *,
    seed: int | None = None,
    collective_timeout: datetime.timedelta | float | None = None,
    sample_inputs: object = None,
) -> tuple[DeepSpeedEngine, Optimizer, DeepSpeedDataLoader | None, Scheduler | None]:
    """Splits ``model`` over P tensor-parallel ranks and returns what ``deepspeed.initialize`` returns.

    Takes what ``deepspeed.initialize`` takes, less ``mpu`` and ``mesh_param``: the groups come from
    ``tensor_parallel.autotp_size`` (P; 1 where it is missing) in the configuration. The world is P x D ranks, P
    consecutive ones to a replica, and ``train_batch_size`` counts the batch over the D replicas.

    Args:
        model: a single-device model, the same on every rank; built on the meta device, no rank ever holds more than
            its share.
        optimizer: a callable from parameters to a torch optimizer, or a torch optimizer over ``model``'s parameters
            that has not stepped yet; it then steps the shares.
        model_parameters: parameters of ``model``, or groups of them, to train; all where not given.
        lr_scheduler: a scheduler, or a callable from the optimizer to one; the engine steps it after each step of the
            optimizer. One that wants a metric is for a loop of the user's to step: made over
            ``engine.basic_optimizer``, and not given here.
        config: a DeepSpeed configuration, as a dict or a path.
        seed: of the initial weights of a model on the meta device; that of the random state of
            each replica's first rank where not given.
        collective_timeout: how long a rank waits for the others of its replica in a forward or backward pass before it
            raises an error that names those that are missing: seconds, or a ``timedelta``; 10 minutes where not given.
        sample_inputs: as in :func:`tlgc_mp.shard`: spares models that join channels some collectives.

    Returns:
        (engine, optimizer, dataloader, lr_scheduler).

    Raises:
        UsageError: an argument is of another kind, the configuration cannot be read or holds values that DeepSpeed
            refuses, P does not divide the world size, a layer cannot be split over P ranks, or a module on the meta
            device has parameters or buffers that nothing gives values.
    """
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator

    from tlgc_mp.engine import memory_format
    from tlgc_mp.engine.arguments import (
        OwnCode,
        check_kinds,
        is_own_error,
        keep_optimizer,
        match_statistics,
        retarget,
        retarget_optimizer,
    )
    from tlgc_mp.engine.first_batch import check_first_batch
    from tlgc_mp.engine.gradients import forget_gradients
    from tlgc_mp.engine.groups import enter_groups, keep_groups
    from tlgc_mp.engine.membership import check_names, join
    from tlgc_mp.engine.scalars import ScalarsAsBytes, clip_scalars_too
    from tlgc_mp.engine.schedules import check_steps_alone
    from tlgc_mp.nn.arguments import check_module
    from tlgc_mp.nn.init import materialize
    from tlgc_mp.parallel.elementwise import check_elementwise
    from tlgc_mp.parallel.plan import channels_stay_apart
    from tlgc_mp.parallel.sharding import COLLECTIVE_TIMEOUT, split_model
    from tlgc_mp.parallel.waiting import as_timeout

    given = config if config is not None else config_params
    if given is None:
        given = getattr(args, "deepspeed_config", None)
    if given is None:
        raise must_be("config", "a dict, or the path of a JSON file", None)
    check_module("model", model)
    assert model is not None
    check_kinds(optimizer, model_parameters, lr_scheduler, distributed_port, seed)
    timeout = as_timeout("collective_timeout", COLLECTIVE_TIMEOUT if collective_timeout is None else collective_timeout)
    settings = read_config(given)
    settings.setdefault("gradient_clipping", 0.0)  # DeepSpeed clips to 1 where nothing is said
    settings.setdefault("zero_force_ds_cpu_optimizer", False)  # DeepSpeed offloads no optimizer but its own else
    ranks = tensor_parallel_size(settings) or 1
    stage = zero_stage(settings)
    check_values(settings)
    start_distributed(distributed_port)
    Topology(torch.distributed.get_world_size(), torch.distributed.get_rank(), ranks)
    device = torch.device(get_accelerator().current_device_name())

    if ranks > 1 and isinstance(optimizer, torch.optim.Optimizer):
        check_elementwise(optimizer, ranks)
    before = dict(model.named_parameters())
    mpu = enter_groups(ranks)
    if mpu is not None:
        replicas = mpu.get_data_parallel_group()
        group = mpu.get_tensor_model_parallel_group()
        check_names(model, ranks)
        model = split_model(
            model,
            group,
            device=device,
            seed=seed,
            timeout=timeout,
            data_parallel_group=replicas,
            sample_inputs=sample_inputs,
        )
        join(model)
    elif any(tensor.is_meta for tensor in (*before.values(), *model.buffers())):
        materialize(model, device, torch.initial_seed() if seed is None else seed)
    after = dict(model.named_parameters())
    replaced = {id(param): after[name] for name, param in before.items()}
    _check_settings(settings, mpu)

    # DeepSpeed broadcasts and flattens parameters as contiguous bytes.
    filters = memory_format.channels_last_filters(model)
    for param in model.parameters():
        param.data = param.data.flatten().view(param.shape)
    with quiet_start():
        own_optimizer, own_scheduler = (
            OwnCode(code) if callable(code) else code
            for code in (retarget_optimizer(optimizer, replaced), lr_scheduler)
        )
        own_parameters = retarget(model_parameters, replaced)
        try:
            with ScalarsAsBytes():
                made = deepspeed.initialize(
                    model=model,
                    optimizer=own_optimizer,
                    model_parameters=own_parameters,
                    training_data=training_data,
                    lr_scheduler=own_scheduler,
                    mpu=mpu,
                    dist_init_required=dist_init_required,
                    collate_fn=collate_fn,
                    config=settings,
                )
        except UsageError:
            raise
        except _refusals() as error:
            if is_own_error(error, own_optimizer, own_scheduler):
                raise
            raise _refused(error) from error
    engine: Engine = made[0]
    for kind, stepped in (("optimizer", getattr(engine, "basic_optimizer", None)), ("lr_scheduler", made[3])):
        if stepped is not None:
            check_steps_alone(kind, stepped)
            if ranks > 1 and kind == "optimizer":
                check_elementwise(stepped, ranks)
    keep_optimizer(engine)
    forget_gradients(engine)
    match_statistics(engine.module)
    if stage == 0:
        memory_format.restore(filters)
        clip_scalars_too(engine)
        if engine.dp_world_size == 1:
            # Else all gradients are copied into a buffer, and back, around an all-reduce over one rank.
            engine.enable_backward_allreduce = False
    elif not channels_stay_apart(model):  # the others turn their images to channels_last themselves
        memory_format.follow(engine.module, filters)
    keep_groups(engine)
    engine.save_16bit_model = functools.partial(_save_16bit_model, engine)
    if mpu is not None:
        check_first_batch(engine, mpu.get_tensor_model_parallel_group())
    return cast("tuple[DeepSpeedEngine, Optimizer, DeepSpeedDataLoader | None, Scheduler | None]", made)


def _save_16bit_model(
    engine: Engine,
    save_dir: str,
    save_filename: str = "pytorch_model.bin",
    exclude_frozen_parameters: bool = False,
) -> bool:
    """The engine's ``save_16bit_model``, of the whole model: it loads into the single-device one. Collective.

    DeepSpeed's own writes rank 0's share below ZeRO 3, and rank 0's share of BatchNorm's statistics at ZeRO 3. This
    one is as whole at every stage, and needs no ``stage3_gather_16bit_weights_on_model_save``.
    """
    import torch

    from tlgc_mp.parallel.sharding import gather_state_dict

    writes = torch.distributed.get_rank() == 0
    state = gather_state_dict(engine.module, keep=writes)
    if writes:
        parameters = engine.module.named_parameters(remove_duplicate=False)
        frozen = {name for name, param in parameters if not param.requires_grad}
        kept = {name: value for name, value in state.items() if not (exclude_frozen_parameters and name in frozen)}
        os.makedirs(save_dir, exist_ok=True)
        path = os.path.join(save_dir, save_filename)
        torch.save(kept, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    barrier()
    return True


def _check_settings(settings: JsonObject, mpu: ModuleType | None) -> None:
    """Lets DeepSpeed read the configuration once, to turn what it refuses into one line."""
    from deepspeed.runtime.config import DeepSpeedConfig

    with quiet_start():
        try:
            DeepSpeedConfig(dict(settings), mpu)
        except _refusals() as error:
            raise _refused(error) from None


def _refusals() -> tuple[type[Exception], ...]:
    """What DeepSpeed raises for a configuration that it does not take."""
    from deepspeed.runtime.config import DeepSpeedConfigError
    from deepspeed.runtime.zero.utils import ZeRORuntimeException

    of_paths = FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError  # of a monitor, say
    of_values = AssertionError, AttributeError, KeyError, TypeError, ValueError
    return DeepSpeedConfigError, ZeRORuntimeException, *of_paths, *of_values


def _refused(error: Exception) -> UsageError:
    reason = " ".join(str(error).split())
    return UsageError(f"deepspeed_config must be one that DeepSpeed accepts, got an error: {reason[:600]}")
