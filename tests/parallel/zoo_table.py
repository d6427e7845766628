"""What a sweep over the networks of the zoo found: the file that keeps it, and its table ``docs/lab/models.md``."""

from __future__ import annotations

import datetime
import json
import math
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.parallel.zoo_models import Network
from tlgc_mp.host import describe_machine

TOLERANCE = 1e-9
"""Largest difference of what is the same, relative to the largest value, in float64."""
ROUNDING = 10.0
"""Largest difference of a network that rounding moves by more, as float32 does: in units of the difference that another
last bit of each weight makes on one device."""
MOSTLY = 0.9
"""Share of the parameters, and of what is kept for backward, from which on a network counts as split."""


@dataclass
class Result:
    """How one network did over a number of ranks.

    Attributes:
        reason: why it is wrong, or did not run; empty where it is right.
        worst: the largest relative difference, and ``where`` it is.
        rounding: the largest one that rounding makes on one device, where that had to be asked.
        convolutional: whether it has several convolutions, and multiplies no activations, as attention does.
        parameters: of the whole network; ``parameters_a_rank`` of them on the first rank.
        kept: bytes that autograd keeps for backward on one device; on a rank, ``kept_split`` of tensors that are split
            and ``kept_whole`` of others.
        sent: bytes that a rank sends in a step, in a ring.
        whole: operator -> how often it was computed whole in a step.
        seconds: of the processor, for a forward and a backward pass: on one device, and on the rank that takes most.
    """

    model: str
    family: str
    ranks: int
    reason: str = ""
    worst: float = math.inf
    where: str = ""
    rounding: float = 0.0
    convolutional: bool = False
    parameters: int = 0
    parameters_a_rank: int = 0
    kept: int = 0
    kept_split: int = 0
    kept_whole: int = 0
    sent: int = 0
    whole: dict[str, int] = field(default_factory=dict)
    seconds: tuple[float, float] = (0.0, 0.0)

    @property
    def parameters_split(self) -> float:
        """Share of the parameters that is split, 0 to 1."""
        return (1 - self.parameters_a_rank / max(1, self.parameters)) / (1 - 1 / self.ranks)

    @property
    def kept_share_split(self) -> float:
        """Share of the bytes kept for backward by all ranks that is split, 0 to 1."""
        total = self.ranks * self.kept_split + self.kept_whole
        return self.ranks * self.kept_split / total if total else 0.0

    @property
    def is_mostly_split(self) -> bool:
        return min(self.parameters_split, self.kept_share_split) >= MOSTLY


def read(path: Path) -> dict[tuple[str, int], Result]:
    """(model, ranks) -> its last result in the file."""
    if not path.exists():
        return {}
    results = [Result(**json.loads(line)) for line in path.read_text().splitlines()]
    return {(result.model, result.ranks): result for result in results}


LEGEND = """
Shares are rounded down.

- *Parameters split*: of all parameters, those that are split over the ranks.
- *Activations split*: of the bytes that autograd keeps for backward on all ranks, those of tensors that are split.
- *A rank keeps*: those bytes on one rank, of what one device keeps.
- *Sent*: what a rank sends in one step, in a ring.
- *Time*: of the processor for a forward and a backward pass on the rank that takes most, over that on one device. At
  these sizes most of it is Python's, and not arithmetic.

| model | module or kind | P | | parameters | split | activations split | a rank keeps | MB sent | time |
|---|---|---:|---|---:|---:|---:|---:|---:|---:|
"""


def table(results: list[Result], wanted: list[tuple[str, int]], networks: dict[str, Network]) -> str:
    """The contents of ``docs/lab/models.md``.

    Args:
        wanted: networks, and numbers of ranks, that the sweep is to run; what has no result is listed as not run.
        networks: all of the zoo.
    """
    results = sorted(results, key=lambda r: (r.model, r.ranks))
    right = [result for result in results if not result.reason]
    in_float32 = ", ".join(sorted({r.model for r in right if networks[r.model].dtype == torch.float32}))
    how = (
        "Each network is split over P ranks and takes one training step, with its dropout and drop path, on a batch of"
        f" two small inputs in float64{f' (float32: {in_float32})' if in_float32 else ''}. *Exact* means that its"
        " outputs, the gradients of its inputs and parameters, all weights and running statistics after a step of SGD,"
        f" and its outputs in evaluation are within {TOLERANCE} of those on one device, relative to the largest"
        f" value. *Rounding* means that they are not, but within {ROUNDING:.0f} times what another last bit of each"
        " weight makes on one device, which stands in brackets: layers that normalize few values, or compute in"
        " float32, magnify it."
    )
    found = {(result.model, result.ranks) for result in results}
    missing = [key for key in wanted if key not in found and not networks[key[0]].skip]
    partial = f" This table is partial: what has not run yet ({len(missing)}) stands at the end." if missing else ""
    paragraphs = [_provenance(), _counts(results) + partial, how]
    text = "# Models\n\n" + "\n\n".join(textwrap.fill(paragraph, 120) for paragraph in paragraphs) + "\n"
    text += LEGEND + "".join(_row(result) for result in right)
    wrong = [f"- `{r.model}`, P = {r.ranks}: {r.reason}\n" for r in results if r.reason]
    if wrong:
        text += "\n## Wrong, or failed\n\n" + "".join(wrong)
    text += _below(right) + _not_run(missing, networks)
    return text


