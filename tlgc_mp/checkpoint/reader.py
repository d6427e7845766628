"""Reading any part of any tensor of a checkpoint, whatever the shape of the run that wrote it.

A file holds ranges of parts: a whole tensor is cut in equal parts along one dimension, and a flattened part in ranges.
Where the parts that are asked for are those that were written, or both are cut along dimension 0, a range of theirs is
a few ranges of the files; else the parts are put together first.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tlgc_mp.checkpoint.folder import read_description
from tlgc_mp.errors import UsageError, is_count
from tlgc_mp.parallel.layout import Layout, Ranks, join_shares, take_share

if TYPE_CHECKING:
    from typing_extensions import NotRequired


INDEX = "index"
"""The key of a file's metadata under which, as JSON, stands where each of its tensors belongs."""


AVERAGE = "average"
"""The key, in the optimizer's state of a weight, of that weight's moving average."""

_OWN = ("buffers/", "replica/")
"""The kinds of tensors of which every replica keeps its own."""


@dataclass(frozen=True)
class Part:
    """Which part of a whole parameter or buffer a tensor-parallel rank holds.

    Attributes:
        shape: of the part.
        dim: the dimension in which the whole is cut; ``None`` where it is not.
        index, count: it is part ``index`` of ``count`` equal ones.
        segments: sizes of the pieces that the cut dimension is a row of, each cut by itself; ``None`` for one piece.
    """

    shape: tuple[int, ...]
    dim: int | None
    index: int
    count: int
    segments: tuple[int, ...] | None = None

    @property
    def whole_shape(self) -> tuple[int, ...]:
        return tuple(n * self.count if dim == self.dim else n for dim, n in enumerate(self.shape))

    @property
    def layout(self) -> Layout:
        return Layout(self.dim, self.segments)


class PieceEntry(TypedDict):
    """A :class:`Piece` as JSON holds it; ``segments`` only where there are some."""

    shape: Sequence[int]
    dim: int | None
    part: int
    parts: int
    start: int
    replica: int
    segments: NotRequired[Sequence[int]]


Index: TypeAlias = dict[str, PieceEntry]
"""Of the tensors of a file, by name."""


@dataclass(frozen=True)
class Piece:
    """Where a stored tensor belongs: a range of the flattened ``part``, from ``start`` on, as ``replica`` held it."""

    part: Part
    start: int
    replica: int

    def entry(self) -> PieceEntry:
        part = self.part
        entry: PieceEntry = {
            "shape": part.shape,
            "dim": part.dim,
            "part": part.index,
            "parts": part.count,
            "start": self.start,
            "replica": self.replica,
        }
        if part.segments is not None:
            entry["segments"] = part.segments
        return entry

    @staticmethod
    def from_entry(entry: PieceEntry) -> Piece:
        """What :meth:`entry` has made.

        Raises:
            ValueError, KeyError, TypeError: it has not made that.
        """
        shape, dim, index, count = tuple(entry["shape"]), entry["dim"], entry["part"], entry["parts"]
        segments = tuple(entry["segments"]) if "segments" in entry else None
        numbers = (*shape, *(segments or ()), index, entry["start"], entry["replica"])
        uncut = dim is None and count == 1
        if not all(is_count(number, 0) for number in numbers) or not is_count(count) or index >= count:
            raise ValueError(f"{entry} is no piece")
        if not uncut and not (is_count(dim, 0) and dim < len(shape)):
            raise ValueError(f"{entry} is no piece")
        part = Part(shape, dim, index, count, segments)
        if segments and (any(n % count for n in segments) or dim is None or sum(segments) != part.whole_shape[dim]):
            raise ValueError(f"{entry} is no piece")
        return Piece(part, entry["start"], entry["replica"])


