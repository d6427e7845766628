"""The formulas of growth, and the figure made with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.bench import fabricated
from tlgc_mp.bench.scaling import growth
from tlgc_mp.models import create_model
from tlgc_mp.nn import TwoLevelConv2d
from tlgc_mp.parallel.plan import parameter_counts


@pytest.mark.parametrize(("depth", "width", "groups"), [(10, 2, 2), (16, 3, 4)])
def test_formulas_are_those_of_the_layers(depth: int, width: int, groups: int) -> None:
    model = create_model(f"wrn-{depth}-{width}", groups=groups, device="meta")
    maps = 0

    def see(layer: TwoLevelConv2d, inputs: object, output: object) -> None:
        nonlocal maps
        maps += output.shape[0] * output.shape[2] * output.shape[3]  # type: ignore[attr-defined]

    for module in model.modules():
        if isinstance(module, TwoLevelConv2d):
            module.register_forward_hook(see)

    model(torch.empty(8, 3, 32, 32, device="meta"))
    assert growth.coarse_bytes(depth, 8, groups) == 2 * 4 * groups * maps

    row = {**fabricated.row("gc-2l", width, groups, 1.0, 1.0), "depth": depth}
    share = parameter_counts(model, groups)["per_rank"]
    assert growth.formulas(row)["memory"] == pytest.approx(12 * share / 1e6, rel=1e-3)  # but for the head's bias
    assert growth.formulas(row)["seconds"] == 1e9 / 2e9
    assert growth.formulas(fabricated.row("gc-2l", width, 1, 1.0, 1.0))["bytes"] == 0


def test_figure_where_there_is_growth(tmp_path: Path) -> None:
    rows = [fabricated.row("gc-2l", width, ranks, 1.0, width / ranks**2) for width in (10, 20) for ranks in (1, 2)]
    assert {groups: [row["width"] for row in line] for groups, line in growth.curves(rows).items()} == {
        1: [10, 20],
        2: [10, 20],
    }
    growth.plot(rows, fabricated.DESCRIPTION["machine"], str(tmp_path))
    assert (tmp_path / "growth.png").stat().st_size > 10_000
    assert "<svg" in (tmp_path / "growth.svg").read_text()
    for too_few in (rows[:2], rows[::2], [fabricated.row("gc", 10, 2, 1.0, 1.0)]):
        assert not growth.curves(too_few)
