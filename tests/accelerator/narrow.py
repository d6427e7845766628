"""Narrow groups on one device: a two-level layer beside the dense and the group convolution of its channels.

    python -m tests.accelerator.narrow cuda --points 40

prints a JSON list, a row a point, of milliseconds of forward and backward: medians of turns over the three layers.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from typing import Any

import torch
from torch import nn

from tlgc_mp.nn import TwoLevelConv2d

SEED, TURNS = 11, 7
KINDS = ("dense", "group", "two-level")


def points(count: int, batches: tuple[int, ...]) -> list[dict[str, Any]]:
    """The same for everyone who asks for as many."""
    chance = random.Random(SEED)
    return [
        {
            "channels": chance.choice((16, 32, 64, 128, 256, 512)),
            "groups": chance.choice((2, 4, 8, 16)),
            "kernel": chance.choice((1, 3)),
            "side": chance.choice((8, 14, 28, 56)),
            "batch": chance.choice(batches),
            "dtype": chance.choice(("float32", "bfloat16")),
            "channels_last": chance.random() < 0.5,
        }
        for _ in range(count)
    ]


def measure(point: dict[str, Any], device: torch.device) -> dict[str, float]:
    """Kind of layer -> milliseconds of a call, forward and backward."""
    channels, kernel, side = point["channels"], point["kernel"], point["side"]
    shared = {"padding": kernel // 2, "bias": False, "device": device, "dtype": getattr(torch, point["dtype"])}
    layers: tuple[nn.Module, ...] = (
        nn.Conv2d(channels, channels, kernel, **shared),
        nn.Conv2d(channels, channels, kernel, groups=point["groups"], **shared),
        TwoLevelConv2d(channels, channels, kernel, groups=point["groups"], **shared),
    )
    form = torch.channels_last if point["channels_last"] else torch.contiguous_format
    x = torch.randn(point["batch"], channels, side, side, device=device, dtype=shared["dtype"])
    x = x.contiguous(memory_format=form).requires_grad_()
    grad = torch.randn_like(x)
    samples: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(TURNS + 1):
        for kind, layer in zip(KINDS, layers, strict=True):
            _wait(device)
            began = time.perf_counter()
            layer(x).backward(grad)
            _wait(device)
            if turn > 0:  # the first sets up
                samples[kind].append(1e3 * (time.perf_counter() - began))
    return {kind: statistics.median(times) for kind, times in samples.items()}


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("device")
    parser.add_argument("--points", type=int, default=40)
    options = parser.parse_args()
    on = torch.device(options.device)
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    asked = points(options.points, (1, 16) if on.type == "cpu" else (16, 128))
    print(json.dumps([{**point, **measure(point, on)} for point in asked]))
