"""A trace of a few training steps, by torch's profiler, which chrome://tracing and Perfetto show."""

from __future__ import annotations

import os
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WARM_UP = 2
"""Steps of this start that are passed over: the first ones make what later ones have."""


class StepProfiler:
    """While it is entered, writes one trace of ``steps`` steps, once those of the warm-up are over.

    Args:
        steps: to be traced; ``None`` for none.
        folder: to be made for the traces, one a rank.
        rank: of this process.
    """

    def __init__(self, steps: int | None, folder: str, rank: int) -> None:
        self.path = os.path.join(folder, f"rank-{rank}.json")
        self.written = False
        self._taken = 0
        self._profile: profile | None = None
        if steps is not None:
            activities = [ProfilerActivity.CPU]
            activities += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            phases = schedule(wait=WARM_UP - 1, warmup=1, active=steps, repeat=1)
            self._profile = profile(activities=activities, schedule=phases, on_trace_ready=self._write)

    def _write(self, trace: profile) -> None:
        if self._taken <= WARM_UP:  # the run is over, and what was traced is its evaluation
            return
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        trace.export_chrome_trace(self.path)
        self.written = True

    @property
    def told(self) -> str:
        """Where the trace is, or why there is none."""
        return self.path if self.written else f"none: there was no step after the first {WARM_UP} of this start"

    def __enter__(self) -> StepProfiler:
        if self._profile is not None:
            self._profile.__enter__()
        return self

    def step(self) -> None:
        """To be called after each step."""
        self._taken += 1
        if self._profile is not None and not self.written:
            self._profile.step()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is not None:
            self._profile.__exit__(kind, error, trace)
