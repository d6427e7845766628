"""One training pass of a rank, run on the meta device: what it computes, keeps and sends, in the order it does.

The model is split as one of P ranks holds it and runs forward and backward with torch's own operators, each of which is
written down. Nothing is allocated, computed or sent, so a rank of any network takes seconds. Every size grows with the
batch along a line: two passes tell those of any batch.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tlgc_mp.errors import UsageError
from tlgc_mp.nn.coarse_level import meta_stands_for
from tlgc_mp.parallel import collectives
from tlgc_mp.parallel.meta_pass import copy_on_meta, run_on_meta, without_values
from tlgc_mp.parallel.plan import Placement, is_recomputed
from tlgc_mp.parallel.signatures import Args
from tlgc_mp.parallel.split_tensor import SplitTensor

Loss = Callable[..., Tensor]

CONVOLUTION, PRODUCT, OTHER = 0, 1, 2
"""Kinds of operators, by what bounds their time: arithmetic of convolutions, of matrix products, or memory."""

BASES = (8, 16)
"""Samples of the two traces that tell all others."""

_CONVOLUTIONS = ("aten::convolution", "aten::_convolution", "aten::convolution_backward")
_MOVE_NOTHING = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty_strided")


@dataclass(frozen=True)
class Trace:
    """A forward and a backward pass of one rank over one micro-batch.

    Attributes:
        kinds, flops, moved: of each operator: its kind, its arithmetic, and the bytes that it reads and writes.
        live: bytes of activations and temporary tensors as each operator has just ended, inputs included.
        arrived: elements of the parameters whose gradients have arrived by then.
        sent: of each tensor-parallel collective, the bytes that this rank gives; ``names`` says which it is.
        sizes: elements of each parameter that this rank trains; they belong to ``layers`` modules.
        again: elements of each parameter of a block that is computed once more in backward; they belong to
            ``layers_again`` modules.
        convolutions: operators of different shapes among those that compute convolutions.
        frozen: bytes of parameters that it does not.
        buffers: bytes.
        item: bytes of an element of a parameter.
    """

    kinds: np.ndarray
    flops: np.ndarray
    moved: np.ndarray
    live: np.ndarray
    arrived: np.ndarray
    names: tuple[str, ...]
    sent: np.ndarray
    sizes: tuple[int, ...]
    layers: int
    again: tuple[int, ...]
    layers_again: int
    convolutions: int
    frozen: int
    buffers: int
    item: int

    @property
    def parameters(self) -> int:
        """Elements that this rank trains."""
        return sum(self.sizes)

    def collectives(self) -> dict[str, tuple[int, int]]:
        """Name of a tensor-parallel collective -> (how often it is called, bytes that this rank gives in all)."""
        calls, given = Counter(self.names), Counter[str]()
        for name, size in zip(self.names, self.sent, strict=True):
            given[name] += int(size)
        return {name: (calls[name], given[name]) for name in calls}


_GROWS = ("flops", "moved", "live", "arrived", "sent")
_FIXED = ("kinds", "names", "sizes", "layers", "again", "layers_again", "convolutions", "frozen", "buffers", "item")


class Traces:
    """Traces of one model over any micro-batch, from as few passes as tell them.

    Args:
        make: from a number of samples to the trace over so many.
    """

    def __init__(self, make: Callable[[int], Trace]) -> None:
        self._make = make
        self._made: dict[int, Trace] = {}

    def at(self, samples: int) -> Trace:
        """The trace over a micro-batch of ``samples``."""
        if samples in self._made:
            return self._made[samples]
        low, high = (self._at_exactly(base) for base in BASES)
        same = low.names == high.names and np.array_equal(low.kinds, high.kinds) and len(low.live) == len(high.live)
        if not same:  # the model's code goes another way for another batch
            return self._at_exactly(samples)
        scale = (samples - BASES[0]) / (BASES[1] - BASES[0])
        lines = {name: getattr(low, name) + scale * (getattr(high, name) - getattr(low, name)) for name in _GROWS}
        fixed = {name: getattr(low, name) for name in _FIXED}
        self._made[samples] = Trace(**fixed, **lines)
        return self._made[samples]

    def _at_exactly(self, samples: int) -> Trace:
        if samples not in self._made:
            self._made[samples] = self._make(samples)
        return self._made[samples]


def trace(
    model: nn.Module,
    inputs: tuple[object, ...],
    loss: Loss,
    *,
    tensor_parallel: int,
    placements: dict[str, Placement],
    on_accelerator: bool = False,
    prepare: Callable[[nn.Module], object] = lambda twin: None,
) -> Trace:
    """A pass of ``model`` as one of P ranks holds it; it is left as it is.

    Args:
        model: a one-device model, on any device.
        inputs: of one micro-batch; only shapes and types are looked at.
        loss: from the model's output to a scalar, on the meta device.
        placements: how the layers are split.
        on_accelerator: whether it is to tell of one, where some layers compute in another way than on a CPU.
        prepare: what is to be done with the split model before it runs.

    Raises:
        UsageError: the model's code reads values of tensors.
    """
    twin = copy_on_meta(model, tensor_parallel, placements if tensor_parallel > 1 else None).train()
    prepare(twin)
    trained = [param for param in twin.parameters() if param.requires_grad]
    if not trained:
        raise UsageError("model must have parameters to train, got none; leave some with requires_grad")
    recorder = _Recorder()
    for tensor in (*twin.parameters(), *twin.buffers()):
        recorder.know(tensor)
    with _no_garbage_collection(), meta_stands_for("cuda" if on_accelerator else "cpu"), recorder.recording(trained):
        out = run_on_meta(twin, inputs)  # which makes the batch, too
        try:
            total = loss(out)
            del out
            total.backward()
        except (NotImplementedError, RuntimeError) as error:
            raise without_values(error) from error
    blocks = [module for module in twin.modules() if is_recomputed(module)]
    frozen = sum(param.nbytes for param in twin.parameters() if not param.requires_grad)
    rows = np.array(recorder.rows, dtype=float).reshape(-1, 5)
    return Trace(
        kinds=rows[:, 0].astype(int),
        flops=rows[:, 1],
        moved=rows[:, 2],
        live=rows[:, 3],
        arrived=rows[:, 4],
        names=tuple(name for name, _ in recorder.sent),
        sent=np.array([size for _, size in recorder.sent], dtype=float),
        sizes=tuple(param.numel() for param in trained),
        layers=_layers(twin.modules()),
        again=tuple(param.numel() for block in blocks for param in block.parameters() if param.requires_grad),
        layers_again=sum(_layers(block.modules()) for block in blocks),
        convolutions=len(recorder.convolutions),
        frozen=frozen,
        buffers=sum(buffer.nbytes for buffer in twin.buffers()),
        item=trained[0].element_size(),
    )


def _layers(modules: Iterable[nn.Module]) -> int:
    """How many of them have parameters of their own to train."""
    return sum(any(param.requires_grad for param in module.parameters(recurse=False)) for module in modules)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Tensors die as their last reference goes, and not when Python next looks for cycles, which would be at random."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Recorder(TorchDispatchMode):
    """Writes down every operator that runs, and what is alive after it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows: list[tuple[float, ...]] = []
        self.sent: list[tuple[str, int]] = []
        self.live = 0
        self.arrived = 0
        self.convolutions: set[str] = set()
        self._known: dict[int, object] = {}  # by the id of a storage: a reference, which keeps the id from being reused
        self._held: dict[int, int] = {}

    def know(self, tensor: Tensor) -> None:
        """Leaves the storage of ``tensor`` out of what is alive."""
        storage = tensor.untyped_storage()
        self._known[storage._cdata] = storage

    def hold(self, tensor: Tensor) -> None:
        """Counts the storage of ``tensor`` for as long as it lives."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._held:
            return
        self._held[key] = storage.nbytes()
        self.live += storage.nbytes()
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.live -= self._held.pop(key, 0)

    @contextlib.contextmanager
    def recording(self, trained: Iterable[nn.Parameter]) -> Iterator[None]:
        handles = [param.register_post_accumulate_grad_hook(self._take_gradient) for param in trained]
        collectives.recorders.append(self._note)
        try:
            with self:
                yield
        finally:
            collectives.recorders.remove(self._note)
            for handle in handles:
                handle.remove()

    def _note(self, name: str, size: int) -> None:
        self.sent.append((name, size))

    def _take_gradient(self, param: Tensor) -> None:
        """A gradient is there: it counts as one from now on, not as a temporary tensor."""
        assert param.grad is not None
        self.live -= self._held.pop(param.grad.untyped_storage()._cdata, 0)
        self.arrived += param.numel()
        param.grad = None
        self.rows.append((OTHER, 0, 0, self.live, self.arrived))

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Args = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if any(issubclass(kind, SplitTensor) for kind in types):
            return NotImplemented  # it computes on shares with operators that come here one by one
        out = func(*args, **(kwargs or {}))
        if func._schema.name == "aten::convolution" and any(_is_channels_last(each) for each in args[:2]):
            out = out.contiguous(memory_format=torch.channels_last)  # as every device but the meta device gives it
        if func._schema.name in _CONVOLUTIONS:
            shapes = [(each.shape, each.stride()) if isinstance(each, Tensor) else each for each in args]
            self.convolutions.add(f"{func._schema.name} {shapes}")
        results = [tensor for tensor in tree_leaves(out) if isinstance(tensor, Tensor)]
        for tensor in results:
            self.hold(tensor)
        if not getattr(func, "is_view", False):
            self.rows.append((*_cost(func, args, kwargs or {}, out, results), self.live, self.arrived))
        return out


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def _cost(
    func: OpOverload, args: tuple[object, ...], kwargs: dict[str, object], out: object, results: Sequence[Tensor]
) -> tuple[int, float, float]:
    """(kind, arithmetic, bytes read and written) of an operator."""
    name = func._schema.name
    if name in _MOVE_NOTHING:
        return OTHER, 0, 0
    tensors = {id(t): t for t in (*tree_leaves((args, kwargs)), *results) if isinstance(t, Tensor)}
    moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    count = flop_registry.get(func._overloadpacket)
    if count is None:
        return OTHER, 0, moved
    kind = CONVOLUTION if name in _CONVOLUTIONS else PRODUCT
    return kind, float(count(*args, **kwargs, out_val=out)), moved


def recorded_step(step: Callable[[], object], known: Iterable[Tensor]) -> tuple[float, float]:
    """(most bytes of new tensors that lived at once, bytes read and written) of what ``step`` does on the meta device.

    Args:
        known: tensors that are there before, and their gradients.
    """
    recorder = _Recorder()
    for tensor in known:
        recorder.know(tensor)
        if tensor.grad is not None:
            recorder.know(tensor.grad)
    with torch.no_grad(), recorder:
        step()
    return max((row[3] for row in recorder.rows), default=0.0), sum(row[2] for row in recorder.rows)
