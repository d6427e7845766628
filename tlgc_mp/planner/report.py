"""A plan in words: the table, the line that starts it, what does not fit and what would make it fit."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from tlgc_mp.errors import UsageError
from tlgc_mp.figures import rounded
from tlgc_mp.host import replace_file
from tlgc_mp.planner.candidates import Candidate, Plan
from tlgc_mp.planner.holdings import KINDS
from tlgc_mp.planner.settings import PlanSettings

GIB = 2**30
SHOWN, SHOWN_TOO_LARGE = 12, 5
"""Candidates in a table that is printed: of those that fit, and of those that do not."""

_HEAD = (
    *("N", "P", "D", "ZeRO", "micro-batch", "recompute", "offload", "GiB", "MB sent"),
    *("step s", "of it compute", "tensor-parallel", "replicas", "optimizer", "images/s"),
)


def describe(plan: Plan) -> str:
    """The plan as text."""
    fitting = [candidate for candidate in plan.candidates if candidate.fits]
    others = plan.candidates[len(fitting) :]
    limit = plan.candidates[0].limit
    lines = [f"{plan.device.name}, {limit / GIB:.4g} GiB a rank, {plan.dtype} ({plan.device.source})"]
    if fitting:
        lines += ["", *_table(fitting[:SHOWN])]
        if len(fitting) > SHOWN:
            lines.append(f"and {len(fitting) - SHOWN} more that fit")
    if others:
        lines += ["", "Does not fit:", *(_too_large(candidate) for candidate in others[:SHOWN_TOO_LARGE])]
        if len(others) > SHOWN_TOO_LARGE:
            lines.append(f"and {len(others) - SHOWN_TOO_LARGE} more")
    return "\n".join(lines)


def _table(candidates: Sequence[Candidate]) -> list[str]:
    rows = [_HEAD, *(_row(candidate) for candidate in candidates)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _row(candidate: Candidate) -> tuple[str, ...]:
    return (
        "-" if candidate.groups is None else str(candidate.groups),
        *(str(count) for count in (candidate.tensor_parallel, candidate.data_parallel, candidate.share.stage)),
        f"{candidate.micro_batch} x {candidate.accumulation}",
        "yes" if candidate.checkpointing else "no",
        "yes" if candidate.share.offload else "no",
        f"{candidate.needed / GIB:.2f}",
        f"{candidate.bytes_sent / 1e6:.4g}",
        f"{candidate.step_seconds:.4g}",
        *(f"{seconds:.3g}" for seconds in candidate.seconds.values()),
        f"{candidate.samples_per_second:.4g}",
    )


def named(candidate: Candidate) -> str:
    """A candidate in a few words."""
    words = [f"N = {candidate.groups}"] if candidate.groups is not None else []
    words += [f"P x D = {candidate.tensor_parallel} x {candidate.data_parallel}", f"ZeRO {candidate.share.stage}"]
    words.append(f"{candidate.accumulation} x {candidate.micro_batch} samples a replica")
    words += ["activation checkpointing"] if candidate.checkpointing else []
    words += ["optimizer offloaded"] if candidate.share.offload else []
    return ", ".join(words)


def _too_large(candidate: Candidate) -> str:
    memory = candidate.memory
    kinds = {name: getattr(memory, name) for name in KINDS}
    most = max(kinds, key=kinds.__getitem__)
    return (
        f"{named(candidate)}: {candidate.needed / GIB:.2f} GiB, {(candidate.needed - candidate.limit) / GIB:.2f} too "
        f"many, most of it {most} ({kinds[most] / GIB:.2f} GiB)"
    )


def launch_line(settings: PlanSettings, candidate: Candidate, config: str) -> str:
    """The command that trains as ``candidate`` says, with its DeepSpeed configuration in the file ``config``."""
    hosts, local = settings.network.hosts, settings.network.ranks
    start = f"deepspeed --num_accelerators {local}"
    if hosts > 1:
        start = f"deepspeed --hostfile HOSTFILE --num_nodes {hosts} --num_accelerators {local}"
    model = settings.model
    words = ["--model", model["name"], "--conv", model["conv"], "--groups", str(candidate.groups)]
    if model["coarse_kernel_size"] is not None:
        words += ["--coarse-kernel-size", str(model["coarse_kernel_size"])]
    if model["coarse_channels"] != 1:
        words += ["--coarse-channels", str(model["coarse_channels"])]
    words += [f"--{name.replace('_', '-')}" for name in ("coarse_sum", "coarse_everywhere") if model[name]]
    words += ["--dataset", "cifar10" if settings.recipe_name == "cifar" else settings.recipe_name]
    words += [] if settings.recipe_name == "digits" else ["--data-dir", "DIR"]
    words += ["--recipe", settings.recipe_name, "--optimizer", settings.optimizer]
    words += ["--tp", str(candidate.tensor_parallel), "--batch-size", str(candidate.samples)]
    words += ["--activation-checkpointing"] if candidate.checkpointing else []
    return " ".join([start, "--module tlgc_mp train", *words, "--deepspeed_config", config])


def answer(settings: PlanSettings, plan: Plan, larger: Candidate | None) -> str:
    """What to do: how to start the best candidate, or what it would take to fit.

    Args:
        larger: the first that fits on more ranks, where none does on these.
    """
    best = plan.best
    if best is None:
        least = plan.candidates[0]
        lines = [f"Nothing fits. {_too_large(least)} ({least.memory.moment})."]
        if larger is None:
            lines.append(
                "No number of ranks up to 4,096 makes it fit: take a smaller network, or devices of more memory."
            )
        else:
            ranks = larger.tensor_parallel * larger.data_parallel
            lines.append(f"It fits on {ranks} ranks: {named(larger)}, {larger.needed / GIB:.2f} GiB a rank.")
        return "\n".join(lines)
    hours = settings.images / best.samples_per_second / 3600
    return "\n".join(
        [
            f"Recommended: {named(best)}: {best.needed / GIB:.2f} GiB a rank, "
            f"{rounded(best.samples_per_second)} images/s, "
            f"{rounded(hours)} h for the {settings.recipe.epochs} epochs of the recipe {settings.recipe_name}.",
            "",
            f"    {launch_line(settings, best, 'plan-deepspeed.json')}",
            "",
            "plan-deepspeed.json:",
            json.dumps(plan.config(best), indent=2),
        ]
    )


def write(settings: PlanSettings, plan: Plan, said: str, folder: str) -> None:
    """Writes ``plan.json``, ``plan.md``, ``plan.png`` and ``plan-deepspeed.json`` to ``folder``.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        found = plan.to_dict()
        replace_file(os.path.join(folder, "plan.json"), json.dumps(found, indent=1) + "\n")
        best = plan.best
        if best is not None:
            replace_file(os.path.join(folder, "plan-deepspeed.json"), json.dumps(plan.config(best), indent=2) + "\n")
        replace_file(os.path.join(folder, "plan.md"), _markdown(settings, plan, said))
        _plot(plan, folder)
    except OSError as error:
        raise UsageError(f"--output must be a folder to write, got {folder!r}: {error.strerror}") from None


