"""The parameter counts that the paper prints, to the digit, and what one of N processors holds.

The column "parameters per processor" of the paper's Table 1 holds the totals, as Table 3 calls them.
"""

import json
from collections.abc import Iterator

import pytest

from tlgc_mp.cli.main import main
from tlgc_mp.models import create_model
from tlgc_mp.paper.printed import Printed, printed_rows
from tlgc_mp.parallel.plan import parameter_counts

ROWS = printed_rows()


def test_every_row_of_the_tables_is_here() -> None:
    assert [sum(row.table == number for row in ROWS) for number in (1, 2, 3, 4)] == [18, 9, 16, 13]


def row_id(row: Printed) -> str:
    return f"table{row.table}-{row.model}-{row.conv}-{row.groups}"


@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_printed_total(row: Printed, capsys: pytest.CaptureFixture[str]) -> None:
    """And of N ranks each holds a share that is no total: an N-th but for the bias of the head."""
    flags = ["--model", row.model, "--conv", row.conv, "--groups", str(row.groups), "--num-classes", str(row.classes)]
    ranks = 1 if row.conv == "flgc" else row.groups
    assert main(["params", *flags, "--tp", str(ranks)]) == 0
    counts = json.loads(capsys.readouterr().out)
    decimals = len(row.parameters.partition(".")[2])
    assert f"{counts['total'] / 1e6:.{decimals}f}" == row.parameters
    assert ranks * (counts["per_rank"] - row.classes) == counts["total"] - row.classes


@pytest.mark.parametrize(("name", "count"), [("imagenet-wrn-34-2", 86_032_168), ("mobilenet_v2", 3_504_872)])
def test_dense_networks_for_imagenet(name: str, count: int) -> None:
    assert parameter_counts(create_model(name, conv="sc", device="meta"), 1)["total"] == count


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_coarse_level_everywhere(groups: int) -> None:
    """The last 1x1 convolution of MobileNetV2 gets 320 restriction weights and a prolongation of 1280 x N."""
    counts = [
        parameter_counts(create_model("mobilenet_v2", groups=groups, coarse_everywhere=flag, device="meta"), groups)
        for flag in (False, True)
    ]
    assert counts[1]["total"] - counts[0]["total"] == 320 + 1280 * groups
    assert counts[1]["per_rank"] - counts[0]["per_rank"] == 320 // groups + 1280


def convolutions(width: int) -> Iterator[tuple[int, int, int]]:
    """(d, n, m) of every convolution of WRN-28-``width`` but the stem: four units a stage, Section 4.1."""
    n = 16
    for m in (16 * width, 32 * width, 64 * width):
        yield from [(3, n, m), *[(3, m, m)] * 7]
        if n != m:
            yield 1, n, m
        n = m


def batch_norm_channels(width: int) -> int:
    """Of all BatchNorm layers together: one before each 3x3 convolution, one before the head."""
    return sum(n for d, n, _ in convolutions(width) if d == 3) + 64 * width


@pytest.mark.parametrize("groups", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("conv", ["gc", "gc-2l"])
@pytest.mark.parametrize("width", [1, 10, 40])
def test_share_of_one_of_n_processors(width: int, conv: str, groups: int) -> None:
    layers = 0
    for d, n, m in convolutions(width):
        layers += d * d * m * n // groups**2
        if conv == "gc-2l":
            layers += d * d * n // groups + m  # d0 = d
    stem = 9 * 3 * 16 // groups
    batch_norm = 2 * batch_norm_channels(width) // groups
    head = 64 * width // groups * 10 + 10
    model = create_model(f"wrn-28-{width}", conv=conv, groups=groups, device="meta")
    assert parameter_counts(model, groups)["per_rank"] == layers + stem + batch_norm + head
