"""What the profiler's record of a step is made into where kernels run on an accelerator."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch.autograd import DeviceType

from tlgc_mp.bench.ranks import accounting


def _operator(name: str, device_seconds: float, thread: int = 1, parent: Any = None) -> SimpleNamespace:
    return SimpleNamespace(
        name=name,
        device_type=DeviceType.CPU,
        thread=thread,
        cpu_parent=parent,
        self_cpu_time_total=7e9,
        self_device_time_total=device_seconds * 1e6,
    )


def test_time_is_that_of_the_kernels_that_operators_start(monkeypatch: pytest.MonkeyPatch) -> None:
    step = _operator("Optimizer.step#SGD.step", 0.0)
    kernel = _operator("implicit_gemm", 1.0)
    kernel.device_type = DeviceType.CUDA  # told a second time
    events = [
        step,
        _operator("aten::_foreach_add_", 0.25, parent=step),
        _operator("aten::cudnn_convolution", 1.0),
        kernel,
        _operator("aten::convolution_backward", 2.0, thread=2),  # backward has a thread of its own there
        _operator("aten::cross_entropy_loss", 0.5),
        _operator("c10d::allgather_", 4.0),
    ]

    class Profiler:
        def __init__(self, **options: Any) -> None: ...

        def __enter__(self) -> Profiler:
            return self

        def __exit__(self, *error: object) -> None: ...

        def events(self) -> list[SimpleNamespace]:
            return events

    synchronized: list[bool] = []
    accelerator = SimpleNamespace(device_name=lambda: "cuda", synchronize=lambda: synchronized.append(True))
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: accelerator)
    monkeypatch.setattr(accounting, "profile", Profiler)
    kinds, computed = accounting.profile_step(lambda: None)

    assert synchronized
    assert computed == pytest.approx(3.75)  # all but the collective
    told = {kind: seconds for kind, seconds in kinds.items() if seconds and kind != accounting.REST}
    assert told == {"convolution, forward": 1.0, "convolution, backward": 2.0, "optimizer": 0.25, "collectives": 4.0}
