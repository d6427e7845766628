"""Writing checkpoints beside the training.

A rank copies its share of the state, which is all that training waits for, and a thread writes it. The threads agree
over the job's key-value store, so no collective is added: rank 0 makes the folder, every rank writes its file and
posts size and checksum, and rank 0 names the checkpoint when all have. One save is under way at a time, and leaves
nothing in the store.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from tlgc_mp.checkpoint import folder as folders
from tlgc_mp.checkpoint.engine_state import COUNTERS, EngineState, saved_safely
from tlgc_mp.checkpoint.reader import INDEX, Index, Part, Piece
from tlgc_mp.engine.protocols import Engine
from tlgc_mp.errors import UsageError, is_count, must_be, told
from tlgc_mp.host import as_path, describe_run
from tlgc_mp.json_types import Json, JsonObject

SAVE_SECONDS = 1800.0
"""How long ranks wait for each other's files before a save has failed."""

_saves = 0


class SaveError(RuntimeError):
    """A checkpoint could not be written. Those before it stand. The message is one line, the same on every rank."""


@dataclass
class _Save:
    """One save, as its thread knows it."""

    number: int
    tag: str
    best: bool = False
    error: str | None = None
    done: threading.Event = field(default_factory=threading.Event)


class CheckpointSaver:
    """Saves an engine's state into a folder of checkpoints.

    Every rank makes one, and calls the same methods in the same order.

    Args:
        engine: of :func:`tlgc_mp.initialize`.
        folder: of the checkpoints; one that all ranks see.
        keep: the newest checkpoints that stay; the best stays too.
        background: whether :meth:`save` copies the state and returns while a thread writes it. It costs that copy in
            host memory: as much again as this rank's weights and optimizer state.

    Raises:
        UsageError: an argument is of another kind, or the state of the engine's optimizer or schedule cannot be saved.
    """

    def __init__(self, engine: Engine, folder: str, *, keep: int = 3, background: bool = True) -> None:
        if not is_count(keep):
            raise must_be("keep", "1 or more", keep)
        self.folder, self.keep, self.background = as_path("folder", folder), keep, background
        self._state = EngineState(engine)
        self._state.schedule()  # so that what cannot be saved is refused before it is trained
        self._store = _store_to_wait_on()
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._saved_by = describe_run() if self._rank == 0 else None
        self._copies: dict[str, Tensor] = {}
        self._lock = threading.Lock()
        self._last: _Save | None = None

    @property
    def path(self) -> str:
        """Of the newest checkpoint of this saver; written when :meth:`wait` has returned."""
        return "" if self._last is None else os.path.join(self.folder, self._last.tag)

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._last is not None and not self._last.done.is_set()

    def save(self, tag: str, client_state: JsonObject, replica_state: dict[str, Tensor] | None = None) -> None:
        """Begins to save the state of this moment. Waits for the save before it.

        Args:
            tag: the checkpoint's name; where there is one of that name already, it gets a number.
            client_state: what else to keep, as JSON can hold it: the same on every rank.
            replica_state: tensors that each replica keeps for itself.

        Raises:
            SaveError: the save before could not be written.
            UsageError: ``tag`` is no name of a folder, JSON cannot hold ``client_state``, or the state of the
                learning-rate schedule, or the extra state of a module, is none that can be loaded safely.
        """
        global _saves
        _check_saved(tag, client_state)
        self.wait()
        _saves += 1
        save = self._last = _Save(_saves, tag)
        tensors, index = self._snapshot(replica_state or {})
        description, others = self._describe(client_state)
        thread = threading.Thread(
            target=self._write, args=(save, tensors, index, description, others), name="checkpoint", daemon=True
        )
        thread.start()
        if not self.background:
            self.wait()

    def check(self) -> None:
        """Raises :class:`SaveError` where the save under way has failed; costs nothing."""
        if self._last is not None and self._last.error is not None:
            raise SaveError(self._last.error)

    def wait(self) -> None:
        """Returns when the last save is on the disk and has its name.

        Raises:
            SaveError: it could not be written.
        """
        if self._last is not None:
            if not self._last.done.wait(2 * SAVE_SECONDS):
                raise SaveError(f"checkpoint {self.path!r}: not written within {2 * SAVE_SECONDS:.0f} s")
            self.check()

    def mark_best(self) -> None:
        """Makes the newest checkpoint the best one, as soon as it has its name."""
        with self._lock:
            if self._last is None or self._rank != 0:
                return
            if not self._last.done.is_set():
                self._last.best = True
            elif self._last.error is None:
                folders.mark_best(self.folder, self._last.tag)

    def _snapshot(self, replica_state: dict[str, Tensor]) -> tuple[dict[str, Tensor], Index]:
        """(this rank's file, where each tensor of it belongs), the tensors in memory that training does not touch."""
        tensors, index = {}, {}
        for name, piece, tensor in _pieces(self._state, replica_state):
            index[name] = piece.entry()
            if not self.background and tensor.device.type == "cpu" and tensor.is_contiguous():
                tensors[name] = tensor
                continue
            copy = self._copies.get(name)
            if copy is None:
                copy = self._copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
            tensors[name] = copy.copy_(tensor)
        return tensors, index

    def _describe(self, client_state: JsonObject) -> tuple[dict[str, object], dict[str, bytes]]:
        """(what ``checkpoint.json`` says, the contents of the files that rank 0 writes beside its share)"""
        state, engine = self._state, self._state.engine
        scalars, apart = state.scalars()
        description = {
            "client_state": client_state,
            "tensor_parallel": state.tensor_parallel,
            "data_parallel": state.replicas,
            "zero_stage": state.stage,
            "optimizer": {
                "type": type(state.optimizer).__name__,
                "scalars": scalars,
                "apart": apart,
                "groups": [_plain(group) for group in state.groups],
            },
            "engine": {name: int(getattr(engine, name)) for name in COUNTERS},
            "saved_by": self._saved_by,
        }
        others = {}
        if (schedule := state.schedule()) is not None:
            others[folders.SCHEDULER] = schedule
        if extra := state.extra_states():
            others[folders.EXTRA_STATE] = saved_safely(", ".join(extra), extra)
        return description, others

    def _write(
        self,
        save: _Save,
        tensors: dict[str, Tensor],
        index: Index,
        description: dict[str, object],
        others: dict[str, bytes],
    ) -> None:
        """The thread of one save. Whatever goes wrong becomes ``save.error``, on every rank."""
        try:
            tag = self._agree(save, "folder", lambda: self._begin(save.tag))
            mine = self._attempt(lambda: self._write_files(tag, tensors, index, others))
            self._post(save, f"rank-{self._rank}", mine)
            save.tag = self._agree(save, "end", lambda: self._finish(save, tag, description))
        except Exception as error:
            save.error = f"checkpoint {os.path.join(self.folder, save.tag)!r} was not written: {told(error)}"
        finally:
            self._tidy(save)
            with self._lock:
                if save.best and save.error is None and self._rank == 0:
                    try:
                        folders.mark_best(self.folder, save.tag)
                    except OSError as error:
                        save.error = f"{os.path.join(self.folder, folders.BEST)!r} was not written: {told(error)}"
                save.done.set()

    def _begin(self, tag: str) -> str:
        tag = folders.free_tag(self.folder, tag)
        folders.begin(self.folder, tag)
        return tag

    def _write_files(
        self, tag: str, tensors: dict[str, Tensor], index: Index, others: dict[str, bytes]
    ) -> dict[str, folders.FileEntry]:
        state, partial = self._state, os.path.join(self.folder, tag + folders.PARTIAL)
        name = f"shard-{state.tensor_rank:02d}-{state.replica:02d}.safetensors"
        path = os.path.join(partial, name)
        if not os.path.isdir(partial):
            raise FileNotFoundError(f"{partial!r} is not there, which rank 0 has made; all ranks must see one folder")
        save_file(tensors, path, metadata={INDEX: json.dumps(index)})
        files = {name: folders.sealed(path)}
        for name, content in others.items() if self._rank == 0 else ():
            path = os.path.join(partial, name)
            with open(path, "wb") as file:
                file.write(content)
            files[name] = folders.sealed(path)
        return files

    def _finish(self, save: _Save, tag: str, description: dict[str, object]) -> str:
        """On rank 0: names the checkpoint once every rank has written its file."""
        try:
            files: dict[str, folders.FileEntry] = {}
            for rank in range(self._world):
                files.update(cast("dict[str, folders.FileEntry]", self._wait_for(save, f"rank-{rank}")))
            for name, entry in files.items():
                path = os.path.join(self.folder, tag + folders.PARTIAL, name)
                if not os.path.isfile(path) or os.path.getsize(path) != entry["bytes"]:
                    raise FileNotFoundError(f"{path!r} is not there for rank 0; all ranks must see one folder")
            folders.commit(self.folder, tag, {**description, "files": files})
        except BaseException:
            folders.abandon(self.folder, tag)
            raise
        folders.forget_old(self.folder, self.keep)
        return tag

    def _agree(self, save: _Save, step: str, act: Callable[[], str]) -> str:
        """What ``act`` returns on rank 0, which alone calls it; raises on every rank where it raises there."""
        if self._rank == 0:
            self._post(save, step, self._attempt(act))
        return str(self._wait_for(save, step))

    def _attempt(self, act: Callable[[], object]) -> dict[str, object]:
        try:
            return {"result": act()}
        except SaveError as error:  # of another rank, which has said who it is
            return {"error": str(error)}
        except Exception as error:
            return {"error": f"rank {self._rank}: {told(error)}"}

    def _post(self, save: _Save, step: str, outcome: dict[str, object]) -> None:
        self._store.set(f"{save.number}/{step}", json.dumps(outcome))

    def _wait_for(self, save: _Save, step: str) -> Json:
        key, began = f"{save.number}/{step}", time.monotonic()
        try:
            self._store.wait([key], datetime.timedelta(seconds=SAVE_SECONDS))
        except RuntimeError:
            if time.monotonic() - began < SAVE_SECONDS:
                raise  # the store is gone, and with it the rank that kept it
            raise TimeoutError(f"no word of {step} within {SAVE_SECONDS:.0f} s") from None
        outcome = json.loads(self._store.get(key))
        if "error" in outcome:
            raise SaveError(outcome["error"])
        return cast(Json, outcome["result"])

    def _tidy(self, save: _Save) -> None:
        """Removes the save's keys once no rank waits for one of them: the last rank to come here does."""
        with contextlib.suppress(RuntimeError):  # the store is gone, and its keys with it
            if self._store.add(f"{save.number}/left", 1) == self._world:
                for step in ("folder", *(f"rank-{rank}" for rank in range(self._world)), "end", "left"):
                    self._store.delete_key(f"{save.number}/{step}")