def _markdown(settings: PlanSettings, plan: Plan, said: str) -> str:
    from tlgc_mp.bench.report import table

    fitting = [candidate for candidate in plan.candidates if candidate.fits]
    others = plan.candidates[len(fitting) :]
    return "\n".join(
        [
            f"# {settings.model['name']}, {settings.model['conv']}, {settings.batch_size} images a step",
            "",
            f"{settings.ranks} ranks of {plan.device.name}, {settings.memory / GIB:.4g} GiB each, {plan.dtype} "
            f"({plan.device.source}).",
            "",
            *table(_HEAD, [list(_row(candidate)) for candidate in fitting]),
            "",
            *(f"- {_too_large(candidate)}" for candidate in others),
            "",
            "```",
            said,
            "```",
            "",
        ]
    )


def _plot(plan: Plan, folder: str) -> None:
    """Memory and time of the best way at each P and D."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    best: dict[tuple[int, int], Candidate] = {}
    for candidate in plan.candidates:  # in order: the first of each place is its best
        best.setdefault((candidate.tensor_parallel, candidate.data_parallel), candidate)
    places = sorted(best)
    names = [f"{p} x {d}" for p, d in places]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.8), layout="constrained")
    bottom = [0.0] * len(places)
    for kind in KINDS:
        heights = [getattr(best[place].memory, kind) / GIB for place in places]
        left.bar(names, heights, bottom=bottom, label=kind)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    left.axhline(plan.candidates[0].limit / GIB, color="black", lw=1, ls="--")
    left.set_ylabel("peak GiB a rank")
    bottom = [0.0] * len(places)
    for part in plan.candidates[0].seconds:
        heights = [best[place].seconds[part] for place in places]
        right.bar(names, heights, bottom=bottom, label=part)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    right.set_ylabel("seconds a step")
    for axes in (left, right):
        axes.set_xlabel("P x D")
        axes.tick_params(axis="x", rotation=45)
        axes.legend(frameon=False, fontsize="small")
    temporary = os.path.join(folder, "plan.tmp.png")
    figure.savefig(temporary, dpi=150)
    os.replace(temporary, os.path.join(folder, "plan.png"))
    plt.close(figure)
