"""Where the time of a step goes: the profiler's record of one, in a few kinds that add up to the step.

On the CPU the time is that of the rank's main thread. On an accelerator it is that of the kernels that an operator
starts; what is left of the step are kernels of other operators, and time in which the accelerator has nothing to do.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, supported_activities

KINDS: dict[str, tuple[str, ...]] = {
    "convolution, forward": ("aten::mkldnn_convolution", "aten::_slow_conv2d_forward", "aten::cudnn_convolution"),
    "convolution, backward": ("aten::convolution_backward", "aten::_slow_conv2d_backward"),
    "matrix products": ("aten::mm", "aten::bmm", "aten::addmm", "aten::addmm_", "aten::baddbmm_"),
    "BatchNorm": (
        *("aten::native_batch_norm", "aten::native_batch_norm_backward"),
        *("aten::cudnn_batch_norm", "aten::cudnn_batch_norm_backward"),
    ),
    "ReLU": ("aten::relu_", "aten::clamp_min_", "aten::threshold_backward"),
    "additions": ("aten::add", "aten::add_"),
    "copies and fills": ("aten::copy_", "aten::fill_", "aten::zero_", "aten::cat"),
}
"""Kind -> the operators whose own time it is. Operators within the optimizer's step are of its kind, whatever they are;
in GC-2L all matrix products but the head's are the coarse level's."""

OPTIMIZER = "optimizer"
COLLECTIVES = "collectives"
REST = "waiting and the rest"


def profile_step(step: Callable[[], object]) -> tuple[dict[str, float], float | None]:
    """Runs ``step``; returns (kind -> seconds, which add up to the step's wall clock; seconds in which the accelerator
    computed, collectives excepted, or ``None`` on the CPU)."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    kinds = dict.fromkeys((*KINDS, OPTIMIZER, COLLECTIVES, REST), 0.0)
    kind_of = {name: kind for kind, names in KINDS.items() for name in names}
    with profile(activities=[ProfilerActivity.CPU] if on_cpu else supported_activities()) as profiler:
        began = time.perf_counter()
        step()
        accelerator.synchronize()
        seconds = time.perf_counter() - began
    computed = 0.0
    main = {event.thread for event in profiler.events() if event.name.startswith("Optimizer.step")}
    for event in profiler.events():
        if event.device_type != DeviceType.CPU or (on_cpu and main and event.thread not in main):
            continue
        if _within(event, "Optimizer.step"):
            kind = OPTIMIZER
        elif _within(event, "c10d::") or _within(event, "tlgc_mp::"):
            kind = COLLECTIVES
        else:
            kind = kind_of.get(event.name, REST)
        spent = (event.self_cpu_time_total if on_cpu else event.self_device_time_total) / 1e6
        kinds[kind] += spent
        computed += spent if kind != COLLECTIVES else 0.0
    kinds[REST] += seconds - sum(kinds.values())
    return kinds, None if on_cpu else computed


def _within(event: FunctionEvent | None, name: str) -> bool:
    """Whether ``event``, or one that it is part of, has a name that begins so."""
    while event is not None:
        if event.name.startswith(name):
            return True
        event = event.cpu_parent
    return False
