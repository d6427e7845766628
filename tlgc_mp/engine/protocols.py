"""DeepSpeed's engine as the rooms above use it; its own class carries no types. Loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle


class Scheduler(Protocol):
    """Of the learning rate: torch's, DeepSpeed's, or another with the same methods."""

    def step(self) -> None: ...

    def state_dict(self) -> dict[str, object]: ...

    def load_state_dict(self, state_dict: Any, /) -> None: ...


class Engine(Protocol):
    """What :func:`tlgc_mp.initialize` returns first, a ``deepspeed.DeepSpeedEngine``.

    Attributes:
        optimizer: what DeepSpeed made of the optimizer, another class at each ZeRO stage.
        basic_optimizer: the optimizer that was given or configured.
        monitor: DeepSpeed's ``MonitorMaster``.
    """

    module: nn.Module
    device: torch.device
    optimizer: Any
    basic_optimizer: torch.optim.Optimizer
    lr_scheduler: Scheduler | None
    data_parallel_group: dist.ProcessGroup
    dp_world_size: int
    global_steps: int
    global_samples: int
    micro_steps: int
    monitor: Any
    enable_backward_allreduce: bool
    save_16bit_model: Callable[..., bool]
    first_dataloader_check: RemovableHandle | None
    clip_fp32_gradients: Callable[[], None]

    def __call__(self, *inputs: object, **options: object) -> Any:
        """Of the module."""

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def backward(self, loss: Tensor, /) -> object: ...

    def step(self) -> None: ...

    def train(self, mode: bool = True, /) -> object: ...

    def eval(self) -> object: ...

    def gradient_accumulation_steps(self) -> int: ...

    def train_batch_size(self) -> int: ...

    def zero_optimization_stage(self) -> int: ...

    def zero_optimization_partition_weights(self) -> bool: ...

    def _take_model_step(self, lr_kwargs: dict[str, object] | None, /) -> None: ...

    def was_step_applied(self) -> bool: ...
