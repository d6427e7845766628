"""``tlgc-mp report``: the rows of finished training runs -> tables beside the paper's printed figures, and its plots.

    DIR/rows.jsonl                  every row, one JSON object a line, as ``result.json`` of a run holds it
    DIR/report.md                   tables
    DIR/MODEL-DATASET-loss.png      training loss against epoch, as Figure 4 (and .svg)
    DIR/MODEL-DATASET-error.png     test error against N, as Figures 5 and 7 (and .svg)

Runs are compared only where model, data set, image size and recipe are the same; seeds are averaged.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tlgc_mp.bench.paper import Printed, printed_rows
from tlgc_mp.errors import UsageError
from tlgc_mp.models.names import COARSE_INITS, CONVOLUTIONS
from tlgc_mp.training.runs import RESULT, replace_file

Row = dict[str, Any]

_SETTING = ("model", "dataset", "image_size", "recipe", "epochs", "batch_size", "learning_rate", "limit_steps")
"""What rows that are compared have in common."""

_LABELS = {
    "sc": "SC",
    "gc": "GC",
    "gc-2l": "GC-2L",
    "gc-2l-proto": "GC-2L prototype",
    "shuffle": "Shuffle",
    "flgc": "FLGC",
}
_COLORS = dict(zip(CONVOLUTIONS, ("#000000", "#D55E00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7"), strict=True))
_MARKERS = dict(zip(CONVOLUTIONS, "*so^Dv", strict=True))


@dataclass(frozen=True, order=True)
class Variant:
    """What is compared: a convolution, its N, and how its coarse level departs from the default, if it does."""

    conv: str
    groups: int
    departure: str = ""

    @property
    def label(self) -> str:
        """For a table."""
        return f"{_LABELS[self.conv]}, {self.departure}" if self.departure else _LABELS[self.conv]


def read_rows(sources: Sequence[str]) -> list[Row]:
    """The rows in ``sources``: files of JSON lines, and folders, in which every ``result.json`` counts.

    A run that is found twice counts once.

    Raises:
        UsageError: a source is missing or damaged, or there is no finished run in any.
    """
    found: dict[str, Row] = {}
    for source in sources:
        if not os.path.exists(source):
            raise UsageError(f"report: {source!r} does not exist; give folders of runs, or files of rows")
        for path in _files(source):
            for row in _read(path):
                found.setdefault(json.dumps({key: row[key] for key in (*_SETTING, *_IDENTITY)}), row)
    if not found:
        raise UsageError(f"report: no finished run (a {RESULT}) is in {', '.join(map(repr, sources))}")
    return list(found.values())


_IDENTITY = ("conv", "groups", "coarse_kernel_size", "coarse_init", "seed", "tensor_parallel", "data_parallel")


def _files(source: str) -> list[str]:
    if os.path.isfile(source):
        return [source]
    return sorted(os.path.join(folder, RESULT) for folder, _, names in os.walk(source) if RESULT in names)


def _read(path: str) -> list[Row]:
    try:
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file if line.strip()]
        missing = [key for row in rows for key in (*_SETTING, *_IDENTITY, "epoch_lines") if key not in row]
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"report: {path!r} cannot be read as rows of runs: {' '.join(str(error).split())}") from None
    if missing:
        raise UsageError(f"report: a row in {path!r} has no {missing[0]!r}; give rows that tlgc-mp train has written")
    return rows


def write(sources: Sequence[str], folder: str) -> None:
    """Reads the rows in ``sources`` and writes everything to ``folder``, which is made where it is missing.

    Raises:
        UsageError: as :func:`read_rows`, or ``folder`` cannot be written.
    """
    rows = read_rows(sources)
    try:
        os.makedirs(folder, exist_ok=True)
        replace_file(os.path.join(folder, "rows.jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        raise UsageError(f"--output={folder!r} cannot be written: {error.strerror}; give a folder") from None
    settings = list(_by(rows, _setting).values())
    names = [f"{group[0]['model']}-{group[0]['dataset']}" for group in settings]
    parts = ["# Training runs", ""]
    for index, (group, name) in enumerate(zip(settings, names, strict=True)):
        if names.count(name) > 1:
            name = f"{name}-{index + 1}"
        parts += _section(group, name)
        _plot_losses(group, os.path.join(folder, f"{name}-loss"))
        _plot_errors(group, os.path.join(folder, f"{name}-error"))
    parts += _paper_tables(rows)
    replace_file(os.path.join(folder, "report.md"), "\n".join(parts) + "\n")


def _setting(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in _SETTING)


def _variant(row: Row) -> Variant:
    departures = []
    if row["coarse_kernel_size"] is not None:
        departures.append(f"d0 = {row['coarse_kernel_size']}")
    if row["coarse_init"] != COARSE_INITS[0]:
        departures.append(f"{row['coarse_init']} initialization")
    return Variant(row["conv"], row["groups"], ", ".join(departures))


def _by(rows: Iterable[Row], key: Any) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _variants(rows: list[Row]) -> dict[Variant, list[Row]]:
    """Variant -> its rows, a seed each, in the order of the convolutions' names and N."""
    groups = _by(rows, _variant)
    return {v: groups[v] for v in sorted(groups, key=lambda v: (v.departure, CONVOLUTIONS.index(v.conv), v.groups))}