def _store_to_wait_on() -> dist.Store:
    """The store through which the ranks met, over a connection of its own: whoever waits on the shared one holds up
    the watchdog and the training, which ask it between steps."""
    shared = dist.distributed_c10d._get_default_store()
    # A connection knows nothing of the prefixes that keep apart two jobs, or two attempts at one, in the same store.
    name = shared.compare_set("tlgc_mp/checkpoint", "", uuid.uuid4().hex).decode()
    store = shared
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if isinstance(store, dist.TCPStore):
        store = dist.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False)
    return dist.PrefixStore(f"tlgc_mp/checkpoint/{name}", store)


def save_checkpoint(
    engine: Engine,
    folder: str,
    tag: str | None = None,
    *,
    client_state: JsonObject | None = None,
    keep: int = 3,
) -> str:
    """Saves an engine's state so that it loads at any other split over ranks and ZeRO stage. Collective.

    Args:
        engine: of :func:`tlgc_mp.initialize`.
        folder: of the checkpoints; one that all ranks see.
        tag: the checkpoint's name; the count of steps where not given.
        client_state: what else to keep, as JSON can hold it: the same on every rank.
        keep: the newest checkpoints that stay in the folder.

    Returns:
        The checkpoint's path.

    Raises:
        SaveError: it could not be written; those before it stand.
        UsageError: an argument is of another kind, or how the engine's optimizer keeps its state is not known.
    """
    saver = CheckpointSaver(engine, folder, keep=keep, background=False)
    saver.save(f"step-{engine.global_steps}" if tag is None else tag, {} if client_state is None else client_state)
    return saver.path