class CheckpointReader:
    """The tensors of one checkpoint.

    Tensors are named ``weights/NAME``, ``optimizer/KEY/NAME``, ``buffers/NAME`` and ``replica/NAME``. Of the last two
    kinds every replica keeps its own.

    Args:
        folder, tag: which checkpoint.

    Raises:
        UsageError: its files cannot be read, do not say where their tensors belong, or hold a tensor in part only, or a
            part of it twice.
    """

    def __init__(self, folder: str, tag: str) -> None:
        self.where = os.path.join(folder, tag)
        self.description = read_description(folder, tag)
        self._files: dict[str, safe_open] = {}
        self._pieces: dict[str, list[tuple[str, Piece, int]]] = {}  # tensor -> (file, where it belongs, elements)
        for name in sorted(self.description["files"]):
            if not name.endswith(".safetensors"):
                continue
            path = os.path.join(self.where, name)
            try:
                file = self._files[name] = safe_open(path, framework="pt")
                index = json.loads((file.metadata() or {})[INDEX])
                if set(index) != set(file.keys()):
                    raise KeyError(INDEX)
                for tensor, entry in index.items():
                    elements = math.prod(file.get_slice(tensor).get_shape())
                    self._pieces.setdefault(tensor, []).append((name, Piece.from_entry(entry), elements))
            except (OSError, SafetensorError) as error:
                raise UsageError(f"{path!r} cannot be read: {error}") from None
            except (KeyError, ValueError, TypeError, RecursionError):
                raise UsageError(
                    f"{path!r} does not say where its tensors belong; give a file of a saved checkpoint"
                ) from None
        if not self._files:
            raise UsageError(f"the checkpoint {self.where!r} has no files of weights")
        for tensor, pieces in self._pieces.items():
            self._check(tensor, [(piece, elements) for _, piece, elements in pieces])

    def _check(self, tensor: str, pieces: list[tuple[Piece, int]]) -> None:
        """Raises :class:`UsageError` unless the pieces are every element of the tensor, each once.

        Of what each replica keeps for itself, each once for every replica.
        """
        first = pieces[0][0].part
        ranges: dict[tuple[int, int], list[tuple[int, int]]] = {}  # (part, replica) -> (start, end) of each piece
        for piece, elements in pieces:
            part = piece.part
            if replace(part, index=0) != replace(first, index=0):
                raise UsageError(f"the checkpoint {self.where!r} holds {tensor} in parts that do not fit together")
            keeper = piece.replica if tensor.startswith(_OWN) else 0
            ranges.setdefault((part.index, keeper), []).append((piece.start, piece.start + elements))
        if len(ranges) != first.count * len({replica for _, replica in ranges}):
            raise UsageError(f"the checkpoint {self.where!r} holds only a part of {tensor}")
        for found in ranges.values():
            at = 0
            for start, end in sorted(found):
                if start < at:
                    raise UsageError(f"the checkpoint {self.where!r} holds a part of {tensor} twice")
                if start > at:
                    break
                at = end
            if at != math.prod(first.shape):
                raise UsageError(f"the checkpoint {self.where!r} holds only a part of {tensor}")

    def tensors(self) -> list[str]:
        """The full names of all tensors."""
        return list(self._pieces)

    def names(self, kind: str) -> list[str]:
        """The names of all tensors of a kind, ``"weights"`` for example."""
        return [name.removeprefix(f"{kind}/") for name in self._pieces if name.startswith(f"{kind}/")]

    def whole_shape(self, tensor: str) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return self._of(tensor)[0][1].part.whole_shape

    def read(self, tensor: str, part: Part, start: int = 0, numel: int | None = None, replica: int = 0) -> Tensor:
        """Elements ``start .. start + numel - 1`` of the flattened ``part`` of a tensor, or the part in its shape.

        Of what each replica keeps for itself, what ``replica`` wrote.

        Raises:
            UsageError: the checkpoint does not hold it, or in another shape.
        """
        pieces = self._of(tensor)
        replicas = {piece.replica for _, piece, _ in pieces}
        if tensor.startswith(_OWN):
            pieces = [p for p in pieces if p[1].replica == (replica if replica in replicas else min(replicas))]
        written = pieces[0][1].part
        whole = part.whole_shape
        if whole != written.whole_shape:
            raise UsageError(
                f"{tensor} must be of shape {whole}, got {written.whole_shape} in the checkpoint {self.where!r}"
            )
        length = math.prod(part.shape) - start if numel is None else numel
        rows = Layout(0, None)
        if written.count == part.count and (written.count == 1 or written.layout == part.layout):
            flat = self._range(tensor, pieces, part.index, start, length)
        elif all(each.count == 1 or each.layout == rows for each in (written, part)):
            share = math.prod(written.shape)
            at = math.prod(part.shape) * part.index + start
            end, ranges = at + length, []
            while at < end:
                index = at // share
                here = min(end, (index + 1) * share) - at
                ranges.append(self._range(tensor, pieces, index, at - index * share, here))
                at += here
            flat = torch.cat(ranges)
        else:
            shares = [
                self._range(tensor, pieces, index, 0, math.prod(written.shape)).view(written.shape)
                for index in range(written.count)
            ]
            if written.dim is not None:
                shares = [torch.cat(join_shares(shares, written.layout), written.dim)]
            cut = take_share(shares[0], part.layout, Ranks(size=part.count, rank=part.index))
            flat = cut.flatten().narrow(0, start, length)
        return flat.view(part.shape) if numel is None and start == 0 else flat

    def judged_by(self, name: str, kind: str) -> str:
        """The tensor that the run is judged by: of a weight its moving average, where that was kept."""
        averaged = f"optimizer/{AVERAGE}/{name}"
        return averaged if kind == "weights" and averaged in self._pieces else f"{kind}/{name}"

    def read_replicas(self, tensor: str, part: Part, replica: int, replicas: int) -> Tensor:
        """What ``replica`` of ``replicas`` kept for itself; the mean over those who wrote, where they were not as many.

        Integers are not averaged: those of the first are taken.
        """
        written = sorted({piece.replica for _, piece, _ in self._of(tensor)})
        return self.read(tensor, part, replica=replica) if len(written) == replicas else self.read_mean(tensor, part)

    def read_mean(self, tensor: str, part: Part) -> Tensor:
        """A part of a tensor; the mean over the replicas of what each kept for itself."""
        written = sorted({piece.replica for _, piece, _ in self._of(tensor)})
        if not tensor.startswith(_OWN):
            return self.read(tensor, part)
        found = [self.read(tensor, part, replica=each) for each in written]
        return torch.stack(found).mean(0) if len(found) > 1 and found[0].is_floating_point() else found[0]

    def _of(self, tensor: str) -> list[tuple[str, Piece, int]]:
        if tensor not in self._pieces:
            raise UsageError(f"the checkpoint {self.where!r} holds no {tensor}")
        return self._pieces[tensor]

    def _range(self, tensor: str, pieces: list[tuple[str, Piece, int]], index: int, start: int, numel: int) -> Tensor:
        """A range of the flattened part ``index``, as it was cut when it was written."""
        ranges = []
        at = start
        for name, piece, elements in sorted(pieces, key=lambda p: p[1].start):
            end = piece.start + elements
            if piece.part.index != index or not piece.start <= at < end or at == start + numel:
                continue
            stored = self._files[name].get_slice(tensor)
            until = min(end, start + numel)
            if len(stored.get_shape()) == 1:
                ranges.append(stored[at - piece.start : until - piece.start])
            else:
                ranges.append(self._files[name].get_tensor(tensor).flatten()[at - piece.start : until - piece.start])
            at = until
        if at != start + numel:
            raise UsageError(f"the checkpoint {self.where!r} holds only a part of {tensor}")
        return ranges[0] if len(ranges) == 1 else torch.cat(ranges)
