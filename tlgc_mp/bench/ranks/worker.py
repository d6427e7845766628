"""One rank of one measurement: ``python -m tlgc_mp.bench.ranks.worker KIND VALUES RESULT``, started by ``launch``.

KIND is the class of the request, as module:class, VALUES its fields in JSON, RESULT the file for what was measured. The
rank then stays until its standard input ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import pkgutil
import signal
import sys
import threading
import traceback
from typing import cast

from tlgc_mp.host import replace_file, use_huge_pages
from tlgc_mp.json_types import JsonObject


def main(arguments: list[str]) -> None:
    """Runs the measurement and leaves its result, or why there is none, in the file."""
    kind, values, path = arguments
    _prepare_process()
    try:
        result = measure(kind, json.loads(values))
    except BaseException as error:
        traceback.print_exc()
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        result = {"error": reason[:300], "out_of_memory": _is_memory(error)}
    replace_file(path, json.dumps(result))
    while True:
        signal.pause()


def measure(kind: str, values: JsonObject) -> JsonObject:
    """What this rank measures for a request of class ``kind``, as module:class, with those ``values``."""
    from tlgc_mp.engine.quiet import quiet_start
    from tlgc_mp.engine.start import start_distributed

    request = pkgutil.resolve_name(kind)(**values)
    with quiet_start():
        import torch
        from deepspeed.accelerator import get_accelerator

        measured_by = pkgutil.resolve_name(request.measured_by)
    start_distributed()
    return cast(JsonObject, measured_by(request, torch.device(get_accelerator().current_device_name())))


def _prepare_process() -> None:
    """Pins this process to its core; has it end with the one that started it, and before any other one when memory runs
    out."""
    use_huge_pages()
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(os.environ["RANK"]) % len(cores)]})
    threading.Thread(target=_end_with_standard_input, daemon=True).start()
    if sys.platform == "linux":
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("1000")


def _end_with_standard_input() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


def _is_memory(error: BaseException) -> bool:
    """Whether ``error`` is that of an allocation."""
    text = f"{type(error).__name__} {error}".lower()
    return isinstance(error, MemoryError) or any(
        sign in text for sign in ("out of memory", "outofmemory", "can't allocate memory", "not enough memory")
    )


if __name__ == "__main__":
    main(sys.argv[1:])
