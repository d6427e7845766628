"""The arithmetic of a step, against torch's counter for the dense network and against the paper's formulas by hand."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tlgc_mp.bench.scaling.flops import layer_flops
from tlgc_mp.models import create_model

BATCH = 3


@pytest.mark.parametrize("name", ["wrn-10-1", "wrn-16-2"])
def test_flops_of_the_dense_network_are_those_that_torch_counts(name: str) -> None:
    model = create_model(name, conv="sc", device="meta")
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(BATCH, 3, 32, 32, device="meta")).sum().backward()
    assert sum(layer_flops(name, "sc", 1, BATCH).values()) == counter.get_total_flops() > 0


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    ("conv", "dial"),
    [("gc", ()), ("gc-2l", ()), ("gc-2l", (3, False)), ("gc-2l", (2, True)), ("shuffle", ()), ("bgc", ())],
)
def test_flops_of_groups_are_those_of_the_formulas(conv: str, dial: tuple[int, bool], groups: int) -> None:
    """WRN-10-2, by hand: (n, m, d, h = w) of its convolutions."""
    layers = [
        *((16, 32, 3, 32), (32, 32, 3, 32), (16, 32, 1, 32)),
        *((32, 64, 3, 16), (64, 64, 3, 16), (32, 64, 1, 16)),
        *((64, 128, 3, 8), (128, 128, 3, 8), (64, 128, 1, 8)),
    ]
    multiplications = 3 * 128 * 10 + 2 * 9 * 3 * 16 * 32 * 32  # head; stem, without the gradient of the images
    for n, m, d, side in layers:
        count, summed = dial or (1, False)
        # R_0 and S_k of Equation (3.5)
        coarse = count * (d * d * n + m * (1 if summed else groups)) if conv == "gc-2l" else 0
        coarse += d * d * n * m // groups if conv == "bgc" else 0
        multiplications += 3 * (d * d * n * m // groups + coarse) * side * side
    assert sum(layer_flops("wrn-10-2", conv, groups, BATCH, *dial).values()) == 2 * BATCH * multiplications


def test_layers_go_by_their_names() -> None:
    flops = layer_flops("wrn-10-1", "sc", 1, BATCH)
    assert flops["units.0.conv1"] == 3 * 2 * BATCH * 9 * 16 * 16 * 32 * 32
    assert flops["head"] == 3 * 2 * BATCH * 64 * 10
    assert len(flops) == 1 + 6 + 2 + 1  # stem, six 3x3, two shortcuts (the first unit's is the identity), head
