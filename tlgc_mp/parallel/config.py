"""A DeepSpeed configuration: read, and checked for what this project needs of it. Imports no deepspeed."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from typing import Any

from tlgc_mp.errors import UsageError


def read_config(config: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a configuration given as a mapping, or as the path of a JSON file (HJSON, as DeepSpeed reads it).

    Raises:
        UsageError: the file is missing, is not JSON, repeats a key, or is empty, or does not hold an object.
    """
    if isinstance(config, Mapping):
        return copy.deepcopy(dict(config))
    import hjson

    path = os.fspath(config)
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
            settings = hjson.loads(text, object_pairs_hook=_unique)
    except OSError as error:
        raise UsageError(f"deepspeed_config={path!r} cannot be read: {error.strerror}; give a JSON file") from None
    except (hjson.HjsonDecodeError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"deepspeed_config={path!r} is not JSON: {reason}") from None
    if not isinstance(settings, dict) or (not settings and "{" not in text):  # HJSON takes an empty file for {}
        raise UsageError(f"deepspeed_config={path!r} holds no JSON object; give {{...}}")
    return settings


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise UsageError(f"deepspeed_config: the key {key!r} stands twice; keep one")
    return dict(pairs)


def tensor_parallel_size(settings: Mapping[str, Any]) -> int | None:
    """P as the configuration gives it (``tensor_parallel.autotp_size``), or ``None`` where it does not.

    Raises:
        UsageError: it is there and is not a positive int.
    """
    section = settings.get("tensor_parallel")
    if section is None:
        return None
    if not isinstance(section, Mapping):
        raise UsageError(f'tensor_parallel={json.dumps(section)} is not an object; use {{"autotp_size": P}}')
    size = section.get("autotp_size", 0)
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise UsageError(f"tensor_parallel.autotp_size={json.dumps(size)} is not a number of ranks; use 1 or more")
    return size or None


def zero_stage(settings: Mapping[str, Any]) -> int:
    """The ZeRO stage of a configuration; 0 where it does not say.

    Raises:
        UsageError: it is none of 0, 1, 2, 3.
    """
    section = settings.get("zero_optimization", {})
    stage = section.get("stage", 0) if isinstance(section, Mapping) else section
    if not isinstance(stage, int) or isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise UsageError(f"zero_optimization.stage={json.dumps(stage)} is not a ZeRO stage; use one of 0, 1, 2, 3")
    return stage
