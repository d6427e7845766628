"""The rows of a run -> a Markdown file beside the paper's Table 2, and a plot.

The paper's figures are those of Table 2 of *Two-level Group Convolution* (https://arxiv.org/abs/2110.05060):
WideResNet-28-w on CIFAR-10, hours of wall clock for 200 epochs. Its dense network ran on one GPU at w = 40 and under
naive model parallelism at w = 60 and 80; its GC-2L network on N GPUs.
"""

from __future__ import annotations

import os

from tlgc_mp.bench.scaling import growth
from tlgc_mp.bench.scaling.rows import Row
from tlgc_mp.figures import COLORS, caption, machine_of, one_or_more, pyplot, rounded, save
from tlgc_mp.host import Machine, Provenance, replace_file
from tlgc_mp.models.names import parse_model
from tlgc_mp.paper.printed import printed_rows

PAPER_HOURS = {(parse_model(row.model)[1], row.groups): row.hours for row in printed_rows() if row.hours is not None}
"""(w, N) -> hours, as printed in Table 2; N = 1 is the dense network."""


def paper_speed_up(width: int, groups: int) -> float | None:
    """How many times faster than the dense network the paper's GC-2L network is; ``None`` where it prints none."""
    if groups < 2 or (width, groups) not in PAPER_HOURS:
        return None
    return PAPER_HOURS[width, 1] / PAPER_HOURS[width, groups]


def arithmetic_limit(row: Row) -> int:
    """How many times faster than naive model parallelism ``row``'s strategy could be by arithmetic alone, with a device
    a rank: N P, since each of P devices does 1 / (N P) of the work, and one device at a time does all of it."""
    return 1 if row["strategy"] == "naive-mp" else row["groups"] * row["tp"]


def baseline(row: Row, rows: list[Row]) -> Row | None:
    """The row of naive model parallelism to compare ``row`` with: at the same number of ranks if there is one."""
    found = [
        other
        for other in rows
        if other["strategy"] == "naive-mp"
        and other["median_step_seconds"]
        and all(other[key] == row[key] for key in ("width", "depth", "dtype", "batch_size", "momentum"))
    ]
    return min(found, key=lambda other: (other["tp"] != row["tp"], other["tp"]), default=None)


def speed_up(row: Row, rows: list[Row], clock: str = "median_step_seconds") -> float | None:
    """Naive model parallelism's step over that of ``row``, by ``row``'s wall clock or its ``busy_cpu_seconds``.

    ``None`` where there is nothing to compare with.
    """
    dense = baseline(row, rows)
    return dense["median_step_seconds"] / row[clock] if dense is not None and row[clock] else None


def write(rows: list[Row], description: Provenance, folder: str) -> None:
    """Writes ``scaling.md``, the plot ``scaling`` and, where there is growth to see, ``growth`` to ``folder``.

    Args:
        description: of the run, as ``run.json`` holds it.
    """
    replace_file(os.path.join(folder, "scaling.md"), markdown(rows, description))
    measured = [row for row in rows if row["median_step_seconds"]]
    if len({row["width"] for row in measured}) == 1:
        _plot_bars(measured, description["machine"], folder)
    else:
        _plot(rows, description["machine"], folder)
    growth.plot(rows, description["machine"], folder)


def markdown(rows: list[Row], description: Provenance) -> str:
    """All figures of ``rows``, as tables."""
    parts = [
        "# Scaling",
        "",
        *describe(description),
        "",
        "## Beside the paper's Table 2",
        "",
        "Times faster than the dense network under naive model parallelism (naive-mp), wall clock. Paper: hours of the "
        "dense network over hours of GC-2L, as printed. Arithmetic: N P, with a device a rank. CPU: naive-mp's step "
        "over the CPU seconds of the busiest rank, which is what counts where ranks share a core.",
        "",
        *table(_COMPARISON, [_comparison(row, rows) for row in rows]),
    ]
    remarks = [(row, row[key]) for row in rows for key in ("note", "error") if row[key]]
    if remarks:
        parts += ["", *(f"- {_name(row)}, w={row['width']}, P={row['tp']}: {text}" for row, text in remarks)]
    parts += ["", "## Time", "", *table(_TIME, [_time(row) for row in rows])]
    parts += ["", "## Memory of a rank, MB", "", *table(_MEMORY, [_memory(row) for row in rows])]
    measured = [row for row in rows if row["accounting"]]
    if measured:
        kinds = tuple(measured[0]["accounting"])
        lines = [[*_head(row), *(f"{row['accounting'][kind]:.3f}" for kind in kinds)] for row in measured]
        parts += ["", "## Where a step goes, s, of the busiest rank under a profiler", ""]
        parts += table(("w", "strategy", "N", "P", *kinds), lines)
    return "\n".join(parts) + "\n"


