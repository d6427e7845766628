"""Private names of torch by which a step is written down."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tests.versions.rows import relies_on


@relies_on("torch.utils._python_dispatch.TorchDispatchMode", "._cdata", "._overloadpacket")
def operators_of_a_step() -> None:
    """A mode sees every operator, also on the meta device; a storage has one number as long as it lives; an operator
    knows the name under which its arithmetic is counted."""
    seen: list[Any] = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func._overloadpacket)
            return func(*args, **(kwargs or {}))

    x = torch.ones(2, 3, device="meta")
    with Mode():
        y = (x @ x.T).view(4)
    assert torch.ops.aten.mm in seen and torch.ops.aten.view in seen
    assert y.untyped_storage()._cdata == y.view(2, 2).untyped_storage()._cdata != x.untyped_storage()._cdata
    assert torch.ops.aten.mm in flop_registry
