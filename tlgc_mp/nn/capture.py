"""Whether a layer is called by a tool that records or transforms the call.

Such tools take torch's own functions, and no autograd function of ours, no tensor that is written in place, and no
choice that depends on the input.
"""

from __future__ import annotations

import torch
from torch.fx import Proxy


def is_captured(x: object) -> bool:
    """Whether ``x`` comes from torch.fx, torch.export (and so ONNX), or a transform of torch.func.

    torch.compile and torch.jit.trace take the layers as they are.
    """
    if isinstance(x, Proxy) or torch.compiler.is_exporting():
        return True
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
