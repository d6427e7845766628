"""What a measurement needs of the machine's memory, in bytes, before it is started. Loads no torch.

All ranks share one machine, so what counts is their sum. These are estimates: a measurement that is known not to fit
costs nothing, and one that turns out not to ends in an error of its own (the kernel ends its ranks first).
"""

from __future__ import annotations

import psutil

from tlgc_mp.bench.settings import IMAGE_SIZE, NUM_CLASSES, Case

PROCESS_BYTES = 600 << 20
"""Of one rank: torch, deepspeed, and the work space of a convolution."""

FILTER_COPIES = 3
"""Copies of a layer's filters and of their gradient in the format that the convolution works in, at most."""

SAVED_MAPS = 8
"""Feature maps of its output's size that a residual unit keeps for backward or works with, at most."""


def parameter_count(
    depth: int, width: int, conv: str, groups: int, coarse_channels: int = 1, coarse_sum: bool = False
) -> int:
    """Parameters of WideResNet-``depth``-``width``: ``conv`` is ``"sc"``, ``"gc"``, ``"bgc"`` or ``"gc-2l"``, in N
    groups; with r representatives each, which may be summed."""
    shared = coarse_channels * (1 if coarse_sum else groups)

    def layer(channels_in: int, channels_out: int, kernel: int) -> int:
        coarse = kernel**2 * channels_in * coarse_channels + channels_out * shared if conv == "gc-2l" else 0
        return (2 if conv == "bgc" else 1) * kernel**2 * channels_in * channels_out // groups + coarse

    total = 3 * 9 * 16
    channels = 16
    for stage_channels in (16 * width, 32 * width, 64 * width):
        for unit in range((depth - 4) // 6):
            total += 2 * channels + layer(channels, stage_channels, 3)
            total += 2 * stage_channels + layer(stage_channels, stage_channels, 3)
            if unit == 0 and (channels != stage_channels or stage_channels > 16 * width):
                total += layer(channels, stage_channels, 1)
            channels = stage_channels
    return total + 2 * channels + (channels + 1) * NUM_CLASSES


def activation_bytes(depth: int, width: int, batch_size: int, checkpointing: bool = False) -> int:
    """What backward needs of a forward pass over ``batch_size`` images, over all ranks; with activation checkpointing
    the input of each residual unit, and all that one of the widest keeps."""
    units = (depth - 4) // 6
    positions = batch_size * IMAGE_SIZE**2
    maps = units * (16 * width * positions + 32 * width * positions // 4 + 64 * width * positions // 16)
    return 4 * (maps + SAVED_MAPS * 16 * width * positions) if checkpointing else 4 * SAVED_MAPS * maps


def needed_bytes(case: Case, momentum: bool, update_in_backward: bool = False) -> int:
    """What all ranks of a measurement of ``case`` need together.

    Args:
        momentum: whether SGD keeps momentum.
        update_in_backward: whether each gradient is let go as soon as its parameter has been stepped.
    """
    count = parameter_count(case.depth, case.width, case.conv, case.groups, case.coarse_channels, case.coarse_sum)
    activations = activation_bytes(case.depth, case.width, case.batch_size, case.activation_checkpointing)
    held = (4 + 4 * momentum + 4 * (not update_in_backward)) * count
    held += FILTER_COPIES * 4 * 9 * (64 * case.width) ** 2 // case.groups
    if case.strategy == "zero3":
        # ZeRO keeps a second copy of each partition, and every replica begins with all parameters.
        held = max(held + 4 * count, (4 * case.ranks + 4) * count)
    if case.strategy == "channel-parallel":
        activations *= case.ranks  # every rank keeps the gathered inputs
    return held + activations + case.ranks * PROCESS_BYTES


def available_bytes() -> int:
    """Memory that new processes can have, of the machine and of this process's control group."""
    limits = [psutil.virtual_memory().available]
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit_file:
            limit = limit_file.read().strip()
        with open("/sys/fs/cgroup/memory.current", encoding="ascii") as used_file:
            used = int(used_file.read())
        if limit != "max":
            limits.append(int(limit) - used)
    except (OSError, ValueError):
        pass
    return int(min(limits))