def _provenance() -> str:
    import timm
    import torchvision

    machine = describe_machine()
    versions = ", ".join(
        f"{name} {module.__version__.split('+')[0]}"
        for name, module in (("torch", torch), ("torchvision", torchvision), ("timm", timm))
    )
    return (
        f"Written by `python -m tests.parallel.zoo --output docs/lab/models.md` on {datetime.date.today():%d %B %Y}, on"
        f" {machine['cpu']}, {machine['cores']} cores, with one thread a rank; {versions}."
    )


def _counts(results: list[Result]) -> str:
    sentences = []
    for ranks in sorted({result.ranks for result in results}):
        own = [result for result in results if result.ranks == ranks]
        right = [result for result in own if not result.reason]
        rounding = sum(result.rounding > 0 for result in right)
        convolutional = [result for result in right if result.convolutional]
        others = [result for result in right if not result.convolutional]
        kinds = [f"{sum(r.is_mostly_split for r in convolutional)} of {len(convolutional)} convolutional networks"]
        if others:
            kinds.append(
                f"in {sum(r.is_mostly_split for r in others)} of {len(others)} others, which have attention or hardly a"
                " convolution"
            )
        sentences.append(
            f"Over {ranks} ranks, {len(right)} of {len(own)} networks compute what one device computes"
            f" ({len(right) - rounding} exactly, {rounding} up to rounding). At least {MOSTLY:.0%} of the parameters"
            f" and of the activation bytes are split in {', and '.join(kinds)}."
        )
    return " ".join(sentences)


def _row(result: Result) -> str:
    one, split = result.seconds
    how = f"rounding, {result.worst:.0e} ({result.rounding:.0e})" if result.rounding else "exact"
    return (
        f"| {result.model} | {result.family} | {result.ranks} | {how} | {result.parameters / 1e6:.2f} M |"
        f" {_percent(result.parameters_split)} | {_percent(result.kept_share_split)} |"
        f" {(result.kept_split + result.kept_whole) / max(1, result.kept):.0%} | {result.sent / 1e6:.1f} |"
        f" {split / max(one, 1e-9):.1f} |\n"
    )


def _percent(share: float) -> str:
    """Rounded down: what is not quite all, or not quite ``MOSTLY``, does not look like it."""
    return f"{math.floor(share * 100 + 1e-9)}%"


def _below(right: list[Result]) -> str:
    """Which convolutional networks are split less, and what they compute whole."""
    items = []
    for result in right:
        if result.convolutional and not result.is_mostly_split:
            most = sorted(result.whole.items(), key=lambda item: -item[1])[:5]
            whole = ", ".join(f"{name} {count}" for name, count in most)
            items.append(f"- `{result.model}`, P = {result.ranks}: {whole}\n")
    if not items:
        return ""
    title = f"\n## Convolutional networks below {MOSTLY:.0%}, and the operators that they compute whole most often\n\n"
    return title + "".join(items)


def _not_run(missing: list[tuple[str, int]], networks: dict[str, Network]) -> str:
    text = "\n## Too large for this machine\n\n"
    text += "".join(f"- `{name}`: {network.skip}\n" for name, network in networks.items() if network.skip)
    for ranks in sorted({ranks for _, ranks in missing}):
        names = [name for name, other in missing if other == ranks]
        text += f"\n## Not run yet over {ranks} ranks\n\nThe same command goes on with these ({len(names)}).\n\n"
        text += textwrap.fill(", ".join(names), 120, break_on_hyphens=False) + "\n"
    return text
