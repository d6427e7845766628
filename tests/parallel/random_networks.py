"""Random networks, split, against the same networks on one device.

A network is a chain of pieces (``random_layers``, ``random_operators``, ``random_code``, ``random_modules``) with
several heads. Whatever runs on one device has to run split, and to be exact: in training and in evaluation, all
that it returns, the gradients of its input and of every parameter, and its running statistics.

``python -m tests.parallel.random_networks --ranks 2 3 4 --first 0 --count 1000`` tries more of them.
"""

from __future__ import annotations

import argparse
import datetime
import random
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parallel import random_code, random_modules, random_operators  # noqa: F401  (they register their pieces)
from tests.parallel.against_one_device import SEED, Step, make_values_differ, seed_all, train_step, worst
from tests.parallel.random_layers import PIECES, Unfit, distinct
from tests.ranks import run_ranks
from tlgc_mp.parallel import shard

TOLERANCE = 1e-9
"""Largest difference, relative to the largest value."""
HEADS = ("pooled", "features", "mapped", "mean", "number", "nothing", "loss", "best", "hidden")
INPUTS = [(4, 3, 10), (4, 3, 8, 8), (4, 4, 8, 8), (4, 3, 8, 8), (3, 12, 7, 6), (2, 3, 6, 5, 4)]


@dataclass(frozen=True)
class Description:
    """What a network is made from.

    Attributes:
        seed: of what it is drawn from.
        shape: of its input.
        pieces: the name of each piece, and a seed of its arguments.
        heads: the kinds of its outputs, each taken from the feature map after so many pieces.
        layout: how outputs are returned: ``tuple``, ``dict`` or ``list``.
    """

    seed: int
    shape: tuple[int, ...]
    pieces: tuple[tuple[str, int], ...]
    heads: tuple[tuple[str, int], ...]
    layout: str

    def __str__(self) -> str:
        pieces = " -> ".join(f"{name}({number})" for name, number in self.pieces)
        heads = ", ".join(f"{kind} after {place}" for kind, place in self.heads)
        return f"seed {self.seed}: {self.shape} -> {pieces} -> {self.layout} of {heads}"


class Network(nn.Module):
    """The network of a description; its initial weights are drawn with it."""

    def __init__(self, described: Description) -> None:
        super().__init__()
        self.described = described
        seed_all(described.seed)
        x = described_input(described)
        shapes = [x.shape]
        self.pieces = nn.ModuleList()
        for name, number in described.pieces:
            self.pieces.append(PIECES[name](random.Random(number), x.shape))
            x = self.pieces[-1](x.detach().clone())  # so that it says what it does not take
            _check(x)
            shapes.append(x.shape)
        self.heads = nn.ModuleList()
        for kind, place in described.heads:
            self.heads.append(nn.Linear(shapes[place][1], 5) if kind in ("pooled", "loss") else nn.Identity())
        make_values_differ(self, described.seed)

    def forward(self, x: Tensor) -> Any:
        features = [x]
        for index, piece in enumerate(self.pieces):
            kept = any(place == index for _, place in self.described.heads)  # a piece may write to its input
            features.append(piece(features[-1] * 1 if kept or index == 0 else features[-1]))
        outputs = [
            _head(kind, features[place], layer)
            for (kind, place), layer in zip(self.described.heads, self.heads, strict=True)
        ]
        if self.described.layout == "dict":
            return {
                f"{kind} {index}": out
                for index, ((kind, _), out) in enumerate(zip(self.described.heads, outputs, strict=True))
            }
        return tuple(outputs) if self.described.layout == "tuple" else outputs


def _head(kind: str, x: Tensor, layer: nn.Module) -> Any:
    if kind == "pooled":
        return layer(x.flatten(2).mean(2))
    if kind == "loss":
        targets = torch.arange(x.shape[0]) % 5
        return F.cross_entropy(layer(x.flatten(2).mean(2)), targets)
    if kind == "mapped":
        return {"map": x.tanh(), "shape": tuple(x.shape)}
    if kind == "mean":
        return x.mean()
    if kind == "number":
        return int(distinct(x.detach()).argmax())
    if kind == "best":
        return distinct(x).flatten(1).max(1)
    if kind == "hidden":
        return x.transpose(0, 1).detach()
    return None if kind == "nothing" else x


def _check(x: Tensor) -> None:
    """A feature map that a network can go on with."""
    if not isinstance(x, Tensor) or x.dtype != torch.float64 or not 3 <= x.dim() <= 5:
        raise Unfit
    if x.shape[1] < 4 or x.shape[1] > 48 or min(x.shape[2:]) < 2 or not 16 <= x.numel() <= 8000:
        raise Unfit
    if not x.isfinite().all() or x.abs().max() > 1e3 or x.std() < 1e-3:
        raise Unfit


def described_input(described: Description) -> Tensor:
    return torch.randn(described.shape, generator=torch.Generator().manual_seed(described.seed))


