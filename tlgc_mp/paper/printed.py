"""Every figure printed in Tables 1 to 4 of *Two-level Group Convolution*, https://arxiv.org/abs/2110.05060."""

from __future__ import annotations

import csv
import functools
import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Printed:
    """One row of one of the tables.

    Attributes:
        classes: of the data set on which the parameters are counted.
        parameters: in millions, as it is printed, so with as many decimals.
        errors: data set -> test error in percent.
        hours: of wall clock for 200 epochs; ``None`` where none are printed.
    """

    table: int
    model: str
    classes: int
    conv: str
    groups: int
    parameters: str
    errors: dict[str, float]
    hours: float | None


@functools.cache
def printed_rows() -> tuple[Printed, ...]:
    """All 56 rows, in the tables' order."""
    with open(os.path.join(os.path.dirname(__file__), "paper_tables.csv"), encoding="utf-8", newline="") as file:
        return tuple(
            Printed(
                table=int(row["table"]),
                model=row["model"],
                classes=int(row["dataset_classes"]),
                conv=row["conv"],
                groups=int(row["groups"]),
                parameters=row["params_millions_printed"],
                errors={
                    name: float(row[f"error_rate_percent_{name}"])
                    for name in ("cifar10", "cifar100", "imagenet")
                    if row[f"error_rate_percent_{name}"]
                },
                hours=float(row["wall_clock_hours"]) if row["wall_clock_hours"] else None,
            )
            for row in csv.DictReader(file)
        )
