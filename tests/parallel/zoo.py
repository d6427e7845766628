"""Networks of torchvision and timm, split, against the same networks on one device.

Each takes a training step with its dropout and drop path, from the same seed: its outputs, the gradients of its inputs
and parameters, and, after a step of SGD, every weight, every running statistic and what it gives in evaluation have to
be the same.

``python -m tests.parallel.zoo --output docs/lab/models.md`` runs all of them and writes the table. Results are kept
in a file as they come, and what is there is not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode

from tests.parallel.against_one_device import (
    SEED,
    Step,
    make_values_differ,
    scalar_loss,
    seed_all,
    train_step,
    worst,
)
from tests.parallel.zoo_models import Network, zoo
from tests.parallel.zoo_table import ROUNDING, TOLERANCE, Result, read, table
from tests.ranks import run_ranks
from tlgc_mp.parallel import collectives, shard, split_tensor

SEVERAL = 5
"""Convolutions that make a network convolutional, where it has no attention: AlexNet has as many."""
IN_EVERY_THIRD = 3
"""Of the networks split over two ranks, one in so many is split over four as well."""


class Meter:
    """Counts what a step keeps for backward, what it sends, and what it computes whole."""

    def __init__(self, model: nn.Module, arguments: Any, ranks: int) -> None:
        self.ranks = ranks
        self.sent = 0
        self.whole: Counter[str] = Counter()
        self.multiplies_activations = False
        self.storages: dict[int, tuple[int, bool]] = {}
        given = [*model.parameters(), *model.buffers(), *torch.utils._pytree.tree_leaves(arguments)]
        self.given = {t.untyped_storage().data_ptr() for t in given if isinstance(t, Tensor)}

    def kept(self, of_split: bool) -> int:
        return sum(size for size, is_split in self.storages.values() if is_split == of_split)

    def _keep(self, tensor: Tensor) -> Tensor:
        is_split = type(tensor) is split_tensor.SplitTensor
        held = tensor.share if type(tensor) is split_tensor.SplitTensor else tensor
        if held.layout == torch.strided:
            storage = held.untyped_storage()
            if storage.data_ptr() not in self.given:
                cut = is_split and tensor.cut.dim is not None  # type: ignore[attr-defined]
                self.storages[storage.data_ptr()] = (storage.nbytes(), cut)
        return tensor

    def _send(self, collective: str, size: int) -> None:
        others = self.ranks - 1
        if collective in ("all_gather", "coarse_gather"):
            self.sent += others * size
        else:
            self.sent += others * size // self.ranks * (2 if collective in ("all_reduce", "sum_partials") else 1)

    def _compute(self, operator: Any, how: str) -> None:
        name = operator._schema.name.removeprefix("aten::")
        if how == "whole":
            self.whole[name] += 1
        if name in ("bmm", "baddbmm") or name.startswith("_scaled_dot_product"):
            self.multiplies_activations = True

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        collectives.recorders.append(self._send)
        split_tensor.observers.append(self._compute)
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
                yield
        finally:
            collectives.recorders.remove(self._send)
            split_tensor.observers.remove(self._compute)


def _pass(model: nn.Module, arguments: tuple[Any, ...]) -> float:
    """Seconds of the processor that a forward and a backward pass take."""
    model.zero_grad(set_to_none=True)
    seed_all(SEED)
    start = time.process_time()
    loss = scalar_loss(model(*arguments))
    if loss is not None:
        loss.backward()
    return time.process_time() - start


def _built(network: Network) -> tuple[nn.Module, tuple[Any, ...]]:
    torch.set_default_dtype(network.dtype)
    seed_all(SEED)
    model = network.make().to(network.dtype).train()
    make_values_differ(model, SEED)
    return model, network.arguments()


def _one_device(network: Network, result: Result, measure: bool) -> Step:
    """The step on one device."""
    model, arguments = _built(network)
    result.parameters = sum(param.numel() for param in model.parameters())
    meter = Meter(model, arguments, 1)
    step = train_step(model, arguments, evaluate=True, measuring=meter.counting() if measure else None)
    for value in step.outputs:
        assert not isinstance(value, Tensor) or value.isfinite().all(), "the outputs on one device are not finite"
    if measure:
        result.kept = meter.kept(False)
        result.seconds = (_pass(model, arguments), 0.0)
    return step


class _Narrow(TorchDispatchMode):
    """Whether something is computed in float32."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves(result)
        self.found |= any(isinstance(leaf, Tensor) and leaf.dtype == torch.float32 for leaf in leaves)
        return result


def _rounding(network: Network, step: Step) -> float:
    """How far the step on one device moves where the last bit of each weight is another; that of float32, where the
    network computes in it whatever its own type is, as some norms do."""
    model, arguments = _built(network)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        with _Narrow() as narrow:
            _built(network)[0](*arguments)
        for param in model.parameters():
            bits = torch.randint(-1, 2, param.shape, generator=generator).to(param.dtype)
            param.mul_(1 + bits * torch.finfo(torch.float32 if narrow.found else param.dtype).eps)
    moved = train_step(model, arguments, lr=step.lr, evaluate=True)
    return worst(moved, step)[0]