def draw(seed: int) -> Description:
    """A network of 3 to 8 pieces, whose pieces take what they get."""
    r = random.Random(seed)
    shape = r.choice(INPUTS)
    count = r.choice([3, 4, 5, 6, 8])
    described = Description(
        seed, shape, (("convolution", r.randrange(10**6)),), (), r.choice(["tuple", "dict", "list"])
    )
    names = sorted(PIECES)
    tries = 0
    while len(described.pieces) < count and tries < 60:
        tries += 1
        name = r.choice(names) if r.random() < 0.8 else r.choice(["convolution", "batch_norm", "activation"])
        longer = replace(described, pieces=(*described.pieces, (name, r.randrange(10**6))))
        if runs(longer):
            described = longer
    places = range(len(described.pieces) + 1)
    heads = [("features" if r.random() < 0.5 else "pooled", len(described.pieces))]
    heads += [(r.choice(HEADS), r.choice(places[1:])) for _ in range(r.choice([0, 1, 2]))]
    return replace(described, heads=tuple(heads))


def of_piece(name: str) -> Description:
    """The smallest network that has the piece, behind a convolution."""
    for number in range(40):
        for shape in dict.fromkeys(INPUTS):
            pieces = (("convolution", number), (name, number))
            described = Description(number, shape, pieces, (("features", 2),), "tuple")
            if runs(described):
                return described
    raise AssertionError(f"no network takes the piece {name}")


def runs(described: Description) -> bool:
    """Whether a network can be built, and passes its input on."""
    try:
        Network(described)
    except (
        Unfit,
        RuntimeError,
        ValueError,
        IndexError,
        TypeError,
        ZeroDivisionError,
        AssertionError,
        NotImplementedError,
    ):
        return False
    return True


def steps(model: nn.Module, described: Description, lrs: Sequence[float | None]) -> list[Step]:
    """A step in training, and one in evaluation."""
    found = []
    for training, lr in zip((True, False), lrs, strict=True):
        x = described_input(described).requires_grad_()
        found.append(train_step(model.train(training), (x,), lr=lr, seed=SEED + training))
    return found


def problem(described: Description) -> str:
    """What is wrong with the split network on this rank; ``skipped`` where one device does not run it."""
    try:
        model = Network(described)
        expected = steps(model, described, (None, None))
    except Exception as error:
        return f"skipped: {type(error).__name__}: {error}"
    try:
        found = steps(shard(Network(described), timeout=20.0), described, [step.lr for step in expected])
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    for what, own, theirs in zip(("in training", "in evaluation"), found, expected, strict=True):
        off, where = worst(own, theirs)
        if not off <= TOLERANCE:
            return f"{what}: {where} is off by {off:.1e}"
    return ""


def agreed_problem(described: Description, votes: dist.ProcessGroup | None) -> str:
    """The problem of the first rank that has one. Collective."""
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem(described), group=votes)
    return next((text for text in problems if text), "")


def shortest(described: Description, votes: dist.ProcessGroup | None) -> tuple[Description, str]:
    """A network without the pieces and heads that it fails without, and its problem. Collective."""
    text = agreed_problem(described, votes)
    again = True
    while again:
        again = False
        for smaller in _smaller(described):
            if runs(smaller):
                found = agreed_problem(smaller, votes)
                if found and not found.startswith("skipped"):
                    described, text, again = smaller, found, True
                    break
    return described, text


def _smaller(described: Description) -> list[Description]:
    end = len(described.pieces)
    found = [replace(described, heads=(("features", end),))] if described.heads != (("features", end),) else []
    for index in reversed(range(end)):
        pieces = (*described.pieces[:index], *described.pieces[index + 1 :])
        heads = tuple((kind, place - (place > index)) for kind, place in described.heads)
        found.append(replace(described, pieces=pieces, heads=heads))
    return found


def run_on_rank(seeds: Sequence[int | str]) -> dict[int | str, str]:
    """Seed, or name of a piece -> what is wrong with its network.

    That is nothing, that it was skipped, or the shortest network that fails, and how.
    """
    warnings.filterwarnings("ignore")
    torch.set_default_dtype(torch.float64)
    votes = dist.new_group(timeout=datetime.timedelta(minutes=5))
    results = {}
    for seed in seeds:
        described = of_piece(seed) if isinstance(seed, str) else draw(seed)
        results[seed] = agreed_problem(described, votes)
        if results[seed] and not results[seed].startswith("skipped"):
            described, text = shortest(described, votes)
            results[seed] = f"{described}: {text}"
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.parallel.random_networks", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4], help="numbers of ranks to split over")
    parser.add_argument("--first", type=int, default=0, help="seed of the first network")
    parser.add_argument("--count", type=int, default=100, help="how many networks")
    arguments = parser.parse_args(argv)
    failures = 0
    for ranks in arguments.ranks:
        exact = skipped = 0
        for start in range(arguments.first, arguments.first + arguments.count, 25):
            seeds = tuple(range(start, min(start + 25, arguments.first + arguments.count)))
            for seed, text in run_ranks(ranks, run_on_rank, seeds, timeout=1200.0)[0].items():
                exact += not text
                skipped += text.startswith("skipped")
                if text and (not text.startswith("skipped") or "-v" in sys.argv):
                    failures += 1
                    print(f"P={ranks} seed {seed}: {text}", flush=True)
            print(
                f"P={ranks}: {exact} exact, {skipped} skipped of {start + len(seeds) - arguments.first}",
                file=sys.stderr,
            )
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
