"""What every picture of measurements has in common: how it is begun and saved, and the line that says what it shows."""

from __future__ import annotations

import os
from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING

from tlgc_mp.host import Machine

if TYPE_CHECKING:
    from matplotlib.figure import Figure


COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")  # told apart by colour-blind readers too


def pyplot() -> ModuleType:
    """Matplotlib's, which draws into files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def machine_of(machine: Machine) -> str:
    """A machine in a few words."""
    accelerator = f"{machine['accelerator']} on " if machine.get("accelerator") else ""
    return f"{accelerator}{machine['cpu']}, {machine['cores']} cores"


def one_or_more(what: str, values: Iterable[object]) -> str:
    """``batch 8``, or ``batch 8, 4`` where a picture shows several; in the order in which they come."""
    return f"{what} {', '.join(str(value) for value in dict.fromkeys(values))}"


def caption(figure: Figure, *said: str) -> None:
    """Writes the conditions of a measurement above what is drawn."""
    figure.suptitle("; ".join(said), fontsize="small")


def save(figure: Figure, path: str) -> None:
    """Writes ``path.png`` and ``path.svg``, each whole or not at all."""
    for suffix in ("png", "svg"):
        figure.savefig(f"{path}.tmp.{suffix}", dpi=150)
        os.replace(f"{path}.tmp.{suffix}", f"{path}.{suffix}")
    pyplot().close(figure)


def rounded(value: float) -> str:
    """To three digits, and never as a power of ten: ``0.774``, ``12.3``, ``3,580``."""
    return f"{value:.3g}" if abs(value) < 999.5 else f"{float(f'{value:.3g}'):,.0f}"
