"""How GC-2L grows with w and N: time, memory and bytes of a rank, measured and by formula, as one figure.

It is drawn where a run measured gc-2l at N = P for at least two N and two w.
"""

from __future__ import annotations

import os

from tlgc_mp.bench.scaling import capacity
from tlgc_mp.bench.scaling.rows import Row
from tlgc_mp.bench.settings import IMAGE_SIZE
from tlgc_mp.figures import COLORS, caption, machine_of, one_or_more, pyplot, save
from tlgc_mp.host import Machine

_BYTES_A_PARAMETER = 12  # itself, its gradient, its momentum, in float32


def coarse_bytes(depth: int, batch_size: int, shared: int) -> int:
    """What the coarse level of a step brings to a rank on one host, in float32: of every two-level layer, ``shared``
    maps forward, N r or the r sums, and as many gradients back."""
    units = (depth - 4) // 6
    positions = sum((2 * units + 1) * (IMAGE_SIZE >> stage) ** 2 for stage in range(3))
    return 2 * 4 * shared * batch_size * positions


def curves(rows: list[Row]) -> dict[int, list[Row]]:
    """N -> the rows of gc-2l at N = P, by w; empty where there is too little to see growth in."""
    found: dict[int, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["width"]):
        if row["strategy"] == "gc-2l" and row["groups"] == row["tp"] and row["median_step_seconds"]:
            found.setdefault(row["groups"], []).append(row)
    widths = {row["width"] for line in found.values() for row in line}
    return dict(sorted(found.items())) if len(found) > 1 and len(widths) > 1 else {}


def formulas(row: Row) -> dict[str, float]:
    """CPU seconds of a step at the best rate, MB of parameters, gradients and momentum, and MB of the coarse level, of
    a rank."""
    dial = row["coarse_channels"], row["coarse_sum"]
    parameters = capacity.parameter_count(row["depth"], row["width"], "gc-2l", row["groups"], *dial) / row["tp"]
    shared = dial[0] * (1 if dial[1] else row["groups"])
    return {
        "seconds": row["flops_per_rank"] / row["best_flops_per_second"],
        "memory": _BYTES_A_PARAMETER * parameters / 1e6,
        "bytes": coarse_bytes(row["depth"], row["batch_size"], shared) / 1e6 if row["tp"] > 1 else 0.0,
    }


def plot(rows: list[Row], machine: Machine, folder: str) -> None:
    """Writes ``growth.png`` and ``growth.svg`` to ``folder``, if ``rows`` show growth."""
    lines = curves(rows)
    if not lines:
        return
    plt = pyplot()
    from matplotlib.lines import Line2D

    panels = (
        ("CPU seconds of a step, a rank", "seconds", "busy_cpu_seconds", 1.0),
        ("peak memory a rank, MB", "memory", "peak_memory_bytes", 1e6),
        ("MB in collectives a step, a rank", "bytes", "collective_bytes", 1e6),
    )
    figure, all_axes = plt.subplots(1, len(panels), figsize=(10.5, 3.8), layout="constrained")
    for axes, (label, formula, key, unit) in zip(all_axes, panels, strict=True):
        for color, (groups, line) in zip(COLORS, lines.items(), strict=False):
            if formula == "bytes" and groups == 1:
                continue
            at = [row["width"] for row in line]
            axes.plot(at, [row[key] / unit for row in line], color=color, marker="o")
            axes.plot(at, [formulas(row)[formula] for row in line], color=color, ls="--", lw=1)
        axes.set_xlabel("w")
        axes.set_ylabel(label)
        axes.set_yscale("log", base=2)
        axes.set_xticks(sorted({row["width"] for line in lines.values() for row in line}))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
    handles = [
        Line2D([], [], color=color, marker="o", label=f"N = P = {groups}")
        for color, groups in zip(COLORS, lines, strict=False)
    ]
    formula = f"by formula: FLOP at the best rate, {_BYTES_A_PARAMETER} bytes a parameter, the coarse level"
    handles.append(Line2D([], [], color="gray", ls="--", lw=1, label=formula))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize="small")
    drawn = [row for line in lines.values() for row in line]
    batches = one_or_more("batch", (row["batch_size"] for row in drawn))
    caption(figure, "GC-2L", machine_of(machine), batches, ", ".join(dict.fromkeys(row["dtype"] for row in drawn)))
    save(figure, os.path.join(folder, "growth"))
