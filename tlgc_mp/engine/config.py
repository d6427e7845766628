"""A DeepSpeed configuration: read, and checked for what this project needs of it. Imports no deepspeed."""

from __future__ import annotations

import copy
import difflib
import importlib.util
import os
from collections.abc import Mapping
from typing import TypeAlias, cast

from tlgc_mp.errors import UsageError, is_count, is_number, must_be, shown
from tlgc_mp.json_types import Json, JsonObject

Config: TypeAlias = "str | os.PathLike[str] | Mapping[str, object]"
"""As callers give it: a path, or what a JSON file could hold."""


def read_config(config: Config) -> JsonObject:
    """A copy of a configuration given as a mapping, or as the path of a JSON file (HJSON, as DeepSpeed reads it).

    Raises:
        UsageError: it is neither, or the file is missing, is not JSON, repeats a key, or is empty, or does not hold an
            object.
    """
    if isinstance(config, Mapping):
        try:
            return cast(JsonObject, copy.deepcopy(dict(config)))
        except Exception as error:  # too deep, or an object in it that is not to be copied
            raise UsageError(f"config must be what a JSON file can hold, got an error in copying it: {error}") from None
    if not isinstance(config, str | os.PathLike):
        raise must_be("config", "a dict, or the path of a JSON file", config)
    import hjson

    path = os.fspath(config)
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited on
        raise UsageError(f"deepspeed_config must be a JSON file, got {path!r}, which is not a plain file")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except OSError as error:
        raise UsageError(f"deepspeed_config must be a JSON file, got {path!r}: {error.strerror}") from None
    except ValueError as error:  # no UTF-8, or no path
        raise UsageError(f"deepspeed_config must be a JSON file, got {path!r}: {error}") from None
    try:
        settings = hjson.loads(text, object_pairs_hook=_unique)
    except UsageError:
        raise
    except Exception as error:  # of a number too large, too long or too deep it makes errors of all kinds
        reason = (str(error).splitlines() or ["it cannot be parsed"])[0]
        raise UsageError(f"deepspeed_config must be a JSON file, got {path!r}: {reason}") from None
    if not isinstance(settings, dict) or (not settings and "{" not in text):  # HJSON takes an empty file for {}
        raise UsageError(f"deepspeed_config must hold a JSON object, got none in {path!r}; write {{...}}")
    return settings


def _unique(pairs: list[tuple[str, Json]]) -> JsonObject:
    found: JsonObject = {}
    for key, value in pairs:
        if key in found:
            raise UsageError(f"deepspeed_config must have each key once, got {key!r} twice; keep one")
        found[key] = value
    return found


def check_values(settings: Mapping[str, object]) -> None:
    """Refuses what DeepSpeed passes over, or takes unseen and then fails on.

    Raises:
        UsageError: ``gradient_clipping``, ``gradient_predivide_factor`` or ``steps_per_print`` is not such a number, or
            ``scheduler.type`` is one that wants a metric, or ``optimizer.type`` one that takes norms of whole
            parameters where P > 1, a name is mistyped, a switch is text, or a monitor's library is not installed.
    """
    optimizer = settings.get("optimizer")
    kind = optimizer.get("type") if isinstance(optimizer, Mapping) else None
    if isinstance(kind, str) and kind.lower() in _OF_WHOLE_PARAMETERS and (tensor_parallel_size(settings) or 1) > 1:
        raise UsageError(
            f"optimizer.type in the DeepSpeed configuration must be one that updates each element by itself where "
            f"tensor-parallel ranks hold a share of each parameter, got {shown(kind)}; use SGD, Adam or AdamW"
        )
    scheduler = settings.get("scheduler")
    if isinstance(scheduler, Mapping) and scheduler.get("type") == "ReduceLROnPlateau":
        raise UsageError(
            'scheduler.type in the DeepSpeed configuration must be one that needs no metric, got "ReduceLROnPlateau"; '
            "use WarmupLR or WarmupDecayLR, or leave it out"
        )
    for key in settings.keys() - _NAMES:
        near = difflib.get_close_matches(str(key), _NAMES, n=1, cutoff=0.85)
        if near:
            raise UsageError(f"the DeepSpeed configuration must have no {key!r}, which means nothing; use {near[0]}")
    for name, package in (("wandb", "wandb"), ("comet", "comet_ml")):
        monitor = settings.get(name)
        if isinstance(monitor, Mapping) and monitor.get("enabled") and importlib.util.find_spec(package) is None:
            raise UsageError(
                f"{name} in the DeepSpeed configuration needs {package}, which is not installed; pip install {package}"
            )
    for name in (*_HALVES, "torch_autocast"):
        kind = settings.get(name)
        enabled = kind.get("enabled") if isinstance(kind, Mapping) else None
        if isinstance(enabled, str):  # which is true, whatever it says
            raise UsageError(
                f"{name}.enabled in the DeepSpeed configuration must be true or false, got {shown(enabled)}; write it "
                "without quotes"
            )
    for key, least, what in _NUMBERS:
        value = settings.get(key)
        whole = key == "steps_per_print"
        if value is not None and not (is_number(value, whole) and least <= value < float("inf")):
            raise UsageError(f"{key} in the DeepSpeed configuration must be {what}, got {shown(value)}; leave it out")


