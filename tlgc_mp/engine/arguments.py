"""What a user hands to :func:`tlgc_mp.initialize`: checked, pointed at the shares, and told from DeepSpeed's."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias, TypeVar

import torch
from torch import nn

from tlgc_mp.engine.protocols import Engine
from tlgc_mp.engine.schedules import check_steps_alone
from tlgc_mp.errors import UsageError, is_count, must_be
from tlgc_mp.parallel.elementwise import Group

Parameters: TypeAlias = Iterable[torch.Tensor] | Iterable[Group]
"""Of an optimizer: parameters, or groups of them."""
T = TypeVar("T")


def retarget(parameters: Parameters | None, replaced: dict[int, nn.Parameter]) -> list[object] | None:
    """``model_parameters`` (parameters, or groups of them) with every whole parameter replaced by its share."""
    if parameters is None:
        return None
    items = list(parameters)
    return [
        {**item, "params": retarget(item["params"], replaced)}
        if isinstance(item, dict)
        else replaced.get(id(item), item)
        for item in items
    ]


def retarget_optimizer(optimizer: T, replaced: dict[int, nn.Parameter]) -> T:
    """``optimizer`` over the shares; a callable is passed on, to be called with them.

    Raises:
        UsageError: it has stepped, holds state of the whole parameters that it does not make again, or has parameters
            that are not the model's, which an engine neither clears nor adds up over replicas.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    if any("step" in state and not _is_zero(state["step"]) for state in optimizer.state.values()):
        raise UsageError(
            "optimizer must be one that has not stepped, got one that has, on the whole model; give a new one, or a "
            "callable"
        )
    of_model = {id(param) for param in replaced.values()}
    for group in optimizer.param_groups:
        group["params"] = retarget(group["params"], replaced)
        foreign = [param for param in group["params"] if id(param) not in of_model]
        if foreign:
            raise UsageError(
                f"optimizer must be over parameters of the model alone, got one of shape {tuple(foreign[0].shape)} "
                "that is none of them; make it a parameter of the model, or step it with an optimizer of its own"
            )
    if optimizer.state:  # Adagrad makes its own when it is made
        kind: Callable[..., torch.optim.Optimizer] = type(optimizer)
        try:
            state = kind([dict(group) for group in optimizer.param_groups], **optimizer.defaults).state
        except TypeError:
            raise UsageError(
                f"optimizer must hold no state of the whole parameters, got a {type(optimizer).__name__} that does; "
                "give a callable that makes it"
            ) from None
        optimizer.state = state
    return optimizer


def _is_zero(step: torch.Tensor | float) -> bool:
    return (isinstance(step, torch.Tensor) and step.is_meta) or float(step) == 0


def keep_optimizer(engine: Engine) -> None:
    """Has ZeRO step the optimizer that schedulers and users know.

    DeepSpeed puts a new Adagrad over its flat parameters into the place of one that it is given, without the settings
    of groups, which no scheduler reaches.
    """
    basic, zero = getattr(engine, "basic_optimizer", None), engine.optimizer
    if isinstance(basic, torch.optim.Adagrad) and zero is not basic and zero.optimizer is not basic:
        basic.state = zero.optimizer.state
        zero.optimizer = basic
        if hasattr(zero, "_link_all_hp_params"):  # ZeRO 1 and 2, which have done so for the groups of theirs
            zero._link_all_hp_params()


def check_kinds(optimizer: object, model_parameters: object, lr_scheduler: object, port: object, seed: object) -> None:
    """Refuses arguments of which DeepSpeed would make something else, or an error of its own."""
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer) and not callable(optimizer):
        raise must_be("optimizer", "a torch optimizer, or a callable that makes one", optimizer)
    if lr_scheduler is not None and not hasattr(lr_scheduler, "step") and not callable(lr_scheduler):
        raise must_be("lr_scheduler", "a scheduler, or a callable that makes one", lr_scheduler)
    for name, given in (("optimizer", optimizer), ("lr_scheduler", lr_scheduler)):
        if hasattr(given, "step") and not isinstance(given, type):
            check_steps_alone(name, given)
    if model_parameters is not None:
        if isinstance(model_parameters, str | dict | torch.Tensor) or not isinstance(model_parameters, Iterable):
            raise must_be("model_parameters", "a list of the model's parameters, or of groups", type(model_parameters))
        if isinstance(model_parameters, Sequence):
            for item in model_parameters:
                if not isinstance(item, torch.Tensor) and not (isinstance(item, dict) and "params" in item):
                    raise must_be("model_parameters", "parameters, or groups of them with 'params'", item)
    if not is_count(port) or port > 65535:
        raise must_be("distributed_port", "1 to 65535", port)
    if seed is not None and not isinstance(seed, int):
        raise must_be("seed", "an int", seed)


def match_statistics(model: torch.nn.Module) -> None:
    """Gives the running statistics of each BatchNorm the type of its weights: bf16 and fp16 of DeepSpeed cast
    parameters alone, and BatchNorm does not take the two in different types."""
    for module in model.modules():
        weight = module._parameters.get("weight")
        if isinstance(module, torch.nn.modules.batchnorm._NormBase) and weight is not None:
            for name in ("running_mean", "running_var"):
                statistic = module._buffers[name]  # as it is stored: as an attribute a split one is a view
                if statistic is not None:
                    statistic.data = statistic.data.to(weight.dtype)


class OwnCode:
    """A callable of the user's.

    Attributes:
        error: what it raised.
    """

    def __init__(self, function: Callable[..., object]) -> None:
        self.function = function
        self.error: BaseException | None = None

    def __call__(self, *args: object, **kwargs: object) -> object:
        try:
            return self.function(*args, **kwargs)
        except Exception as error:
            self.error = error
            raise


_NOT_THE_USERS = {
    *("tlgc_mp", "deepspeed", "torch", "pydantic", "pydantic_core", "hjson", "numpy", "packaging", "einops", "tqdm"),
    *("typing_extensions", *sys.stdlib_module_names),
}


def is_own_error(error: BaseException, *given: object) -> bool:
    """Whether ``error`` came out of the user's own code, of which ``given`` are what DeepSpeed was to call: the length
    of a data set or a layer's ``to`` is called, too."""
    if any(isinstance(code, OwnCode) and code.error is error for code in given):
        return True
    modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(module.partition(".")[0] not in _NOT_THE_USERS for module in modules)