def describe(description: Provenance) -> list[str]:
    """The lines that say where figures come from: machine, versions, commit, date and command."""
    machine = description["machine"]
    memory = f", {machine['memory_bytes'] / 2**30:.0f} GiB" if machine["memory_bytes"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in description["versions"].items())
    changed = " with uncommitted changes" if description["uncommitted_changes"] else ""
    return [
        f"Machine: {machine_of(machine)}{memory}. {versions}. "
        f"Commit {description['commit'] or 'not known'}{changed}. {description['date']}.",
        "",
        f"    {' '.join(description['command'])}",
    ]


_COMPARISON = (
    "w",
    "strategy",
    "N",
    "P",
    "batch",
    "dtype",
    "momentum",
    "step, s",
    "faster",
    "paper",
    "arithmetic",
    "CPU, times",
    "h for 200 epochs",
    "paper, h",
)


def _comparison(row: Row, rows: list[Row]) -> list[str]:
    printed = None
    of_paper = row["coarse_channels"] == 1 and not row["coarse_sum"] and row["depth"] == 28
    if row["strategy"] == "gc-2l" and row["groups"] == row["tp"] and of_paper:
        printed = row["groups"]
    elif row["strategy"] == "naive-mp" and row["depth"] == 28:
        printed = 1
    return [
        *_head(row),
        str(row["batch_size"]),
        row["dtype"],
        f"{row['momentum']:g}",
        _number(row["median_step_seconds"], 3),
        _number(speed_up(row, rows), 2),
        _number(paper_speed_up(row["width"], printed) if printed else None, 2),
        str(arithmetic_limit(row)),
        _number(speed_up(row, rows, "busy_cpu_seconds"), 2),
        _number(row["hours_for_200_epochs"], 1),
        _number(PAPER_HOURS.get((row["width"], printed)) if printed else None, 1),
    ]


_TIME = (
    "w",
    "strategy",
    "N",
    "P",
    "step, s",
    "images/s",
    "busy CPU, s",
    "busy device, s",
    "GFLOP a rank",
    "GFLOP/s",
    "best GFLOP/s",
    "share",
    "in collectives, s",
    "of it coarse, s",
    "collectives, MB",
)


def _time(row: Row) -> list[str]:
    return [
        *_head(row),
        _number(row["median_step_seconds"], 3),
        _number(row["images_per_second"], 2),
        _number(row["busy_cpu_seconds"], 3),
        _number(row["busy_device_seconds"], 3),
        _number(row["flops_per_rank"], 1, 1e9),
        _number(row["achieved_flops_per_second"], 1, 1e9),
        _number(row["best_flops_per_second"], 1, 1e9),
        _number(row["achieved_share"], 2),
        _number(row["collective_seconds"], 3),
        _number(row["coarse_seconds"], 3),
        _number(row["collective_bytes"], 2, 1e6),
    ]


_MEMORY = ("w", "strategy", "N", "P", "peak", "parameters", "gradients", "optimizer", "activations")


def _memory(row: Row) -> list[str]:
    kinds = ("peak_memory_bytes", "parameter_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes")
    return [*_head(row), *(_number(row[kind], 1, 1e6) for kind in kinds)]


def _head(row: Row) -> list[str]:
    return [str(row["width"]), _name(row), str(row["groups"]), str(row["tp"])]


def _name(row: Row) -> str:
    if row["strategy"] == "pipeline":
        return f"pipeline, {row['micro_batches']} micro-batches"
    words = [row["strategy"]]
    words += [f"r = {row['coarse_channels']}"] if row["coarse_channels"] != 1 else []
    words += ["summed"] if row["coarse_sum"] else []
    return ", ".join([*words, *(["activation checkpointing"] if row["activation_checkpointing"] else [])])


def _number(value: float | None, digits: int, unit: float = 1.0) -> str:
    return "" if value is None else f"{value / unit:.{digits}f}"