_HALVES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16"}
"""The sections that have DeepSpeed keep the weights in another type: -> that type."""

_NAMES = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "steps_per_print"),
    *("optimizer", "scheduler", "gradient_clipping", "prescale_gradients", "gradient_predivide_factor"),
    *("zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "tensor_parallel"),
    *("fp16", "bf16", "bfloat16", "torch_autocast", "data_types", "communication_data_type", "sparse_gradients"),
    *("tensorboard", "csv_monitor", "wandb", "comet", "comms_logger", "flops_profiler", "wall_clock_breakdown"),
    *("activation_checkpointing", "checkpoint", "compile", "aio", "dataloader_drop_last", "memory_breakdown"),
}
"""What a configuration says at its head: a name that is nearly one of them is a slip, which DeepSpeed passes over."""

_OF_WHOLE_PARAMETERS = ("lamb", "onebitlamb", "muon", "adafactor")

_NUMBERS = (
    ("gradient_clipping", 0.0, "0 or more"),
    ("gradient_predivide_factor", 1e-30, "a positive number"),
    ("steps_per_print", 1, "1 or more"),
)


def tensor_parallel_size(settings: Mapping[str, object]) -> int | None:
    """P as the configuration gives it (``tensor_parallel.autotp_size``), or ``None`` where it does not.

    Raises:
        UsageError: it is there and is not a positive int.
    """
    section = settings.get("tensor_parallel")
    if section is None:
        return None
    if not isinstance(section, Mapping):
        raise UsageError(
            f'tensor_parallel in the DeepSpeed configuration must be {{"autotp_size": P}}, got {shown(section)}'
        )
    size = section.get("autotp_size", 0)
    if not is_count(size, 0):
        raise UsageError(
            f"tensor_parallel.autotp_size in the DeepSpeed configuration must be 1 or more, got {shown(size)}"
        )
    return size or None


def section(settings: Mapping[str, Json], name: str) -> Mapping[str, Json]:
    """A section of a configuration; empty where there is none."""
    found = settings.get(name)
    return found if isinstance(found, Mapping) else {}


def zero_stage(settings: Mapping[str, object]) -> int:
    """The ZeRO stage of a configuration; 0 where it does not say.

    Raises:
        UsageError: it is none of 0, 1, 2, 3.
    """
    section = settings.get("zero_optimization", {})
    stage = section.get("stage", 0) if isinstance(section, Mapping) else section
    if not is_count(stage, 0) or stage > 3:
        raise UsageError(
            f"zero_optimization.stage in the DeepSpeed configuration must be 0, 1, 2 or 3, got {shown(stage)}"
        )
    return int(stage)


def dtype_of(config: Mapping[str, Json]) -> str:
    """In what the network computes."""
    kept = next((dtype for name, dtype in _HALVES.items() if section(config, name).get("enabled")), "float32")
    autocast = section(config, "torch_autocast")
    return f"{kept} with autocast to {autocast.get('dtype', 'bfloat16')}" if autocast.get("enabled") else kept
