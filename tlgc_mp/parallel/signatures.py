"""The types of operators and functions of torch, and of what they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.autograd.function import FunctionCtx

from tlgc_mp.parallel.layout import Layout, Ranks

if TYPE_CHECKING:
    from torch._ops import OpOverload

Geometry: TypeAlias = tuple[Sequence[int], Sequence[int]]
"""Shape and strides."""
Offset: TypeAlias = int | torch.SymInt
Operator: TypeAlias = "OpOverload[..., Any]"
Function: TypeAlias = Callable[..., Any]
"""Of torch, above its operators."""
Args: TypeAlias = tuple[Any, ...]
Kwargs: TypeAlias = dict[str, Any]
"""Those of an operator or a function: of any type that torch takes."""
Rule: TypeAlias = Callable[[Operator, Args, Kwargs], object]


class Context(FunctionCtx):
    """What the functions between plain and split tensors keep for backward."""

    ranks: Ranks
    layout: Layout