def _section(rows: list[Row], name: str) -> list[str]:
    """Everything that one setting's rows say."""
    first = rows[0]
    size = "" if first["image_size"] is None else f" at {first['image_size']} x {first['image_size']} pixels"
    limit = "" if first["limit_steps"] is None else f" of {_count(first['limit_steps'], 'step')}"
    variants = _variants(rows)
    parts = [
        f"## {first['model']} on {first['dataset']}{size}",
        "",
        f"{_count(first['epochs'], 'epoch')}{limit}, batch {first['batch_size']}, learning rate "
        f"{first['learning_rate']}, recipe {first['recipe']}. Mean and standard deviation over the seeds. "
        f"{_where(rows)}",
        "",
        *_table(
            ("", "N", "seeds", "parameters", "test error, %", "training loss", "minutes", "waiting for data, %"),
            [_line(variant, group) for variant, group in variants.items()],
        ),
        "",
    ]
    slopes = _slopes(variants)
    if slopes:
        parts += [
            "Slope of the test error against log2 N, in percentage points for each doubling of N:",
            "",
            *_table(("", "slope"), slopes),
            "",
        ]
    between = _between(variants)
    if between:
        parts += [
            "Training loss after the last epoch: is GC-2L's between SC's and GC's? Over the seeds that all three have:",
            "",
            *_table(("N", "SC", "GC-2L", "GC", "between"), between),
            "",
        ]
    return [*parts, f"![training loss]({name}-loss.png)", "", f"![test error against N]({name}-error.png)", ""]


def _where(rows: list[Row]) -> str:
    """Machines, versions and dates of ``rows``."""
    machines = {f"{row['machine']['cpu']}, {row['machine']['cores']} cores" for row in rows}
    versions = {f"torch {row['versions']['torch']}, DeepSpeed {row['versions']['deepspeed']}" for row in rows}
    dates = sorted({row["date"][:10] for row in rows})
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{'; '.join(sorted(machines))}; {'; '.join(sorted(versions))}; {span}."


def _line(variant: Variant, rows: list[Row]) -> list[str]:
    parameters = f"{rows[0]['parameters']:,}"
    if rows[0].get("effective_parameters") is not None:
        parameters += f" (left by learning: {round(statistics.mean(row['effective_parameters'] for row in rows)):,})"
    waiting = [100 * row["data_seconds"] / row["train_seconds"] for row in rows]
    return [
        variant.label,
        str(variant.groups),
        str(len(rows)),
        parameters,
        _spread([row["test_error_percent"] for row in rows], 2),
        _spread([_loss(row) for row in rows], 4),
        f"{statistics.mean(row['seconds'] for row in rows) / 60:.1f}",
        f"{statistics.mean(waiting):.1f}",
    ]


def _loss(row: Row) -> float:
    """Training loss of the last epoch."""
    return float(row["epoch_lines"][-1]["train_loss"])


def _spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def slope(errors: dict[int, float]) -> float:
    """Of the least-squares line through (log2 N, error), from N -> error at two N or more."""
    at = [math.log2(groups) for groups in errors]
    return statistics.linear_regression(at, list(errors.values())).slope


def _slopes(variants: dict[Variant, list[Row]]) -> list[list[str]]:
    """Of each convolution measured at two N or more, the seeds' own slopes."""
    lines = []
    for conv in CONVOLUTIONS:
        by_seed: dict[int, dict[int, float]] = {}
        for variant, rows in variants.items():
            if variant.conv == conv and not variant.departure:
                for row in rows:
                    by_seed.setdefault(row["seed"], {})[variant.groups] = row["test_error_percent"]
        most = max((len(errors) for errors in by_seed.values()), default=0)
        if most > 1:
            slopes = [slope(errors) for errors in by_seed.values() if len(errors) == most]
            lines.append([_LABELS[conv], _spread(slopes, 2)])
    return lines