def table(head: tuple[str, ...], lines: list[list[str]]) -> list[str]:
    """A Markdown table, line by line."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)]


def _curve(points: list[Row], rows: list[Row], clock: str) -> list[float]:
    """The speed-up of each of ``points``, all of which have one."""
    return [times for row in points if (times := speed_up(row, rows, clock)) is not None]


def _plot(rows: list[Row], machine: Machine, folder: str) -> None:
    """Speed-up over naive model parallelism against w: measured, the paper's, and what arithmetic allows."""
    plt = pyplot()
    from matplotlib.lines import Line2D

    lines: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        if row["strategy"] == "gc-2l" and speed_up(row, rows) is not None:
            lines.setdefault((row["groups"], row["tp"]), []).append(row)
    widths = sorted({row["width"] for row in rows})
    limits: dict[int, str] = {}
    handles = []
    figure, axes = plt.subplots(figsize=(7.0, 4.6), layout="constrained")
    for color, (groups, ranks) in zip(COLORS * len(lines), sorted(lines), strict=False):
        points = sorted(lines[groups, ranks], key=lambda row: row["width"])
        at = [row["width"] for row in points]
        name = f"N = P = {groups}" if groups == ranks else f"N = {groups}, P = {ranks}"
        axes.plot(at, _curve(points, rows, "median_step_seconds"), color=color, marker="o")
        handles.append(Line2D([], [], color=color, marker="o", label=f"GC-2L, {name}"))
        if ranks > machine["cores"]:
            axes.plot(at, _curve(points, rows, "busy_cpu_seconds"), color=color, marker="s", ls=":")
            handles.append(Line2D([], [], color=color, marker="s", ls=":", label=f"GC-2L, {name}, by CPU seconds"))
        if groups == ranks:
            paper = [(w, times) for w in widths if (times := paper_speed_up(w, groups)) is not None]
            if paper:
                axes.plot(*zip(*paper, strict=True), color=color, marker="D", mfc="none", ls="none", ms=8)
                handles.append(
                    Line2D([], [], color=color, marker="D", mfc="none", ls="none", label=f"paper, N = {groups}")
                )
        limits[arithmetic_limit(points[0])] = color
    for limit, color in limits.items():
        axes.axhline(limit, color=color, ls="--", lw=1)
        axes.annotate(
            f"arithmetic allows N P = {limit}",
            (0.0, limit),
            xycoords=("axes fraction", "data"),
            xytext=(4, 3),
            textcoords="offset points",
            ha="left",
            va="bottom",
            fontsize="small",
            color=color,
        )
    axes.set_yscale("log", base=2)
    axes.set_ylim(0.9, 1.35 * max(limits, default=4))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(widths)
    axes.set_xlim(min(widths) - 5, max(widths) + 5)
    axes.set_xlabel("w, widening factor of the WideResNet")
    axes.set_ylabel("times faster than naive model parallelism")
    axes.grid(alpha=0.3)
    if handles:
        axes.legend(
            handles=handles, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False
        )
    caption(figure, *_conditions(rows, machine))
    save(figure, os.path.join(folder, "scaling"))


def _plot_bars(rows: list[Row], machine: Machine, folder: str) -> None:
    """At one w: a step of every strategy, its peak memory, and what it sends."""
    plt = pyplot()
    compared = any(speed_up(row, rows) is not None for row in rows)
    panels = (
        ("a step, s" + " (times faster than naive-mp)" * compared, "median_step_seconds", 1.0),
        ("peak memory a rank, MB", "peak_memory_bytes", 1e6),
        ("in collectives a step, a rank, MB", "collective_bytes", 1e6),
    )
    figure, all_axes = plt.subplots(
        1, len(panels), figsize=(10.5, 1.4 + 0.42 * len(rows)), sharey=True, layout="constrained"
    )
    names = [f"{_name(row)}, N = {row['groups']}, P = {row['tp']}" for row in rows]
    colors = dict(zip(dict.fromkeys(row["strategy"] for row in rows), COLORS * len(rows), strict=False))
    for axes, (label, key, unit) in zip(all_axes, panels, strict=True):
        values = [(row[key] or 0) / unit for row in rows]
        said = ["" if row[key] is None else rounded(row[key] / unit) for row in rows]
        if key == "median_step_seconds":
            times = [speed_up(row, rows) for row in rows]
            said = [text if n is None else f"{text} ({n:.2f})" for text, n in zip(said, times, strict=True)]
        bars = axes.barh(range(len(rows)), values, color=[colors[row["strategy"]] for row in rows])
        axes.bar_label(bars, said, padding=3, fontsize="small")
        axes.set_xlim(0, 1.35 * max(*values, 1e-9))
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.3)
    all_axes[0].set_yticks(range(len(rows)), names)
    all_axes[0].invert_yaxis()
    caption(figure, f"WRN-{rows[0]['depth']}-{rows[0]['width']}", *_conditions(rows, machine))
    save(figure, os.path.join(folder, "scaling"))


def _conditions(rows: list[Row], machine: Machine) -> list[str]:
    """Under which ``rows`` were measured, for a picture."""
    batches = one_or_more("batch", (row["batch_size"] for row in rows))
    return [machine_of(machine), batches, ", ".join(dict.fromkeys(row["dtype"] for row in rows))]
