"""What a split costs, layer by layer, before anything is trained.

One forward and one backward pass of a model on the meta device, split as one of P ranks holds it: every rule is asked,
nothing is computed and nothing is sent, so one process tells what 512 ranks would do.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves

from tlgc_mp.errors import UsageError, is_count
from tlgc_mp.nn.arguments import check_module
from tlgc_mp.parallel import collectives, split_tensor
from tlgc_mp.parallel.joins import fit_joins
from tlgc_mp.parallel.meta_pass import copy_on_meta, run_on_meta, without_values
from tlgc_mp.parallel.plan import Placement, plan
from tlgc_mp.parallel.sharded import Region

ELSEWHERE = "(between layers)"


@dataclass
class LayerCost:
    """What one layer, or the code between layers of one module, costs a rank in a training step.

    Attributes:
        name: of the module.
        kind: how its parameters are held (:mod:`tlgc_mp.parallel.plan`), or ``code`` where it holds none.
        reason: why they are whole, where they are.
        parameters: how many there are in all.
        parameters_per_rank: how many of them a rank holds.
        sent: collective -> bytes that a rank sends for it in a step, forward and backward, in a ring.
        whole: operator -> how often it gathered its tensors and computed whole in a step.
        saved: bytes that autograd keeps for backward on a rank; ``saved_whole`` of them of tensors that are not split.
    """

    name: str
    kind: str
    reason: str = ""
    parameters: int = 0
    parameters_per_rank: int = 0
    sent: Counter[str] = field(default_factory=Counter)
    whole: Counter[str] = field(default_factory=Counter)
    saved: int = 0
    saved_whole: int = 0


@dataclass
class LayoutReport:
    """How a model lies over P tensor-parallel ranks, and what a step of it costs; printed, it is a table.

    Attributes:
        tensor_parallel: P.
        layers: in the order of the model.
        measured: whether a pass told the bytes; without one, only the parameters are known.
    """

    tensor_parallel: int
    layers: list[LayerCost]
    measured: bool = False

    @property
    def bytes_sent(self) -> int:
        """Bytes that a rank sends in a training step."""
        return sum(sum(layer.sent.values()) for layer in self.layers)

    @property
    def parameters_split(self) -> float:
        """Share of the parameters that are split over the ranks, 0 to 1."""
        total = sum(layer.parameters for layer in self.layers)
        held = sum(layer.parameters_per_rank for layer in self.layers)
        return (
            0.0 if not total or self.tensor_parallel == 1 else (total - held) / (total - total / self.tensor_parallel)
        )

    @property
    def activations_split(self) -> float:
        """Share of the bytes kept for backward, over all ranks, that are split; 0 where nothing was measured."""
        split_bytes = sum(layer.saved - layer.saved_whole for layer in self.layers) * self.tensor_parallel
        total = split_bytes + sum(layer.saved_whole for layer in self.layers)
        return split_bytes / total if total else 0.0

    def to_dict(self) -> dict[str, object]:
        """As JSON can hold it."""
        return {
            "tensor_parallel": self.tensor_parallel,
            "parameters_split": self.parameters_split,
            **({"activations_split": self.activations_split, "bytes_sent": self.bytes_sent} if self.measured else {}),
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        header = ["layer", "held", "parameters a rank", "MB sent a step", "computed whole, why"]
        rows = [header]
        for layer in self.layers:
            if layer.kind == "code" and not layer.sent and not layer.whole:
                continue
            sent = ", ".join(f"{name} {size / 1e6:.3g}" for name, size in layer.sent.items())
            whole = ", ".join(f"{name} x{count}" for name, count in layer.whole.items())
            why = "; ".join(part for part in (whole, layer.reason) if part)
            rows.append([layer.name, layer.kind, f"{layer.parameters_per_rank:,}", sent, why])
        widths = [max(len(row[column]) for row in rows) for column in range(len(header) - 1)]
        lines = ["  ".join([*map(str.ljust, row, widths), row[-1]]).rstrip() for row in rows]
        text = f"{self.parameters_split:.1%} of the parameters are split over {self.tensor_parallel} ranks"
        if self.measured:
            text += (
                f", and {self.activations_split:.1%} of the bytes kept for backward; "
                f"a rank sends {self.bytes_sent / 1e6:.3g} MB a step"
            )
        return "\n".join([*lines, text])


def static_report(model: nn.Module, placements: dict[str, Placement], tensor_parallel: int) -> LayoutReport:
    """What is known of a one-device model without a pass."""
    layers = []
    counted: set[int] = set()
    for name, placement in placements.items():
        cost = LayerCost(name, placement.kind, placement.reason)
        for key, param in model.get_submodule(name).named_parameters(recurse=False):
            if id(param) not in counted:
                counted.add(id(param))
                cost.parameters += param.numel()
                cost.parameters_per_rank += param.numel() // (tensor_parallel if key in placement.dims else 1)
        layers.append(cost)
    return LayoutReport(tensor_parallel, layers)


def layout_report(model: nn.Module, inputs: object = None, *, tensor_parallel: int | None = None) -> LayoutReport:
    """How a model lies over P tensor-parallel ranks, and what a training step sends and keeps.

    Args:
        model: a one-device model, which is taken to be split with these inputs as ``sample_inputs``, or one that was
            split; on any device. It is left as it is.
        inputs: a tensor, or a tuple of what ``model`` takes, for one replica's batch. Only shapes and types are looked
            at. Without them, only the parameters are told.
        tensor_parallel: P; for a model that was split, that of the split.

    Raises:
        UsageError: an argument of another kind, or a model whose code reads values of tensors, which the meta device
            has not.
    """
    check_module("model", model)
    region = getattr(model, "tlgc_region", None)
    if isinstance(region, Region):
        ranks, placements = region.ranks.size, None
        report = copy.deepcopy(cast(LayoutReport, region.report))
    else:
        if not is_count(tensor_parallel):
            raise UsageError(f"tensor_parallel must be a number of ranks, got {tensor_parallel!r}; use 1 or more")
        assert tensor_parallel is not None
        ranks, placements = tensor_parallel, plan(model, tensor_parallel)
        report = static_report(model, placements, ranks)
    if inputs is None or ranks == 1:
        return report
    if placements is not None:
        placements = fit_joins(model, placements, ranks, inputs)
    twin = copy_on_meta(model, ranks, placements)
    recorder = _Recorder(report, {module: name for name, module in twin.named_modules()}, ranks)
    with recorder.recording():
        out = run_on_meta(twin, inputs)
        losses = [t.float().sum() for t in tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
        try:
            if losses:
                torch.stack(losses).sum().backward()
        except (NotImplementedError, RuntimeError) as error:
            raise without_values(error) from error
    report.measured = True
    return report


class _Recorder:
    """Adds what a pass does to the layers of a report."""

    def __init__(self, report: LayoutReport, names: dict[nn.Module, str], ranks: int) -> None:
        self.report = report
        self.names = names
        self.ranks = ranks
        self.by_name = {layer.name: layer for layer in report.layers}
        self.inside: list[str] = [""]
        self.tagged: set[Node] = set()

    def cost(self) -> LayerCost:
        name = self.inside[-1]
        if name not in self.by_name:
            self.by_name[name] = LayerCost(name or ELSEWHERE, "code")
            self.report.layers.append(self.by_name[name])
        return self.by_name[name]

    def sent(self, collective: str, size: int) -> None:
        """Bytes that a rank sends for it in a ring, of ``size`` that it gives."""
        others = self.ranks - 1
        if collective in ("all_gather", "coarse_gather"):
            part = float(others)
        else:
            part = others / self.ranks * (2 if collective in ("all_reduce", "sum_partials") else 1)
        self.cost().sent[collective] += round(size * part)

    def computed(self, operator: object, how: str) -> None:
        if how == "whole":
            self.cost().whole[str(operator).removeprefix("aten.").partition(".")[0]] += 1

    def saved(self, tensor: Tensor) -> Tensor:
        cost = self.cost()
        is_split = type(tensor) is split_tensor.SplitTensor
        share = tensor.share if type(tensor) is split_tensor.SplitTensor else tensor
        size = share.numel() * share.element_size()
        cost.saved += size
        if not is_split or tensor.cut.dim is None:  # type: ignore[attr-defined]
            cost.saved_whole += size
        return tensor

    def enter(self, module: nn.Module, inputs: object) -> None:
        self.inside.append(self.names[module])

    def leave(self, module: nn.Module, inputs: object, output: object) -> None:
        name = self.inside.pop()
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                if tensor.grad_fn not in self.tagged:  # hooks of a tensor run before those of its node
                    Tensor.register_hook(tensor, self.entering(name))  # type: ignore[no-untyped-call]
                self.tag(tensor.grad_fn, name)

    def entering(self, name: str) -> Callable[[tuple[Tensor | None, ...]], None]:
        return lambda grads: self.inside.__setitem__(slice(None), [name])

    def tag(self, node: Node, name: str) -> None:
        """Has what backward does in the nodes that ``name`` made count as its own."""
        waiting: list[Node | None] = [node]
        while waiting:
            found = waiting.pop()
            if found is None or found in self.tagged:
                continue
            self.tagged.add(found)
            found.register_prehook(self.entering(name))
            waiting.extend(following for following, _ in found.next_functions)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        handles = [module.register_forward_pre_hook(self.enter) for module in self.names]
        handles += [module.register_forward_hook(self.leave, always_call=True) for module in self.names]
        collectives.recorders.append(self.sent)
        split_tensor.observers.append(self.computed)
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.saved, lambda tensor: tensor):
                yield
        finally:
            collectives.recorders.remove(self.sent)
            split_tensor.observers.remove(self.computed)
            for handle in handles:
                handle.remove()
