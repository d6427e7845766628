"""The benchmark ``tlgc-mp bench inference``: a network's forms for inference, in torch and in ONNX Runtime.

Dense, group and two-level group convolution, each as it is trained and folded (:func:`tlgc_mp.fold`), one thread, in
rounds over all of them.

    DIR/inference.json   {"run": machine, versions, git commit, date and command; "rows": [see :func:`measure`]}
    DIR/inference.md     the rows as a table
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, TypedDict, get_args

from tlgc_mp.bench.report import describe, table
from tlgc_mp.bench.settings import check_counts, output_folder
from tlgc_mp.host import Provenance, describe_run, replace_file
from tlgc_mp.models.names import check_model
from tlgc_mp.paper.printed import printed_rows

if TYPE_CHECKING:
    from torch import Tensor, nn

Clock: TypeAlias = Literal["torch_ms", "onnx_ms"]
CLOCKS: tuple[Clock, ...] = get_args(Clock)


class Row(TypedDict):
    """A form of a network; what cannot be had is ``None``.

    ``flops`` an image; ``bytes`` of its safetensors file; ``torch_ms`` and ``onnx_ms`` of a call, medians of CPU time;
    ``nodes`` of the ONNX graph; ``difference`` of its outputs from those of the form that is trained, relative to the
    largest; ``paper_error``, percent.
    """

    model: str
    conv: str
    groups: int
    folded: bool
    parameters: int
    flops: int
    bytes: int
    difference: float
    paper_error: float | None
    torch_ms: float | None
    onnx_ms: float | None
    nodes: int | None


CONVOLUTIONS = ("sc", "gc", "gc-2l")
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
SMALL_IMAGES, LARGE_IMAGES = 32, 224


@dataclass(frozen=True)
class InferenceSettings:
    """A run of the benchmark, every choice made.

    Attributes:
        groups: N, of gc and gc-2l.
        batch_size: images a call.
        rounds: calls of each network that are timed.
        output: the folder of what is written.
    """

    models: tuple[str, ...]
    groups: int
    batch_size: int
    rounds: int
    output: str


def resolve(options: Namespace) -> InferenceSettings:
    """Turns parsed command-line ``options`` into a complete run.

    Raises:
        UsageError: an option that cannot work.
    """
    check_counts({"--groups": options.groups, "--batch-size": options.batch_size, "--rounds": options.rounds})
    models = tuple(options.models or (["wrn-10-1"] if options.quick else ["mobilenet_v2", "wrn-28-10"]))
    for model in models:
        for conv in CONVOLUTIONS:
            check_model(model, conv, 1 if conv == "sc" else options.groups)
    folder = output_folder(options.output, time.strftime("inference-%Y%m%d-%H%M%S"))
    return InferenceSettings(models, options.groups, options.batch_size, 1 if options.quick else options.rounds, folder)


def run(settings: InferenceSettings) -> int:
    """Measures, writes the files, and says how it goes; the exit status."""
    description = describe_run()
    rows: list[Row] = []
    for model in settings.models:
        print(f"inference  {model} ...", flush=True)
        rows += measure(model, settings)
    text = markdown(rows, description)
    found = json.dumps({"run": description, "settings": vars(settings), "rows": rows}, indent=1) + "\n"
    for name, content in (("inference.json", found), ("inference.md", text)):
        replace_file(os.path.join(settings.output, name), content)
    print(f"{text}\nWrote inference.json and inference.md to {settings.output}", flush=True)
    return 0


def measure(name: str, settings: InferenceSettings) -> list[Row]:
    """A row for each form of the model ``name``."""
    import torch
    from safetensors.torch import save

    from tlgc_mp.models import create_model, fold

    size = SMALL_IMAGES if name.startswith("wrn-") else LARGE_IMAGES
    images = torch.randn(settings.batch_size, 3, size, size, generator=torch.Generator().manual_seed(0))
    rows: list[Row] = []
    calls: dict[tuple[int, Clock], Callable[[], object]] = {}
    with _one_thread(), torch.no_grad(), torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        for conv in CONVOLUTIONS:
            groups = 1 if conv == "sc" else settings.groups
            init = "scaled" if conv == "gc-2l" else "zero"
            trained = create_model(name, conv=conv, groups=groups, coarse_init=init).eval()
            expected = trained(images)
            for model in (trained, fold(trained)):
                found = model(images)
                row: Row = {
                    "model": name,
                    "conv": conv,
                    "groups": groups,
                    "folded": model is not trained,
                    "parameters": sum(param.numel() for param in model.parameters()),
                    "flops": flops(model, images[:1]),
                    "bytes": len(save({key: value.contiguous() for key, value in model.state_dict().items()})),
                    "difference": float((found - expected).abs().max() / expected.abs().max()),
                    "paper_error": paper_error(name, conv, groups),
                    "torch_ms": None,
                    "onnx_ms": None,
                    "nodes": None,
                }
                index = len(rows)
                rows.append(row)
                calls[index, "torch_ms"] = lambda model=model: model(images)  # type: ignore[misc]
                session = _session(model, images, os.path.join(folder, f"{index}.onnx"))
                if session is not None:
                    row["nodes"], calls[index, "onnx_ms"] = session
        samples: dict[tuple[int, Clock], list[float]] = {key: [] for key in calls}
        for turn in range(settings.rounds + 1):
            for key, call in calls.items():
                start = time.process_time()
                call()
                if turn > 0:  # the first call sets up
                    samples[key].append(1e3 * (time.process_time() - start))
    for (index, clock), values in samples.items():
        rows[index][clock] = statistics.median(values)
    return rows


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def flops(model: nn.Module, images: Tensor) -> int:
    """Of the convolutions and linear layers of a call; a multiplication and an addition are two."""
    from torch import nn

    from tlgc_mp.nn import TwoLevelConv2d

    total = 0

    def count(module: nn.Module, inputs: tuple[object, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Linear):
            total += 2 * output.shape[0] * module.weight.numel()
            return
        assert isinstance(module, nn.Conv2d | TwoLevelConv2d)
        needed = module.weight.numel()
        if isinstance(module, TwoLevelConv2d):
            needed += module.restriction.numel() + module.out_channels * module.shared_maps
        total += 2 * output.shape[0] * output.shape[2:].numel() * needed

    kinds = nn.Conv2d | nn.Linear | TwoLevelConv2d
    hooks = [module.register_forward_hook(count) for module in model.modules() if isinstance(module, kinds)]
    model(images)
    for hook in hooks:
        hook.remove()
    return total


def paper_error(name: str, conv: str, groups: int) -> float | None:
    """The test error that the paper prints, in percent: of ImageNet or of CIFAR-10."""
    for printed in printed_rows():
        if (printed.model, printed.conv, printed.groups) == (name, conv, groups):
            return printed.errors.get("imagenet", printed.errors.get("cifar10"))
    return None


def _session(model: nn.Module, images: Tensor, path: str) -> tuple[int, Callable[[], object]] | None:
    """(the nodes of the model's graph, a call of it in ONNX Runtime), where that is installed."""
    if any(importlib.util.find_spec(package) is None for package in ONNX_PACKAGES):
        return None
    import onnx
    import onnxruntime
    import torch

    batch = images if len(images) > 1 else images.repeat(2, 1, 1, 1)  # torch takes a batch of one for a constant
    torch.onnx.export(
        model, (batch,), path, dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: images.numpy()}
    nodes = len(onnx.load(path, load_external_data=False).graph.node)
    return nodes, lambda: session.run(None, inputs)


_HEAD = (
    *("model", "", "parameters, M", "GFLOP an image", "file, MB", "torch, ms", "of sc, folded"),
    *("ONNX Runtime, ms", "of sc, folded", "nodes", "difference", "test error of the paper, %"),
)


def markdown(rows: list[Row], description: Provenance) -> str:
    """The rows as a table, with what it means and where it comes from."""
    return "\n".join(
        [
            "# Inference",
            "",
            "Medians of CPU time of one thread. *Folded*: `tlgc_mp.fold(model)`, or `tlgc-mp export --fold`: two-level "
            "layers as plain convolutions, BatchNorm folded into them where it follows one. Ratios are to the dense "
            "network, folded as well. *Difference*: of the outputs from those before folding, relative to the largest, "
            "float32. ONNX Runtime folds BatchNorm by itself.",
            "",
            *table(_HEAD, [_line(row, rows) for row in rows]),
            "",
            *describe(description),
            "",
        ]
    )


def _line(row: Row, rows: list[Row]) -> list[str]:
    (dense,) = (r for r in rows if r["model"] == row["model"] and r["conv"] == "sc" and r["folded"])
    times = []
    for clock in CLOCKS:
        own, of_dense = row[clock], dense[clock]
        times += ["", ""] if own is None or of_dense is None else [f"{own:.2f}", f"{own / of_dense:.2f}"]
    kind = row["conv"] + (f", N = {row['groups']}" if row["groups"] > 1 else "") + (", folded" if row["folded"] else "")
    return [
        row["model"],
        kind,
        f"{row['parameters'] / 1e6:.2f}",
        f"{row['flops'] / 1e9:.2f}",
        f"{row['bytes'] / 1e6:.1f}",
        *times,
        "" if row["nodes"] is None else str(row["nodes"]),
        f"{row['difference']:.0e}" if row["folded"] else "",
        "" if row["paper_error"] is None else f"{row['paper_error']:.2f}",
    ]
