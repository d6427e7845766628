"""The plots of training runs: training loss against epoch, and test error against N."""

from __future__ import annotations

import os
import statistics
from typing import Any

from tlgc_mp.models.names import CONVOLUTIONS
from tlgc_mp.paper.printed import printed_rows
from tlgc_mp.paper.rows import LABELS, Row, Variant, variants_of

_COLORS = dict(zip(CONVOLUTIONS, ("#000000", "#D55E00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7"), strict=True))
_MARKERS = dict(zip(CONVOLUTIONS, "*so^Dv", strict=True))


def plot_losses(rows: list[Row], path: str) -> None:
    """Training loss of SC, GC and GC-2L against epoch, a panel for each N; the band spans the seeds (Figure 4)."""
    plt = _pyplot()
    variants = variants_of(rows)
    counts = sorted({v.groups for v in variants if v.conv in ("gc", "gc-2l") and not v.departure})
    panels = counts or [1]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(2.2 + 2.4 * len(panels), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, groups in zip(axes[0], panels, strict=True):
        for variant in (Variant("sc", 1), Variant("gc", groups), Variant("gc-2l", groups)):
            losses: dict[int, list[float]] = {}  # of each epoch, over the seeds that have it
            for row in variants.get(variant, []):
                for line in row["epoch_lines"]:
                    losses.setdefault(line["epoch"], []).append(line["train_loss"])
            if losses:
                epochs = sorted(losses)
                columns = [losses[epoch] for epoch in epochs]
                color = _COLORS[variant.conv]
                axis.fill_between(epochs, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.2)
                means = [statistics.mean(column) for column in columns]
                axis.plot(epochs, means, color=color, marker=_MARKERS[variant.conv], ms=4, label=LABELS[variant.conv])
        axis.set_title(f"N = {groups}", fontsize="medium")
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0][0].set_ylabel("training loss")
    axes[0][-1].legend(fontsize="small")
    figure.suptitle(_title(rows[0]), fontsize="medium")
    _save(figure, path)


def plot_errors(rows: list[Row], path: str) -> None:
    """Test error of each convolution against N, with the seeds' standard deviation, and what the paper prints."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    variants = {variant: group for variant, group in variants_of(rows).items() if not variant.departure}
    for conv in CONVOLUTIONS:
        points = {
            v.groups: [row["test_error_percent"] for row in group] for v, group in variants.items() if v.conv == conv
        }
        printed = {
            row.groups: row.errors[rows[0]["dataset"]]
            for row in printed_rows()
            if row.model == rows[0]["model"] and row.conv == conv and rows[0]["dataset"] in row.errors
        }
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
    axis.set_title(_title(rows[0]), fontsize="medium")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    _save(figure, path)


def _title(row: Row) -> str:
    size = "" if row["image_size"] is None else f", {row['image_size']} x {row['image_size']}"
    return f"{row['model']} on {row['dataset']}{size}, {count(row['epochs'], 'epoch')}"


def count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def _save(figure: Any, path: str) -> None:
    for suffix in ("png", "svg"):
        figure.savefig(f"{path}.tmp.{suffix}", dpi=150)
        os.replace(f"{path}.tmp.{suffix}", f"{path}.{suffix}")
    _pyplot().close(figure)
