"""What one rank of ``tlgc-mp bench saving`` measures."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from typing import cast

import torch
import torch.distributed as dist

from tlgc_mp.bench.saving.sweep import KINDS, Figures, Kind, Saving, Seconds
from tlgc_mp.bench.zero.rank import training_engine
from tlgc_mp.checkpoint import CheckpointSaver
from tlgc_mp.engine.start import barrier

_BLOCK = 1 << 24
_STEPS = 2


def measure_saving(request: Saving, device: torch.device) -> Figures:
    """What saving costs this rank. Collective: all ranks are up already."""
    engine, step = training_engine(request, {"stage": request.stage}, device)
    step()  # after which there is momentum
    folder = os.path.join(request.folder, "checkpoints")
    savers = {
        background: CheckpointSaver(engine, folder, keep=1, background=background) for background in (True, False)
    }
    figures: dict[Kind, list[float]] = {name: [] for name in KINDS}
    try:
        first = _timed(lambda: savers[True].save("first", {}))
        savers[True].wait()
        (mine,) = (f for f in os.scandir(savers[True].path) if f.name.startswith(f"shard-{dist.get_rank():02d}"))
        size = mine.stat().st_size
        for _ in range(request.rounds):
            figures["plain"].append(_timed(lambda: _write_plainly(request.folder, size)))
            figures["blocking"].append(_timed(lambda: savers[False].save("blocking", {})))
            figures["step"].append(_timed(lambda: [step() for _ in range(_STEPS)]) / _STEPS)
            barrier()
            began = time.perf_counter()
            savers[True].save("beside", {})
            figures["stall"].append(time.perf_counter() - began)
            watch = threading.Thread(target=_note_end, args=(savers[True], began, figures["background"]))
            watch.start()
            figures["step_beside"].append(_timed(lambda: [step() for _ in range(_STEPS)]) / _STEPS)
            watch.join()
            barrier()
    finally:
        barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
    return {"bytes": size, "first_stall": first, **cast(Seconds, figures)}


def _note_end(saver: CheckpointSaver, began: float, seconds: list[float]) -> None:
    """Waits beside the training until the save under way is on the disk, and notes when."""
    saver.wait()
    seconds.append(time.perf_counter() - began)


def _timed(act: Callable[[], object]) -> float:
    """Seconds that ``act`` takes on this rank, begun by all ranks together."""
    barrier()
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def _write_plainly(folder: str, size: int) -> None:
    """Writes that many bytes to a file once and puts them on the disk."""
    block = os.urandom(min(size, _BLOCK))
    with tempfile.TemporaryFile(dir=folder) as file:
        for at in range(0, size, len(block)):
            file.write(block[: size - at])
        file.flush()
        os.fsync(file.fileno())
