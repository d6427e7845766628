"""The plots of training runs: losses and test error against epoch, and test error against N."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

from tlgc_mp.figures import caption, machine_of, one_or_more, pyplot, save
from tlgc_mp.models.names import CONVOLUTIONS
from tlgc_mp.paper.printed import printed_rows
from tlgc_mp.paper.rows import LABELS, Row, Variant, variants_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_COLORS = dict(
    zip(CONVOLUTIONS, ("#000000", "#D55E00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#F0E442"), strict=True)
)
_MARKERS = dict(zip(CONVOLUTIONS, "*so^DvP", strict=True))


Curve = tuple[str, str, Callable[[Row], dict[int, float]]]


def _of_epochs(key: str) -> Callable[[Row], dict[int, float]]:
    return lambda row: {line["epoch"]: line[key] for line in row["epoch_lines"] if line.get(key) is not None}


CURVES: tuple[Curve, ...] = (
    ("loss", "training loss", _of_epochs("train_loss")),
    ("test-loss", "test loss", _of_epochs("test_loss")),
    ("test-error", "test error, %", _of_epochs("test_error_percent")),
)
"""(end of the file's name, label, what of a run against its epochs); training loss is the paper's Figure 4."""


def plot_epochs(rows: list[Row], curve: Curve, path: str) -> bool:
    """What ``curve`` says against epoch, of SC and of the others at each N, a panel for each; the band spans the seeds.

    Returns:
        Whether the runs have it; else nothing is written.
    """
    _, label, values_of = curve
    if not any(values_of(row) for row in rows):
        return False
    plt = pyplot()
    variants = variants_of(rows)
    panels = sorted({v.groups for v in variants if v.conv != "sc" and not v.departure}) or [1]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(2.8 + 2.4 * len(panels), 3.9), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, groups in zip(axes[0], panels, strict=True):
        for variant in (Variant("sc", 1), *(Variant(conv, groups) for conv in CONVOLUTIONS if conv != "sc")):
            found: dict[int, list[float]] = {}  # of each epoch, over the seeds that have it
            for row in variants.get(variant, []):
                for epoch, value in values_of(row).items():
                    found.setdefault(epoch, []).append(value)
            if found:
                epochs = sorted(found)
                columns = [found[epoch] for epoch in epochs]
                color = _COLORS[variant.conv]
                axis.fill_between(epochs, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.2)
                means = [statistics.mean(column) for column in columns]
                axis.plot(epochs, means, color=color, marker=_MARKERS[variant.conv], ms=4, label=LABELS[variant.conv])
        axis.set_title(f"N = {groups}", fontsize="medium")
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0][0].set_ylabel(label)
    axes[0][-1].legend(fontsize="small", title="mean; band: seeds" if len(rows) > len(variants) else None)
    _finish(figure, rows, path)
    return True


def plot_errors(rows: list[Row], path: str) -> None:
    """Test error of each convolution against N, with the seeds' standard deviation, and what the paper prints."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
    variants = {variant: group for variant, group in variants_of(rows).items() if not variant.departure}
    if len({variant.groups for variant in variants if variant.conv != "sc"}) <= 1:
        _bars(axis, variants, rows[0])
        _finish(figure, rows, path)
        return
    for conv in CONVOLUTIONS:
        points = {
            v.groups: [row["test_error_percent"] for row in group] for v, group in variants.items() if v.conv == conv
        }
        printed = _printed(rows[0], conv)
        color, marker = _COLORS[conv], _MARKERS[conv]
        if points:
            spread = [statistics.stdev(errors) if len(errors) > 1 else 0.0 for errors in points.values()]
            axis.errorbar(
                list(points),
                [statistics.mean(errors) for errors in points.values()],
                yerr=spread,
                color=color,
                marker=marker,
                capsize=3,
                label=LABELS[conv],
            )
        if printed:
            axis.plot(list(printed), list(printed.values()), color=color, marker=marker, mfc="none", ls=":", lw=1)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted({variant.groups for variant in variants}))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("N, number of groups")
    axis.set_ylabel("test error, %")
    axis.grid(alpha=0.3)
    if axis.get_lines() and any(line.get_linestyle() == ":" for line in axis.get_lines()):
        axis.plot([], [], color="gray", marker="o", mfc="none", ls=":", lw=1, label="dotted: the paper's")
    axis.legend(fontsize="small")
    _finish(figure, rows, path)


def _bars(axis: Axes, variants: dict[Variant, list[Row]], first: Row) -> None:
    """Test error of each convolution at the one N that was run."""
    names, marked = [], False
    for place, (variant, rows) in enumerate(variants.items()):
        errors = [row["test_error_percent"] for row in rows]
        spread = statistics.stdev(errors) if len(errors) > 1 else None
        color = _COLORS[variant.conv]
        bar = axis.bar(place, statistics.mean(errors), yerr=spread, color=color, alpha=0.8, capsize=4, width=0.6)
        axis.bar_label(bar, [f"{statistics.mean(errors):.2f}"], label_type="center", color="white")
        names.append(f"{LABELS[variant.conv]}\nN = {variant.groups}".replace(" prototype", "\nprototype"))
        paper = _printed(first, variant.conv).get(variant.groups)
        if paper is not None:
            said = "" if marked else "dashed: the paper's"
            axis.hlines(paper, place - 0.4, place + 0.4, color="black", ls="--", lw=1.2, label=said)
            marked = True
    axis.set_xticks(range(len(names)), names)
    axis.set_ylabel("test error, %")
    axis.grid(axis="y", alpha=0.3)
    if marked:
        axis.legend(fontsize="small")


def _printed(row: Row, conv: str) -> dict[int, float]:
    """N -> the test error that the paper prints for the network and data set of ``row``."""
    return {
        printed.groups: printed.errors[row["dataset"]]
        for printed in printed_rows()
        if printed.model == row["model"] and printed.conv == conv and row["dataset"] in printed.errors
    }


def _finish(figure: Figure, rows: list[Row], path: str) -> None:
    """Says under which conditions ``rows`` were trained, and saves the picture."""
    machines = dict.fromkeys(machine_of(row["machine"]) for row in rows)
    dtypes = dict.fromkeys(row["dtype"] for row in rows if row.get("dtype"))  # older rows do not say
    batch = one_or_more("batch", (row["batch_size"] for row in rows))
    caption(figure, f"{_title(rows[0])}\n{' and '.join(machines)}", batch, *dtypes)
    save(figure, path)


def _title(row: Row) -> str:
    size = "" if row["image_size"] is None else f", {row['image_size']} x {row['image_size']}"
    return f"{row['model']} on {row['dataset']}{size}, {count(row['epochs'], 'epoch')}"


def count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
