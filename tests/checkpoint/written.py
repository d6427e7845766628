"""A small checkpoint of a run of two tensor-parallel ranks, written without an engine, and ways to spoil one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tlgc_mp.checkpoint import folder as folders
from tlgc_mp.checkpoint.reader import INDEX, Part, Piece
from tlgc_mp.models import create_model
from tlgc_mp.parallel.plan import plan

MODEL: dict[str, Any] = {
    **{"name": "wrn-10-1", "conv": "gc-2l", "groups": 4, "num_classes": 10},
    **{"coarse_everywhere": False, "coarse_kernel_size": None, "coarse_init": "he"},
}
RUN = {
    **{"model": "wrn-10-1", **{key: value for key, value in MODEL.items() if key not in ("name", "num_classes")}},
    **{"dataset": "synthetic", "image_size": 8, "recipe": "cifar", "epochs": 2, "limit_steps": None, "seed": 0},
    **{"tensor_parallel": 2, "data_parallel": 1, "zero_stage": 0, "batch_size": 128, "accumulation": 1},
    **{"learning_rate": 0.1, "departures": {}},
}
PROGRESS = {
    **{"epoch": 0, "step": 8, "steps": 8, "seconds": 1.5, "train_seconds": 1.0, "data_seconds": 0.5},
    "learning_rate": 0.1,
}
TAG = "epoch-1"
RANKS = 2


def write(run: Path, **other: Any) -> dict[str, Tensor]:
    """Writes RUN/checkpoints/epoch-1; returns the whole model's state.

    Args:
        other: what to change of :data:`MODEL`.
    """
    torch.manual_seed(0)
    arguments = {**MODEL, **other}
    model = create_model(**arguments)
    settings = {**RUN, "model": arguments["name"], **{key: arguments[key] for key in other if key != "name"}}
    dims = {f"{name}.{key}": dim for name, place in plan(model, RANKS).items() for key, dim in place.dims.items()}
    weights = dict(model.named_parameters())
    saved = weights.keys() | dict(model.named_buffers()).keys()  # each under one name
    folder = str(run / "checkpoints")
    folders.begin(folder, TAG)
    files = {}
    for rank in range(RANKS):
        tensors, index = {}, {}
        for name, value in model.state_dict().items():
            dim = dims.get(name)
            if name not in saved or (dim is None and rank > 0):
                continue
            mine = value if dim is None else value.chunk(RANKS, dim)[rank]
            part = Part(tuple(mine.shape), dim, 0 if dim is None else rank, 1 if dim is None else RANKS)
            stored = f"{'weights' if name in weights else 'buffers'}/{name}"
            tensors[stored], index[stored] = mine.contiguous(), Piece(part, 0, 0).entry()
        path = run / "checkpoints" / f"{TAG}.partial" / f"shard-{rank:02d}-00.safetensors"
        save_file(tensors, path, metadata={INDEX: json.dumps(index)})
        files[path.name] = folders.sealed(str(path))
    description = {
        "client_state": {"run": settings, "num_classes": 10, "progress": PROGRESS},
        "tensor_parallel": RANKS,
        "data_parallel": 1,
        "zero_stage": 0,
        "optimizer": {"type": "SGD", "scalars": [{}], "groups": [{"lr": 0.1}]},
        "engine": dict.fromkeys(("global_steps", "global_samples", "micro_steps", "skipped_steps"), 8),
    }
    folders.commit(folder, TAG, {**description, "files": files})
    return {name: value.clone() for name, value in model.state_dict().items()}


def describe(checkpoint: Path, change: Any) -> None:
    """Writes ``checkpoint.json`` again with its sum, as ``change`` of its contents leaves it, or as it returns them."""
    path = checkpoint / "checkpoint.json"
    description = json.loads(path.read_text())
    del description["sha256"]
    changed = change(description)
    content = description if changed is None else changed
    path.write_text(folders.description_text(content) if isinstance(content, dict) else json.dumps(content))


def reindex(checkpoint: Path, change: Any, rank: int = 0) -> None:
    """Writes a shard again, as ``change(tensors, index)`` leaves them, and its size and sum; with the metadata that
    ``change`` returns, where that is a dict."""
    path = checkpoint / f"shard-{rank:02d}-00.safetensors"
    with safe_open(path, framework="pt") as file:
        index = json.loads(file.metadata()[INDEX])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    changed = change(tensors, index)
    save_file(tensors, path, metadata=changed if isinstance(changed, dict) else {INDEX: json.dumps(index)})
    describe(checkpoint, lambda description: description["files"].update({path.name: folders.sealed(str(path))}))


def split(tensors: dict[str, Tensor], index: dict[str, Any], name: str) -> None:
    """Leaves the first half of a tensor only."""
    half = math.prod(tensors[name].shape) // 2
    tensors[name] = tensors[name].flatten()[:half].clone()