def _split(network: Network, result: Result, measure: bool, lr: float) -> Step:
    model, arguments = _built(network)
    model = shard(model, timeout=120.0, sample_inputs=arguments)
    meter = Meter(model, arguments, result.ranks)
    measuring = meter.counting() if measure else None
    step = train_step(model, arguments, lr=lr, evaluate=True, keep=dist.get_rank() == 0, measuring=measuring)
    result.parameters_a_rank = sum(param.numel() for param in model.parameters())
    if measure:
        result.kept_split, result.kept_whole = meter.kept(True), meter.kept(False)
        result.sent, result.whole = meter.sent, dict(meter.whole)
        convolutions = sum(isinstance(module, _ConvNd) for module in model.modules())
        result.convolutional = convolutions >= SEVERAL and not meter.multiplies_activations
        result.seconds = (result.seconds[0], _pass(model, arguments))
    return step


def compare(network: Network, votes: dist.ProcessGroup | None, measure: bool) -> Result:
    """How ``network`` does over the ranks of the default group; the same on every rank. Collective."""
    rank, size = dist.get_rank(), dist.get_world_size()
    result = Result(network.name, network.family, size)
    expected = Step()  # of the first rank
    if rank == 0:
        try:
            expected = _one_device(network, result, measure)
        except Exception as error:
            result.reason = f"does not run on one device: {_line(error)}"
    gc.collect()
    result.reason, lr = _of_the_first((result.reason, expected.lr), votes)
    if result.reason:
        return result
    try:
        found = _split(network, result, measure, lr)
        if rank == 0:
            result.worst, result.where = worst(found, expected)
            if not result.worst <= TOLERANCE:
                result.rounding = _rounding(network, expected)
                if not result.worst <= ROUNDING * result.rounding:
                    moved = f"rounding on one device moves it by {result.rounding:.0e}"
                    result.reason = f"{result.where} is off by {result.worst:.1e}; {moved}"
    except Exception as error:
        result.reason = _line(error)
    gc.collect()
    everywhere: list[Any] = [None] * size
    dist.all_gather_object(everywhere, (result.reason, result.seconds[1]), group=votes)
    result.reason = next((reason for reason, _ in everywhere if reason), "")
    result.seconds = (result.seconds[0], max(seconds for _, seconds in everywhere))
    return result


def _of_the_first(value: Any, votes: dist.ProcessGroup | None) -> Any:
    """The value that the first rank has."""
    values = [value]
    dist.broadcast_object_list(values, src=0, group=votes)
    return values[0]


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:240]


def run_on_rank(names: tuple[str, ...], measure: bool = False, output: str = "") -> dict[str, Result]:
    """The results of these networks; the first rank adds each to the file ``output`` as it comes."""
    warnings.filterwarnings("ignore")
    votes = dist.new_group(timeout=datetime.timedelta(minutes=30))
    networks, results = zoo(), {}
    for name in names:
        results[name] = compare(networks[name], votes, measure)
        if output and dist.get_rank() == 0:
            with open(output, "a") as file:
                file.write(json.dumps(asdict(results[name])) + "\n")
    return results


def every_third(names: tuple[str, ...]) -> tuple[str, ...]:
    """Those that are split over four ranks, too."""
    return names[::IN_EVERY_THIRD]


def sweep(names: tuple[str, ...], ranks: int, path: Path) -> None:
    """Adds the results of these networks to the file, a launch for a few of them."""
    missing = [name for name in names if (name, ranks) not in read(path)]
    while missing:
        batch = tuple(missing[:8])
        try:
            run_ranks(ranks, run_on_rank, batch, True, str(path), timeout=3000.0)
        except AssertionError as error:
            at = next(name for name in batch if (name, ranks) not in read(path))
            reason = f"a rank hung or ended: {str(error).strip().splitlines()[-1][:200]}"
            with path.open("a") as file:
                file.write(json.dumps(asdict(Result(at, zoo()[at].family, ranks, reason))) + "\n")
        done = read(path)
        for name in batch:
            if (name, ranks) in done:
                result = done[name, ranks]
                print(f"{name} P={ranks}: {result.reason or f'right, {result.worst:.0e}'}", file=sys.stderr, flush=True)
        missing = [name for name in missing if (name, ranks) not in done]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parallel.zoo", description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", help="names, or beginnings of names (default: all, and a third at P=4)")
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4], help="numbers of ranks to split over")
    parser.add_argument("--results", type=Path, default=Path("runs/models.json"), help="the file that keeps results")
    parser.add_argument("--output", type=Path, help="the file to write the table to")
    arguments = parser.parse_args(argv)
    networks = zoo()
    names = tuple(networks)
    if arguments.models:
        names = tuple(name for name in names if name.startswith(tuple(arguments.models)))
        if not names:
            parser.error(f"--models must be names of the zoo, got {arguments.models}")
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for ranks in arguments.ranks:
        chosen = names if ranks == 2 or arguments.models else every_third(names)
        sweep(tuple(name for name in chosen if not networks[name].skip), ranks, arguments.results)
    found = read(arguments.results)
    if arguments.output:
        wanted = [(name, 2) for name in networks] + [(name, 4) for name in every_third(tuple(networks))]
        arguments.output.write_text(table([found[key] for key in found if key[0] in networks], wanted, networks))
    return int(any(found[key].reason for key in found if key[0] in names))


if __name__ == "__main__":
    sys.exit(main())
