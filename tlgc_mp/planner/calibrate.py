"""The rates of the device at hand, from short measurements: what ``tlgc-mp plan --calibrate`` writes.

Each is the best of several tries, as other work on the machine can only make one slower; that of convolutions is over
all their shapes together. A step of training is slower where its shapes are worse than these.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tlgc_mp.bench.ranks import launch
from tlgc_mp.bench.scaling.capacity import available_bytes
from tlgc_mp.errors import UsageError
from tlgc_mp.host import describe_machine, replace_file, usable_cores
from tlgc_mp.models import create_model
from tlgc_mp.planner.devices import CONTEXT, Device, to_dict
from tlgc_mp.planner.link import LinkFigures, LinkRequest
from tlgc_mp.planner.process import IMAGES, LARGE, SIDE, MemoryFigures, MemoryRequest
from tlgc_mp.planner.trace import trace

SHAPES = ((64, 32, 8, 1), (128, 16, 16, 1), (256, 8, 32, 1), (256, 16, 8, 4), (512, 8, 16, 4))
"""Channels in and out, image size, images and groups of the convolutions."""
ACCELERATOR_IMAGES = 32
"""Times as many images on an accelerator, which a batch for a core would leave idle."""
TRIES = 5
PRODUCT = 768
ELEMENTS = 1 << 22
RANKS_SECONDS = 240.0


def calibrate(path: str) -> int:
    """Measures and writes the file ``path``; the exit status: 1 where a measurement failed.

    Raises:
        UsageError: the file cannot be written.
    """
    joined = launch.measure(LinkRequest(), 2, RANKS_SECONDS)
    of_cpu = not torch.accelerator.is_available()
    held = launch.measure(MemoryRequest(), 2, RANKS_SECONDS) if of_cpu else launch.Outcome[MemoryFigures]()
    for error in (joined.error, held.error):
        if error is not None:
            print(f"calibrate  {error}", flush=True)
            return 1
    device = measure(joined.ranks[0], held.ranks[0] if of_cpu else None)
    try:
        replace_file(path, json.dumps({"device": to_dict(device)}, indent=1) + "\n")
    except OSError as error:
        raise UsageError(f"--calibrate must be a file to write, got {path!r}: {error.strerror}") from None
    rates = ", ".join(f"{name} {rate / 1e9:.4g}" for name, rate in device.convolution.items())
    print(
        f"{device.name}: convolutions {rates} GFLOP/s, memory {device.bandwidth / 1e9:.4g} GB/s, "
        f"link {device.link / 1e9:.4g} GB/s, a process {device.fixed / 1e6:.4g} MB; wrote {path}"
    )
    return 0


def measure(link: LinkFigures, held: MemoryFigures | None) -> Device:
    """The device at hand, one core of it on a CPU, whose ranks have measured their link and, on a CPU, what they
    hold."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = torch.device("cpu") if found is None else found
    on_accelerator = device.type != "cpu"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        types = {"fp32": torch.float32, "bf16": torch.bfloat16}
        convolution = {name: _convolution(device, dtype) for name, dtype in types.items()}
        product = {name: _product(device, dtype) for name, dtype in types.items()}
        bandwidth, overhead = _bandwidth(device), _overhead(device)
    finally:
        torch.set_num_threads(threads)
    if on_accelerator:
        module = torch.get_device_module(device)
        name, memory, host = module.get_device_name(device), module.mem_get_info(device)[0], _to_host(device)
    else:
        name, memory, host = describe_machine()["cpu"], (available_bytes() or 2**30) / usable_cores(), bandwidth
    return Device(
        name=name,
        memory=float(memory),
        convolution=convolution,
        product=product,
        bandwidth=bandwidth,
        overhead=overhead,
        link=link["bytes_per_second"],
        latency=link["latency_seconds"],
        host=host,
        accelerator=on_accelerator,
        fixed=CONTEXT if held is None else float(held["plain"]),
        zero=0.0 if held is None else float(max(0, held["zero"] - held["plain"])),
        compiled=0.0 if held is None else max(0, held["many_shapes"] - held["zero"]) / _shapes(),
        source=f"measured {time.strftime('%Y-%m-%d')}",
    )


def _shapes() -> int:
    """Convolutions of different shapes in the larger of the networks that a rank has trained to tell what it holds."""
    model = create_model(LARGE, groups=2, num_classes=10, device="meta")
    images = torch.empty(IMAGES, 3, SIDE[LARGE], SIDE[LARGE], device="meta").to(memory_format=torch.channels_last)
    return trace(model, (images,), torch.sum, tensor_parallel=1, placements={}).convolutions


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of the fastest of several runs of ``work``: processor time on a CPU, which other work does not lengthen much."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    best = float("inf")
    for _ in range(TRIES + 1):
        began = clock()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        best = min(best, clock() - began)
    return max(best, 1e-9)


def _convolution(device: torch.device, dtype: torch.dtype) -> float:
    flops = seconds = 0.0
    for channels, size, images, groups in SHAPES:
        images *= ACCELERATOR_IMAGES if device.type != "cpu" else 1
        x = torch.randn(images, channels, size, size, device=device, dtype=dtype)
        weight = torch.randn(channels, channels // groups, 3, 3, device=device, dtype=dtype)
        x, weight = (each.to(memory_format=torch.channels_last).requires_grad_() for each in (x, weight))
        grad = torch.randn_like(x, requires_grad=False)

        def step(x: Tensor = x, weight: Tensor = weight, grad: Tensor = grad, groups: int = groups) -> None:
            torch.autograd.grad(F.conv2d(x, weight, padding=1, groups=groups), (x, weight), grad)

        flops += 3 * 2 * weight.numel() * images * size**2
        seconds += _seconds(step, device)
    return flops / seconds


def _product(device: torch.device, dtype: torch.dtype) -> float:
    size = PRODUCT * (4 if device.type != "cpu" else 1)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: left @ right, device)


def _bandwidth(device: torch.device) -> float:
    elements = ELEMENTS * (16 if device.type != "cpu" else 1)
    left, right, out = (torch.ones(elements, device=device) for _ in range(3))
    return 3 * left.nbytes / _seconds(lambda: torch.add(left, right, out=out), device)


def _overhead(device: torch.device) -> float:
    """Of an operator on next to nothing, with its gradient's part."""
    one = torch.ones(8, device=device, requires_grad=True)

    def work() -> None:
        for _ in range(100):
            (one * 2).sum().backward()

    return _seconds(work, device) / 500


def _to_host(device: torch.device) -> float:
    there = torch.ones(ELEMENTS, device=device)
    return there.nbytes / _seconds(lambda: there.cpu(), device)
