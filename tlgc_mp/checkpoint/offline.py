"""What is done with a checkpoint where nothing trains: exporting its weights, and cutting it for other ranks.

Neither needs deepspeed, and what is exported needs torch and safetensors only.
"""

from __future__ import annotations

import json
import os
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tlgc_mp.checkpoint import folder as folders
from tlgc_mp.checkpoint.reader import INDEX, CheckpointReader, Index, Part, Piece
from tlgc_mp.errors import UsageError, must_be
from tlgc_mp.host import as_path
from tlgc_mp.json_types import Json
from tlgc_mp.models import create_model, fold
from tlgc_mp.models.factory import create_meta_model
from tlgc_mp.models.names import NamedModel, check_split, coarse_level_of, library_model
from tlgc_mp.nn.arguments import check_device
from tlgc_mp.parallel.layout import WHOLE, Layout
from tlgc_mp.parallel.plan import plan

_METADATA = "tlgc_mp"


def export_checkpoint(path: str, output: str, *, folded: bool = False) -> NamedModel | None:
    """Writes the weights and running statistics of a checkpoint as one safetensors file, for a single device.

    Its names are those of the model's ``state_dict``. Of a run of ``tlgc-mp train``, its metadata say which model it
    is, :func:`load_model` makes one, and how images are prepared for it; of a checkpoint that other code has saved,
    that code's model loads it. Where the run averaged its weights, it holds the averages.

    Args:
        path: a run's output folder, its folder of checkpoints, or one checkpoint.
        output: the file; replaced where it is there.
        folded: writes the weights of the model that :func:`tlgc_mp.fold` makes of it, for inference.

    Returns:
        The arguments of :func:`tlgc_mp.create_model` for this model; ``None`` for that of other code.

    Raises:
        UsageError: there is no whole checkpoint, or the file cannot be written.
    """
    output = as_path("output", output)
    reader = _reader(path)
    arguments, metadata = None, {"format": "pt"}
    own = folders.is_own(reader.description)
    if folded and not own:
        raise UsageError(
            f"folded must be left out for {path!r}, got a checkpoint of other code; tlgc_mp.fold its model"
        )
    if own:
        arguments = _arguments(folders.saved_run(*os.path.split(reader.where)), reader)
        told = {**arguments, "checkpoint": os.path.basename(reader.where), **({"folded": True} if folded else {})}
        if "images" in reader.description["client_state"]:
            told["images"] = reader.description["client_state"]["images"]
        metadata[_METADATA] = json.dumps(told)
    state = _state(reader, None if arguments is None else _check_model(arguments, reader))
    if folded and arguments is not None:
        state = fold(_filled(arguments, state, "cpu")).state_dict()
        state = {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    partial = f"{output}{folders.PARTIAL}"
    try:
        os.makedirs(os.path.dirname(os.path.abspath(output)), exist_ok=True)
        save_file(state, partial, metadata=metadata)
        folders.sealed(partial)
        os.replace(partial, output)
    except (OSError, SafetensorError) as error:
        if os.path.isfile(partial):
            os.unlink(partial)
        note = f": {getattr(error, 'strerror', None) or error}"
        raise must_be("output", "a file to write", output, note=note) from None
    return arguments


def load_model(path: str, device: torch.device | str = "cpu") -> nn.Module:
    """The model in a file that ``tlgc-mp export`` wrote, with its weights, in evaluation mode. Needs no deepspeed.

    Args:
        path: the safetensors file.
        device: where the model is to live.

    Raises:
        UsageError: the file cannot be read, or is not such a file.
    """
    path = as_path("path", path)
    check_device(device)
    return load_exported(path, device)[0]


def load_exported(path: str, device: torch.device | str) -> tuple[nn.Module, Json]:
    """(the model of :func:`load_model`, what the file says of its images; ``None`` where it says nothing)"""
    try:
        with safe_open(path, framework="pt") as file:
            arguments = json.loads((file.metadata() or {})[_METADATA])
            arguments |= coarse_level_of(dict(arguments))
            if set(arguments) - {"checkpoint", "folded", "images"} != NamedModel.__required_keys__:
                raise KeyError(_METADATA)
            folded = bool(arguments.pop("folded", False))
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise must_be("path", "a safetensors file", path, note=f": {error}") from None
    except (KeyError, ValueError, TypeError, RecursionError):
        note = ", which does not say which model it holds"
        raise must_be("path", "a file that tlgc-mp export wrote", path, note=note) from None
    arguments.pop("checkpoint", None)
    images = arguments.pop("images", None)
    try:
        model = create_meta_model(**arguments)
        model = fold(model) if folded else model
    except UsageError as error:
        raise UsageError(f"{path!r}: {error}") from None
    if odd := _difference(model, {name: tuple(value.shape) for name, value in state.items()}):
        raise must_be("path", "a file of the weights of its model", path, "export it again", note=f": {odd}")
    return _filled(arguments, state, device, folded=folded).eval(), images


def load_saved(path: str, device: torch.device | str) -> tuple[nn.Module, Json]:
    """As :func:`load_exported`, of a checkpoint of ``tlgc-mp train``."""
    reader = _reader(path)
    arguments = _arguments(folders.saved_run(*os.path.split(reader.where)), reader)
    state = _state(reader, _check_model(arguments, reader))
    return _filled(arguments, state, device).eval(), reader.description["client_state"].get("images")


def _filled(
    arguments: NamedModel, state: dict[str, Tensor], device: torch.device | str, *, folded: bool = False
) -> nn.Module:
    """The model of these arguments with the tensors of ``state``."""
    model = create_meta_model(**arguments)
    if library_model(arguments["name"]) is not None:
        # What no state dict holds, an index of positions, say, only the library's code can compute.
        model = create_model(**arguments, device=device)
    model = fold(model) if folded else model
    if library_model(arguments["name"]) is None:
        model.to_empty(device=device)
    model.load_state_dict(state)
    return model


def _state(reader: CheckpointReader, model: nn.Module | None) -> dict[str, Tensor]:
    """The state dict of a checkpoint, of what its run is judged by; ``model`` says what has several names."""
    state: dict[str, Tensor] = {}
    for kind in ("weights", "buffers"):
        for name in reader.names(kind):
            whole = Part(reader.whole_shape(f"{kind}/{name}"), None, 0, 1)
            state[name] = reader.read_mean(reader.judged_by(name, kind), whole).contiguous()
    further = {} if model is None else _further_names(model)
    return state | {name: state[first].clone() for name, first in further.items()}


def reshard_checkpoint(path: str, output: str, tensor_parallel: int) -> str:
    """Cuts a checkpoint for other tensor-parallel ranks and one replica. ``--resume`` does as much by itself.

    Args:
        path: as for :func:`export_checkpoint`.
        output: the run folder to write it to, under ``checkpoints/``.
        tensor_parallel: P.

    Returns:
        The path of the new checkpoint.

    Raises:
        UsageError: there is no whole checkpoint, the model cannot be split over P ranks, or nothing can be written.
    """
    output = as_path("output", output)
    reader = _reader(path)
    run = folders.saved_run(*os.path.split(reader.where))
    check_split(run["model"], run["conv"], run["groups"], tensor_parallel)
    arguments = _arguments(run, reader)
    model = _check_model(arguments, reader)
    layouts = _layouts(model, tensor_parallel)
    micro_batch = run["batch_size"] // (run["accumulation"] * run["data_parallel"])
    spread = {
        "tensor_parallel": tensor_parallel,
        "data_parallel": 1,
        "accumulation": run["batch_size"] // micro_batch,
    }
    description = {key: value for key, value in reader.description.items() if key not in ("format", "files")}
    description.update(tensor_parallel=tensor_parallel, data_parallel=1)
    description["client_state"] = {**reader.description["client_state"], "run": {**run, **spread}}

    folder = os.path.join(output, folders.CHECKPOINTS)
    tag = folders.free_tag(folder, os.path.basename(reader.where))
    partial = os.path.join(folder, tag + folders.PARTIAL)
    try:
        folders.begin(folder, tag)
        files = {}
        for rank in range(tensor_parallel):
            name = f"shard-{rank:02d}-00.safetensors"
            tensors, index = _share(reader, layouts, rank, tensor_parallel)
            save_file(tensors, os.path.join(partial, name), metadata={INDEX: json.dumps(index)})
            files[name] = folders.sealed(os.path.join(partial, name))
        for name in reader.description["files"]:
            if not name.endswith(".safetensors"):
                with open(os.path.join(reader.where, name), "rb") as source:
                    content = source.read()
                with open(os.path.join(partial, name), "wb") as target:
                    target.write(content)
                files[name] = folders.sealed(os.path.join(partial, name))
        folders.commit(folder, tag, {**description, "files": files})
    except (OSError, SafetensorError) as error:
        folders.abandon(folder, tag)
        note = f": {getattr(error, 'strerror', None) or error}"
        raise must_be("output", "a folder to write", folder, note=note) from None
    except BaseException:
        folders.abandon(folder, tag)
        raise
    return os.path.join(folder, tag)


def _reader(path: str) -> CheckpointReader:
    """Of the newest whole checkpoint in ``path``."""
    folder, tag = folders.find_checkpoint(path)
    if folders.is_own(folders.read_description(folder, tag)):
        folders.saved_run(folder, tag)  # before all of its bytes are read
    problem = folders.damage(folder, tag)
    if problem is not None:
        raise UsageError(f"{problem}; {folders.offer(folder, tag)}")
    return CheckpointReader(folder, tag)


def _check_model(arguments: NamedModel, reader: CheckpointReader) -> nn.Module:
    """The model of these arguments, on the meta device, where it is the one that the checkpoint holds."""
    model = create_meta_model(**arguments)
    held = {
        name: reader.whole_shape(f"{kind}/{name}") for kind in ("weights", "buffers") for name in reader.names(kind)
    }
    held |= {name: held[first] for name, first in _further_names(model).items() if first in held}
    if odd := _difference(model, held):
        raise UsageError(f"the checkpoint {reader.where!r} is not of its model {arguments['name']}: {odd}")
    return model


def _further_names(model: nn.Module) -> dict[str, str]:
    """Each further name in the state dict of a tensor that has several -> its first, under which it was saved."""
    firsts: dict[int, str] = {}
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    names = {name: firsts.setdefault(id(tensor), name) for name, tensor in tensors}
    return {name: names[name] for name in model.state_dict() if names.get(name, name) != name}


def _difference(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> str:
    """How ``shapes`` of tensors differ from the model's, in a few words; nothing where they do not."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if alone := sorted(expected.keys() ^ shapes.keys()):
        return f"only one of the two has {alone[0]}"
    unlike = next((name for name in expected if expected[name] != shapes[name]), None)
    return "" if unlike is None else f"{unlike} is {shapes[unlike]}, not {expected[unlike]}"


def _arguments(run: folders.Run, reader: CheckpointReader) -> NamedModel:
    """The arguments of :func:`create_model` for a run's model."""
    return {
        "name": run["model"],
        "num_classes": cast(int, reader.description["client_state"].get("num_classes")),
        "conv": run["conv"],
        "groups": run["groups"],
        "coarse_everywhere": run["coarse_everywhere"],
        "coarse_kernel_size": run["coarse_kernel_size"],
        "coarse_init": run["coarse_init"],
        "coarse_channels": run["coarse_channels"],
        "coarse_sum": run["coarse_sum"],
    }


def _layouts(model: nn.Module, tensor_parallel: int) -> dict[str, Layout]:
    """Name -> how a parameter or buffer is cut, of those that are."""
    if tensor_parallel == 1:
        return {}
    return {
        f"{name}.{key}" if name else key: placement.layout(key)
        for name, placement in plan(model, tensor_parallel).items()
        for key in placement.dims
    }


def _share(
    reader: CheckpointReader, layouts: dict[str, Layout], rank: int, ranks: int
) -> tuple[dict[str, Tensor], Index]:
    """(the tensors of one rank's file, where each belongs)"""
    tensors, index = {}, {}
    for tensor in reader.tensors():
        name = tensor.removeprefix("optimizer/").partition("/")[2] if tensor.startswith("optimizer/") else None
        dim, segments = layouts.get(name or tensor.partition("/")[2], WHOLE)
        if dim is None and rank > 0:
            continue
        shape = list(reader.whole_shape(tensor))
        if dim is not None:
            shape[dim] //= ranks
        part = Part(tuple(shape), dim, 0 if dim is None else rank, 1 if dim is None else ranks, segments)
        tensors[tensor] = reader.read_mean(tensor, part).contiguous()
        index[tensor] = Piece(part, 0, 0).entry()
    return tensors, index
