"""WideResNet split by layers: naive model parallelism and, with several micro-batches, a pipeline.

Naive model parallelism is how Section 4.1.2 of *Two-level Group Convolution* (https://arxiv.org/abs/2110.05060) trains
a dense network that does not fit one device: consecutive layers on each rank, one rank busy at a time. With M > 1
micro-batches the schedule is PipeDream-Flush (1F1B) of *Memory-Efficient Pipeline-Parallel DNN Training*
(https://arxiv.org/abs/2006.09503): rank r of P runs P - 1 - r forward passes ahead, then forward and backward in turn.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tlgc_mp.errors import UsageError, divisors, must_be, one_of
from tlgc_mp.models.wide_resnet import WideResNet
from tlgc_mp.nn.init import materialize


class Part(NamedTuple):
    """Residual units ``start`` to ``stop - 1`` of a WideResNet, and the shape (C, H, W) that the first of them takes.

    The part that starts at unit 0 begins with the stem and takes images; the last one ends with the head.
    """

    start: int
    stop: int
    input_shape: tuple[int, int, int]


def split_by_work(model: WideResNet, parts: int, image_shape: tuple[int, int, int]) -> list[Part]:
    """Cuts ``model`` between residual units so that the part with the most multiply-adds has as few as possible.

    Args:
        model: on the meta device.
        parts: at most the number of residual units.
        image_shape: (3, H, W).

    Raises:
        UsageError: an argument that cannot work.
    """
    if not all(param.is_meta for param in model.parameters()):
        raise UsageError('model must be on the meta device, got one with values; use create_model(..., device="meta")')
    units = len(model.units)
    if not 1 <= parts <= units:
        raise must_be("parts", f"1 to {units}, the number of residual units", parts)
    channels = next(model.stem.parameters()).shape[1]
    if len(image_shape) != 3 or image_shape[0] != channels or min(image_shape) < 1:
        raise must_be("image_shape", f"({channels}, height, width)", image_shape)
    works, shapes = _measure(model, image_shape)
    total = list(itertools.accumulate(works, initial=0))
    # best[stop]: the largest part, at its smallest, and the first unit of each part, when units before stop are cut.
    best: list[tuple[float, tuple[int, ...]]] = [(math.inf, ()), *((work, (0,)) for work in total[1:])]
    for _ in range(parts - 1):
        best = [
            min(
                ((max(best[cut][0], total[stop] - total[cut]), (*best[cut][1], cut)) for cut in range(stop)),
                default=(math.inf, ()),
            )
            for stop in range(units + 1)
        ]
    starts = best[units][1]
    return [Part(start, stop, shapes[start]) for start, stop in zip(starts, (*starts[1:], units), strict=True)]


def _measure(model: WideResNet, image_shape: tuple[int, int, int]) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Multiply-adds of each residual unit a forward pass of one image, and the shape that each takes.

    The stem counts with the first unit and takes images, the head counts with the last.
    """
    works: list[int] = []
    shapes: list[tuple[int, int, int]] = []
    work = 0

    def enter_unit(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal work
        if not shapes:
            shapes.append(image_shape)
            return
        works.append(work)
        work = 0
        _, channels, height, width = inputs[0].shape
        shapes.append((channels, height, width))

    def leave_layer(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal work
        weights = sum(param.numel() for param in module.parameters(recurse=False) if param.dim() > 1)
        work += weights * output.shape[2:].numel()

    hooks = [unit.register_forward_pre_hook(enter_unit) for unit in model.units]
    hooks += [
        module.register_forward_hook(leave_layer)
        for module in model.modules()
        if any(param.dim() > 1 for param in module.parameters(recurse=False))
    ]
    # BatchNorm in training needs more than one value a channel, whatever the size of the image.
    with torch.no_grad():
        model(torch.empty(2, *image_shape, dtype=model.head.weight.dtype, device="meta"))
    for hook in hooks:
        hook.remove()
    return [*works, work], shapes


def _take_part(model: WideResNet, part: Part) -> nn.Module:
    """The layers of ``part`` under the names that they have in ``model``, which is taken apart."""
    is_first, is_last = part.start == 0, part.stop == len(model.units)
    units = model.units[part.start : part.stop]
    if is_last:
        model.units = units
        if not is_first:
            model.register_module("stem", nn.Identity())
        return model
    return nn.Sequential(OrderedDict({"stem": model.stem, "units": units} if is_first else {"units": units}))


def _message(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C), contiguous as a message has to be: a view where ``x`` is channels_last."""
    return x.detach().permute(0, 2, 3, 1).contiguous()


def _wait(work: dist.Work | None) -> None:
    """Until a message has gone or come, or the timeout of its group has passed, which raises."""
    assert work is not None, "this rank is not in the group"
    work.wait()


class _Link:
    """The way to a neighbouring rank and back: one message a micro-batch each way, received ahead of its use.

    Args:
        peer: the neighbour's global rank.
        incoming: the group of the messages from it.
        outgoing: the group of the messages to it, another one: NCCL runs the messages of a group in order, and an
            activation received ahead of its use would hold up the gradient without which its sender does not go on.
        messages: how many come in a step.
        buffers: (B, C, H, W), channels_last, at most one a message; received into in turn.
    """

    def __init__(
        self,
        peer: int,
        incoming: dist.ProcessGroup,
        outgoing: dist.ProcessGroup,
        messages: int,
        buffers: list[Tensor],
    ) -> None:
        self.peer, self.incoming, self.outgoing = peer, incoming, outgoing
        self.messages, self.buffers = messages, buffers

    def open(self) -> None:
        """Starts to receive the first messages of a step."""
        self.expected = self.messages
        self.arriving: deque[tuple[dist.Work | None, Tensor]] = deque()
        self.leaving: list[tuple[dist.Work | None, Tensor]] = []
        for buffer in self.buffers:
            self.reuse(buffer)

    def receive(self) -> Tensor:
        """The next message, in the buffer that it came in."""
        work, buffer = self.arriving.popleft()
        _wait(work)
        return buffer

    def reuse(self, buffer: Tensor) -> None:
        """Starts to receive another message of this step, if one is still to come, in ``buffer``."""
        if self.expected > 0:
            self.expected -= 1
            self.arriving.append((dist.irecv(_message(buffer), self.peer, self.incoming), buffer))

    def send(self, x: Tensor) -> None:
        """Starts to send ``x``, which must not change before the step is over."""
        message = _message(x)
        self.leaving.append((dist.isend(message, self.peer, self.outgoing), message))

    def close(self) -> None:
        """Waits until all that was sent has gone."""
        for work, _ in self.leaving:
            _wait(work)
        self.leaving.clear()


def _step_on_arrival(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Has ``optimizer``, which is of ``param`` alone, step whenever the gradient has been computed."""

    def step(_: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    param.register_post_accumulate_grad_hook(step)
    return optimizer


class LayerPipeline:
    """A WideResNet split by layers over the ranks of a process group. Collective, as is every step.

    The initial weights and, with one micro-batch, every step are those of the whole model on one device. With M > 1,
    BatchNorm normalizes each micro-batch alone, as gradient accumulation on one device does.

    Args:
        model: on the meta device, the same on every rank; taken apart, and of no use afterwards.
        optimizer: makes an optimizer of this rank's parameters.
        group: in the order of the parts; the default group where not given. Its timeout bounds every wait.
        micro_batches: M, a divisor of ``batch_size``; 1 is naive model parallelism.
        image_shape: (3, H, W).
        batch_size: of every step.
        seed: of the initial weights, as :func:`tlgc_mp.nn.init_parameters` takes it.
        device: of this rank's part.
        update_in_backward: each parameter is stepped, and its gradient let go, as soon as that is there, so that the
            gradients are never held all at once; with one micro-batch only.
        autocast_dtype: what forward passes compute in and activations travel in, as under :class:`torch.autocast`;
            where not given, that of the parameters.

    Attributes:
        stage: this rank's part, its parameters under the names that they have in the whole model.
        optimizers: of this rank's parameters: one, or one each.

    Raises:
        UsageError: an argument that cannot work.
    """

    def __init__(
        self,
        model: WideResNet,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        *,
        group: dist.ProcessGroup | None = None,
        micro_batches: int = 1,
        image_shape: tuple[int, int, int] = (3, 32, 32),
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        autocast_dtype: torch.dtype | None = None,
        update_in_backward: bool = False,
    ) -> None:
        if batch_size < 1:
            raise must_be("batch_size", "1 or more", batch_size)
        if micro_batches < 1 or batch_size % micro_batches:
            raise must_be(
                "micro_batches",
                f"a divisor of batch_size={batch_size}",
                micro_batches,
                f"use {one_of(divisors(batch_size))}",
            )
        if update_in_backward and micro_batches > 1:
            raise must_be(
                "micro_batches", "1 with update_in_backward, as micro-batches share a gradient", micro_batches
            )
        group = group if group is not None else dist.group.WORLD
        assert group is not None, "torch.distributed is not initialized"
        ranks = dist.get_process_group_ranks(group)
        rank = dist.get_rank(group)
        parts = split_by_work(model, len(ranks), image_shape)

        self._image_shape, self._batch_size, self._micro_batches = image_shape, batch_size, micro_batches
        self._device, self._autocast_dtype = torch.device(device), autocast_dtype
        self._ahead = len(ranks) - 1 - rank
        self.stage = _take_part(model, parts[rank])
        # Filters that are not channels_last, as the activations are, would be reordered in every pass, and so would
        # their gradients: a seventh of the time of a wide convolution on a CPU.
        self.stage.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        materialize(self.stage, self._device, seed)
        if update_in_backward:
            self.optimizers = [_step_on_arrival(param, optimizer([param])) for param in self.stage.parameters()]
        else:
            self.optimizers = [optimizer(self.stage.parameters())]
        self._update_in_backward = update_in_backward

        dtype = autocast_dtype or next(self.stage.parameters()).dtype
        timeout = group._get_backend(self._device).options._timeout
        gradient_group = dist.new_group(ranks, timeout=timeout, use_local_synchronization=True)
        assert isinstance(gradient_group, dist.ProcessGroup)

        def buffers(shape: tuple[int, int, int], count: int) -> list[Tensor]:
            size = (batch_size // micro_batches, *shape)
            return [
                torch.empty(size, dtype=dtype, device=self._device, memory_format=torch.channels_last)
                for _ in range(min(count, micro_batches))
            ]

        # NCCL connects two ranks at their first message and holds each until the other is there: so they greet here,
        # one pair after the other, and no step waits for it.
        greeting = torch.zeros(1, device=self._device)
        self._before: _Link | None = None
        self._after: _Link | None = None
        if rank > 0:
            # One buffer for each micro-batch between its passes, and one that fills meanwhile.
            activations = buffers(parts[rank].input_shape, self._ahead + 2)
            self._before = _Link(ranks[rank - 1], group, gradient_group, micro_batches, activations)
            dist.recv(greeting, ranks[rank - 1], group)
            dist.send(greeting, ranks[rank - 1], gradient_group)
        if rank < len(ranks) - 1:
            gradients = buffers(parts[rank + 1].input_shape, 2)
            self._after = _Link(ranks[rank + 1], gradient_group, group, micro_batches, gradients)
            dist.send(greeting, ranks[rank + 1], group)
            dist.recv(greeting, ranks[rank + 1], gradient_group)

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's parameters."""
        return self.stage.parameters()

    def train_step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One step of the optimizer on one batch. Collective.

        Args:
            images: (B, 3, H, W); only the first rank looks at them.
            labels: (B,); only the last rank looks at them.

        Returns:
            The loss, averaged over the batch, on the last rank; zero on the others.

        Raises:
            UsageError: a batch of another size than that of the pipeline.
        """
        before, after = self._before, self._after
        if before is None and images.shape != (self._batch_size, *self._image_shape):
            raise must_be("images", f"of shape {(self._batch_size, *self._image_shape)}", tuple(images.shape))
        if after is None and labels.shape != (self._batch_size,):
            raise must_be("labels", f"of shape {(self._batch_size,)}", tuple(labels.shape))
        links = [link for link in (before, after) if link is not None]
        inputs: tuple[Tensor, ...] = ()
        targets: tuple[Tensor, ...] = ()
        if before is None:
            inputs = images.contiguous(memory_format=torch.channels_last).chunk(self._micro_batches)
        if after is None:
            targets = labels.chunk(self._micro_batches)
        total = torch.zeros((), device=self._device)
        in_flight: deque[tuple[Tensor, Tensor]] = deque()

        def forward(index: int) -> None:
            nonlocal total
            x = inputs[index] if before is None else before.receive().detach().requires_grad_()
            y = self.stage(x)
            if after is None:
                y = F.cross_entropy(y, targets[index]) / self._micro_batches
                total = total + y.detach()
            else:
                after.send(y)
            in_flight.append((x, y))

        def backward() -> None:
            x, y = in_flight.popleft()
            if after is None:
                y.backward()
            else:
                gradient = after.receive()
                y.backward(gradient)
                after.reuse(gradient)
            if before is not None:
                assert x.grad is not None
                before.send(x.grad)
                before.reuse(x.detach())

        if not self._update_in_backward:
            self.optimizers[0].zero_grad()
        for link in links:
            link.open()
        # One context a step, so that the micro-batches share the weights that it casts.
        with torch.autocast(self._device.type, dtype=self._autocast_dtype, enabled=self._autocast_dtype is not None):
            for index in range(self._micro_batches + self._ahead):
                if index < self._micro_batches:
                    forward(index)
                if index >= self._ahead:
                    with torch.autocast(self._device.type, enabled=False):
                        backward()
        if not self._update_in_backward:
            self.optimizers[0].step()
        for link in links:
            link.close()
        return total