def _check_saved(tag: str, client_state: JsonObject) -> None:
    """Raises :class:`UsageError` for what cannot be saved."""
    if not isinstance(tag, str) or os.path.basename(tag) != tag or tag in ("", ".", "..") or "\0" in tag:
        raise must_be("tag", "the name of a folder", tag, "use e.g. 'step-100'")
    if tag.endswith(folders.PARTIAL) or tag in (folders.LATEST, folders.BEST):
        raise must_be("tag", "a name that the folder of checkpoints does not use itself", tag)
    if not isinstance(client_state, dict):
        raise must_be("client_state", "a dict that JSON can hold", type(client_state))
    try:
        json.dumps(client_state)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"client_state must be what JSON can hold, got an error: {error}; give numbers, text and lists"
        ) from None


def _pieces(state: EngineState, replica_state: dict[str, Tensor]) -> Iterator[tuple[str, Piece, Tensor]]:
    """(name, where it belongs, tensor) of all that this rank writes.

    What several ranks hold alike, one of them writes: what no tensor-parallel rank has cut, the first of them; what
    ZeRO has not split, the replicas in turn, the one with the least to write so far.
    """
    parts = state.parts()
    written = [0] * state.replicas
    for slot in state.slots:
        states = state.states(slot)
        everywhere = state.stage == 0 or (slot.holder is None and state.stage < 3)  # whole on every replica
        if everywhere and slot.offset is None and slot.numel == slot.values.numel() and slot.start == 0:
            writer = written.index(min(written))
            written[writer] += slot.numel * (1 + len(states))
            if writer != state.replica:
                continue
        if slot.part.dim is None and state.tensor_rank > 0:
            continue
        piece = Piece(slot.part, slot.start, state.replica)
        yield f"weights/{slot.name}", piece, slot.values
        for key, value in states.items():
            yield f"optimizer/{key}/{slot.name}", piece, value
    for name, buffer in state.buffers().items():
        if parts[name].dim is not None or state.tensor_rank == 0:
            yield f"buffers/{name}", Piece(parts[name], 0, state.replica), buffer
    if state.tensor_rank == 0:
        for name, tensor in replica_state.items():
            yield f"replica/{name}", Piece(Part(tuple(tensor.shape), None, 0, 1), 0, state.replica), tensor


def _plain(group: dict[str, object]) -> dict[str, object]:
    """The settings of a parameter group; not how they are computed, which is the device's affair."""
    kinds = (bool, int, float, str, list, tuple)
    computed = ("params", "foreach", "fused", "capturable", "differentiable", "name")
    return {k: v for k, v in group.items() if k not in computed and (v is None or isinstance(v, kinds))}
