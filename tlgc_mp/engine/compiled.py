"""torch.compile of what an engine trains.

What is compiled is the forward pass of the model alone, whole, with its backward pass: the engine's hooks stay around
it, which read clocks and compare ranks. At ZeRO 3 hooks gather the parameters of each layer, so each layer is compiled
by itself there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import TYPE_CHECKING

from tlgc_mp.engine.protocols import Engine
from tlgc_mp.errors import UsageError
from tlgc_mp.models.names import library_model

if TYPE_CHECKING:
    from torch import nn


def check_compiled(model: str, tensor_parallel: int, activation_checkpointing: bool) -> None:
    """Raises :class:`~tlgc_mp.errors.UsageError` where ``--compile`` has no graph to compile."""
    if activation_checkpointing:
        raise UsageError(
            "--compile must be left out with --activation-checkpointing, which computes blocks twice, outside of any "
            "graph; give one of them"
        )
    if library_model(model) is not None and tensor_parallel > 1:
        raise UsageError(
            f"--compile must be left out with --model={model} over {tensor_parallel} tensor-parallel ranks, whose "
            "layers show weights that lie in shares; use --tp 1, or a model of this package"
        )


def backend_here() -> str:
    """torch's own compiler where it finds the C++ compiler that it calls, else operators as they are, in one graph."""
    return "inductor" if shutil.which(os.environ.get("CXX", "g++")) else "aot_eager"


def compile_training(engine: Engine, backend: str | None = None) -> str:
    """Has the engine's model compiled at the first training step; evaluation stays as it is.

    Losses and gradients are those of the model as it is but for rounding, and what is dropped is the same.

    Args:
        backend: of torch.compile; :func:`backend_here` where not given.

    Returns:
        The backend.
    """
    backend = backend or backend_here()
    partitioned = engine.zero_optimization_partition_weights()
    for module in _layers(engine.module) if partitioned else (engine.module,):
        _compile(module, backend)
    return backend


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that hold parameters, less those that stand around others."""
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)) and next(module.children(), None) is None:
            yield module


def _compile(module: nn.Module, backend: str) -> None:
    import torch

    eager = module.forward

    def forward(*args: object, **kwargs: object) -> object:
        return eager(*args, **kwargs)

    # What has been compiled is kept, and its number limited, by code object: this module gets one of its own.
    own = FunctionType(forward.__code__.replace(), globals(), "forward", None, forward.__closure__)
    # Random numbers are torch's own then, and not those that the compiler would draw.
    options: dict[str, str | int | bool | Callable[..., object]] | None
    options = {"fallback_random": True} if backend == "inductor" else None
    compiled: Callable[..., object] = torch.compile(
        own, fullgraph=True, dynamic=False, backend=backend, options=options
    )

    def training_or_not(*args: object, **kwargs: object) -> object:
        return compiled(*args, **kwargs) if module.training else eager(*args, **kwargs)

    module.forward = training_or_not
