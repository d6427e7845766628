"""The moving average of a run's weights, which is what it is judged by."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from tlgc_mp.checkpoint.engine_state import EngineState
from tlgc_mp.checkpoint.reader import AVERAGE
from tlgc_mp.engine.protocols import Engine


class Average:
    """torch's exponential moving average, of the master weights that this rank's optimizer steps on.

    It lies beside what the optimizer keeps for each of them, and so is saved, loaded and cut for other ranks with that.
    Buffers are not averaged.

    Args:
        engine: the DeepSpeed engine.
        decay: the share of the average that stays at a step; ``None`` averages nothing.
    """

    def __init__(self, engine: Engine, decay: float | None) -> None:
        self._decay = decay
        self._update = None if decay is None else get_ema_multi_avg_fn(decay)
        self._state = EngineState(engine)
        self._holders = list({id(s.holder): s.holder for s in self._state.slots if s.holder is not None}.values())

    @torch.no_grad()
    def step(self) -> None:
        """To be called after each step of the optimizer. The first one is the average's beginning."""
        if self._update is None:
            return
        states = [self._state.optimizer.state[holder] for holder in self._holders]
        new = [state for state in states if AVERAGE not in state]
        for holder, state in zip(self._holders, states, strict=True):
            if AVERAGE not in state:
                state[AVERAGE] = holder.detach().clone()
        if states and not new:
            self._update([state[AVERAGE] for state in states], [holder.data for holder in self._holders], 0)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the engine's weights are the average. Collective."""
        if self._update is None:
            yield
            return
        kept: list[Tensor] = [holder.detach().clone() for holder in self._holders]
        self._fill([self._state.optimizer.state[holder].get(AVERAGE, holder) for holder in self._holders])
        try:
            yield
        finally:
            self._fill(kept)

    @torch.no_grad()
    def _fill(self, values: list[Tensor]) -> None:
        for holder, value in zip(self._holders, values, strict=True):
            holder.data.copy_(value)
        self._state.publish()