def _between(variants: dict[Variant, list[Row]]) -> list[list[str]]:
    """For each N: the losses of SC, GC-2L and GC, and for how many seeds they come in this order."""
    lines = []
    dense = {row["seed"]: _loss(row) for row in variants.get(Variant("sc", 1), [])}
    for groups in sorted({variant.groups for variant in variants if variant.conv == "gc"}):
        plain = {row["seed"]: _loss(row) for row in variants[Variant("gc", groups)]}
        two_level = {row["seed"]: _loss(row) for row in variants.get(Variant("gc-2l", groups), [])}
        seeds = dense.keys() & plain.keys() & two_level.keys()
        if seeds:
            losses = [[by_seed[seed] for seed in seeds] for by_seed in (dense, two_level, plain)]
            held = sum(dense[seed] < two_level[seed] < plain[seed] for seed in seeds)
            lines.append([str(groups), *(_spread(values, 4) for values in losses), f"{held} of {len(seeds)}"])
    return lines


def _paper_tables(rows: list[Row]) -> list[str]:
    """Those of the paper's Tables 1 to 4 of which at least one row has been run, beside what is printed."""
    parts: list[str] = []
    measured = _by(rows, lambda row: (row["model"], row["conv"], row["groups"], row["dataset"]))
    for table in (1, 2, 3, 4):
        printed = [row for row in printed_rows() if row.table == table]
        if not any(_measured(row, dataset, measured) for row in printed for dataset in row.errors):
            continue
        lines = [_printed_line(row, dataset, measured) for row in printed for dataset in row.errors]
        head = (
            "model",
            "",
            "N",
            "data set",
            "parameters, M",
            "paper",
            "test error, %",
            "paper",
            "epochs",
            "h",
            "paper",
        )
        parts += [f"## The paper's Table {table}", "", *_table(head, lines), ""]
    return parts


def _measured(row: Printed, dataset: str, measured: dict[Any, list[Row]]) -> list[Row]:
    found = measured.get((row.model, row.conv, row.groups, dataset), [])
    return [run for run in found if not _variant(run).departure]


def _printed_line(row: Printed, dataset: str, measured: dict[Any, list[Row]]) -> list[str]:
    found = _measured(row, dataset, measured)
    own = ["", "", "", ""]
    if found:
        limit = found[0]["limit_steps"]
        own = [
            f"{found[0]['parameters'] / 1e6:.2f}",
            _spread([run["test_error_percent"] for run in found], 2),
            f"{found[0]['epochs']}" if limit is None else f"{found[0]['epochs']} of {_count(limit, 'step')}",
            f"{statistics.mean(run['seconds'] for run in found) / 3600:.3g}",
        ]
    hours = "" if row.hours is None else f"{row.hours:.4f}"
    return [
        row.model,
        _LABELS[row.conv],
        str(row.groups),
        dataset,
        own[0],
        row.parameters,
        own[1],
        f"{row.errors[dataset]:.2f}",
        own[2],
        own[3],
        hours,
    ]


def _table(head: tuple[str, ...], lines: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)]


def _plot_losses(rows: list[Row], path: str) -> None:
    """Training loss of SC, GC and GC-2L against epoch, a panel for each N; the band spans the seeds (Figure 4)."""
    plt = _pyplot()
    variants = _variants(rows)
    counts = sorted({v.groups for v in variants if v.conv in ("gc", "gc-2l") and not v.departure})
    panels = counts or [1]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(2.2 + 2.4 * len(panels), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, groups in zip(axes[0], panels, strict=True):
        for variant in (Variant("sc", 1), Variant("gc", groups), Variant("gc-2l", groups)):
            curves = [[line["train_loss"] for line in row["epoch_lines"]] for row in variants.get(variant, [])]
            if curves:
                epochs = range(1, len(curves[0]) + 1)
                columns = list(zip(*curves, strict=True))
                color = _COLORS[variant.conv]
                axis.fill_between(epochs, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.2)
                means = [statistics.mean(column) for column in columns]
                axis.plot(epochs, means, color=color, marker=_MARKERS[variant.conv], ms=4, label=_LABELS[variant.conv])
        axis.set_title(f"N = {groups}", fontsize="medium")
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0][0].set_ylabel("training loss")
    axes[0][-1].legend(fontsize="small")
    figure.suptitle(_title(rows[0]), fontsize="medium")
    _save(figure, path)


def _plot_errors(rows: list[Row], path: str) -> None:
    """Test error of each convolution against N, with the seeds' standard deviation, and what the paper prints."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    variants = {variant: group for variant, group in _variants(rows).items() if not variant.departure}
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
                label=_LABELS[conv],
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
    return f"{row['model']} on {row['dataset']}{size}, {_count(row['epochs'], 'epoch')}"


def _count(number: int, what: str) -> str:
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
