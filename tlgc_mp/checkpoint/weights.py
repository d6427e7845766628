"""Starting from another run's weights, and from nothing else of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tlgc_mp.checkpoint import folder as folders
from tlgc_mp.checkpoint.engine_state import EngineState
from tlgc_mp.checkpoint.loader import all_or_none
from tlgc_mp.checkpoint.reader import CheckpointReader, Part
from tlgc_mp.engine.protocols import Engine
from tlgc_mp.errors import UsageError, must_be, told
from tlgc_mp.parallel.layout import Ranks, take_share

Source = tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor]]
"""(the shape of each tensor by its name, what reads one of them whole)"""


def load_weights(engine: Engine, path: str) -> list[str]:
    """Fills an engine's weights and buffers from those of another run, whatever ranks it had. Collective.

    The last layer keeps its own where it has another shape there, as with another number of classes.

    Args:
        engine: of :func:`tlgc_mp.initialize`.
        path: a safetensors file that ``tlgc-mp export`` wrote, or a run's output folder, or one of its checkpoints.

    Returns:
        The names of what was not taken.

    Raises:
        UsageError: there is nothing to read, or it is damaged, or of another model. On every rank.
    """
    state = EngineState(engine)

    def fill() -> list[str]:
        try:
            return _fill(state, _exported(path) if folders.is_exported(path) else _saved(path), path)
        except UsageError:
            raise
        except Exception as error:  # whatever a file's contents may set off, every rank is to hear of it
            raise UsageError(f"{path!r} cannot be read: {told(error)}") from error

    left = all_or_none(fill)
    state.publish()
    return left


def _exported(path: str) -> Source:
    try:
        file = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise must_be("path", "a checkpoint or a safetensors file", path, note=f": {error}") from None
    names = file.keys()
    return {name: tuple(file.get_slice(name).get_shape()) for name in names}, file.get_tensor


def _saved(path: str) -> Source:
    folder, tag = folders.find_checkpoint(path)
    problem = folders.damage(folder, tag)
    if problem is not None:
        raise UsageError(f"{problem}; {folders.offer(folder, tag)}")
    reader = CheckpointReader(folder, tag)
    stored = {name: reader.judged_by(name, kind) for kind in ("weights", "buffers") for name in reader.names(kind)}
    shapes = {name: reader.whole_shape(key) for name, key in stored.items()}
    return shapes, lambda name: reader.read_mean(stored[name], Part(shapes[name], None, 0, 1))


@torch.no_grad()
def _fill(state: EngineState, source: Source, path: str) -> list[str]:
    shapes, read = source
    parts = state.parts()
    last = [name for name, _ in state.module.named_parameters()][-1].rpartition(".")[0]
    left = sorted(name for name, part in parts.items() if shapes.get(name) != part.whole_shape)
    for name in left:
        if name.rpartition(".")[0] != last:
            found = f"is {shapes[name]}, not {parts[name].whole_shape}" if name in shapes else "is not there"
            raise must_be("path", "a file of the weights of this model", path, note=f", where {name} {found}")

    def part_of(name: str) -> Tensor:
        part = parts[name]
        return take_share(read(name), part.layout, Ranks(size=part.count, rank=part.index))

    for slot in state.slots:
        if slot.name not in left:
            values = part_of(slot.name).flatten().narrow(0, slot.start, slot.numel)
            slot.values.copy_(values.view(slot.values.shape))
    for name, buffer in state.buffers().items():
        if name not in left:
            buffer.copy_(part_of(name))
    return left
