"""``tlgc-mp report``: the rows of finished training runs -> tables beside the paper's printed figures, and its plots.

    DIR/rows.jsonl                  every row, one JSON object a line, as ``result.json`` of a run holds it
    DIR/report.md                   tables
    DIR/MODEL-DATASET-loss.png      training loss against epoch, as Figure 4 (and .svg); -test-loss and -test-error too
    DIR/MODEL-DATASET-error.png     test error against N, as Figures 5 and 7 (and .svg); bars where there is one N

Runs are compared only where model, data set, image size and recipe are the same; seeds are averaged.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence

from tlgc_mp.errors import UsageError
from tlgc_mp.host import replace_file
from tlgc_mp.models.names import CONVOLUTIONS
from tlgc_mp.paper.plots import CURVES, count, plot_epochs, plot_errors
from tlgc_mp.paper.printed import Printed, printed_rows
from tlgc_mp.paper.rows import LABELS, Row, Variant, grouped, read_rows, setting_of, variant_of, variants_of


def write(sources: Sequence[str], folder: str) -> None:
    """Reads the rows in ``sources`` and writes everything to ``folder``, which is made where it is missing.

    Raises:
        UsageError: as :func:`read_rows`, or ``folder`` cannot be written.
    """
    rows = read_rows(sources)
    try:
        os.makedirs(folder, exist_ok=True)
        _write(rows, folder)
    except OSError as error:
        where = "" if error.filename in (None, folder) else f"{error.filename!r}: "
        raise UsageError(f"--output must be a folder to write to, got {folder!r}: {where}{error.strerror}") from None


def _write(rows: list[Row], folder: str) -> None:
    replace_file(os.path.join(folder, "rows.jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
    settings = list(grouped(rows, setting_of).values())
    names = [f"{group[0]['model']}-{group[0]['dataset']}" for group in settings]
    parts = ["# Training runs", ""]
    for index, (group, name) in enumerate(zip(settings, names, strict=True)):
        if names.count(name) > 1:
            name = f"{name}-{index + 1}"
        parts += _section(group)
        for curve in CURVES:
            if plot_epochs(group, curve, os.path.join(folder, f"{name}-{curve[0]}")):
                parts += [f"![{curve[1]} against epoch]({name}-{curve[0]}.png)", ""]
        plot_errors(group, os.path.join(folder, f"{name}-error"))
        parts += [f"![test error against N]({name}-error.png)", ""]
    parts += _paper_tables(rows)
    replace_file(os.path.join(folder, "report.md"), "\n".join(parts) + "\n")


def _section(rows: list[Row]) -> list[str]:
    """Everything that one setting's rows say."""
    first = rows[0]
    size = "" if first["image_size"] is None else f" at {first['image_size']} x {first['image_size']} pixels"
    limit = "" if first["limit_steps"] is None else f" of {count(first['limit_steps'], 'step')}"
    folder = f" ({first['data_dir']}, {first['data_fingerprint']})" if first.get("data_fingerprint") else ""
    told = [f"{key} {value}" for key, value in (first.get("departures") or {}).items()]
    departures = f" with {', '.join(told)}" if told else ""
    variants = variants_of(rows)
    parts = [
        f"## {first['model']} on {first['dataset']}{folder}{size}",
        "",
        f"{count(first['epochs'], 'epoch')}{limit}, batch {first['batch_size']}, learning rate "
        f"{first['learning_rate']}, recipe {first['recipe']}{departures}. Mean and standard deviation over the seeds. "
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
    return parts


def _where(rows: list[Row]) -> str:
    """Machines, versions and dates of ``rows``."""
    machines = {f"{row['machine']['cpu']}, {row['machine']['cores']} cores" for row in rows}
    versions = {f"torch {row['versions']['torch']}, DeepSpeed {row['versions']['deepspeed']}" for row in rows}
    dates = sorted({row["date"][:10] for row in rows})
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{'; '.join(sorted(machines))}; {'; '.join(sorted(versions))}; {span}."


def _line(variant: Variant, rows: list[Row]) -> list[str]:
    parameters = f"{rows[0]['parameters']:,}"
    left = [row["effective_parameters"] for row in rows if row.get("effective_parameters") is not None]
    if left:
        parameters += f" (left by learning: {round(statistics.mean(left)):,})"
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
            lines.append([LABELS[conv], _spread(slopes, 2)])
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
    measured = grouped(rows, lambda row: (row["model"], row["conv"], row["groups"], row["dataset"]))
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


def _measured(row: Printed, dataset: str, measured: dict[tuple[str, str, int, str], list[Row]]) -> list[Row]:
    found = measured.get((row.model, row.conv, row.groups, dataset), [])
    return [run for run in found if not variant_of(run).departure]


def _printed_line(row: Printed, dataset: str, measured: dict[tuple[str, str, int, str], list[Row]]) -> list[str]:
    found = _measured(row, dataset, measured)
    own = ["", "", "", ""]
    if found:
        limit = found[0]["limit_steps"]
        own = [
            f"{found[0]['parameters'] / 1e6:.2f}",
            _spread([run["test_error_percent"] for run in found], 2),
            f"{found[0]['epochs']}" if limit is None else f"{found[0]['epochs']} of {count(limit, 'step')}",
            f"{statistics.mean(run['seconds'] for run in found) / 3600:.3g}",
        ]
    hours = "" if row.hours is None else f"{row.hours:.4f}"
    return [
        row.model,
        LABELS[row.conv],
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
