"""Private names of torch by which maps enter joins, and by which gradients know that they are shares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.ranks import run_ranks
from tests.versions.rows import relies_on


@relies_on("._version")
def version() -> None:
    """Counts the writes to a tensor, through its views too, and where no gradient is asked for."""
    x = torch.zeros(4)
    x.add_(1)
    x[:2].mul_(2)
    with torch.no_grad():
        x.zero_()
    assert x._version == 3 and x.detach()._version == 3


class _Told(Tensor):
    """Tells which functions of torch it came to."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        CAME.append(func)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


CAME: list[Any] = []


@relies_on("torch._foreach_norm", "torch._amp_foreach_non_finite_check_and_unscale_")
def functions_of_all_gradients() -> None:
    """What torch's clipping and its loss scaling call, with all gradients of a type; one of a class is asked first."""
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    for param in params:
        param.grad = torch.ones_like(param).as_subclass(_Told)
    CAME.clear()
    torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
    assert torch._foreach_norm in CAME
    CAME.clear()
    torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=False)
    assert torch.linalg.vector_norm in CAME
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))
    CAME.clear()
    scaler.unscale_(torch.optim.SGD(params, lr=0.1))
    assert torch._amp_foreach_non_finite_check_and_unscale_ in CAME
    assert list(torch._foreach_norm([torch.ones(4), torch.full((1,), 3.0)])) == [2.0, 3.0]


def _wrapped() -> None:
    seen = []
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda *args: seen.append(DistributedDataParallel._active_ddp_module))
    wrapper = DistributedDataParallel(layer)
    wrapper(torch.ones(1, 2))
    assert seen == [wrapper] and DistributedDataParallel._active_ddp_module is None


@relies_on("torch.nn.parallel.DistributedDataParallel._active_ddp_module")
def wrapper_at_work() -> None:
    """The wrapper that is in its forward pass, and none outside of one."""
    run_ranks(2, _wrapped)
