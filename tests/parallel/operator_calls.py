"""Calls of torch's operators on samples of its own database, each judged: split tensors against plain ones."""

from __future__ import annotations

import contextlib
import itertools
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from tlgc_mp.parallel.split_tensor import Ranks, SplitTensor, enter_ranks, split, whole

SEED = 31
SAMPLES = {torch.float64: 24, torch.complex128: 6, torch.int64: 6}
"""How many samples of each type an operator is tried on, in the sizes of the database and in :data:`DIVISIBLE` ones."""
QUICK_SAMPLES = 6
DIVISIBLE = {"XS": 6, "S": 6, "M": 12, "L": 24}
"""Sizes that two and three ranks divide, for the names that the database has for the sizes of its samples."""
OK, WRONG, RAISES, NONE = "ok", "WRONG", "raises", "none"
UNINITIALIZED = ("empty", "resize")
"""Operators with these in their names return memory of any content."""


LAST_DIMENSION_DENSE = ("torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",)
"""Operators that read memory that is not theirs where the last dimension is not dense."""


class Placement(NamedTuple):
    """How a tensor argument is given: split along ``dim``, or joined there from two split tensors where ``joint``, the
    size of the first, is positive; where ``dim`` is ``None`` plain, or as a split tensor that is ``entered`` whole."""

    dim: int | None
    joint: int = 0
    entered: bool = False


class Differs(Exception):
    """A split tensor gave something else than a plain one."""


def database() -> dict[str, Any]:
    """Name -> entry of every operator of the database that runs on the CPU."""
    from torch.testing._internal.common_methods_invocations import op_db

    entries = {}
    for entry in op_db:
        name = f"{entry.name}.{entry.variant_test_name}" if entry.variant_test_name else entry.name
        if entry.dtypes:
            entries[name] = entry
    return entries


@contextlib.contextmanager
def _sizes(sizes: dict[str, int]) -> Iterator[None]:
    """The database draws its samples in these sizes."""
    modules = [m for name, m in list(sys.modules.items()) if name.startswith("torch.testing._internal")]
    before = [(m, key, vars(m)[key]) for m in modules for key in sizes if isinstance(vars(m).get(key), int)]
    try:
        for module, key, _ in before:
            setattr(module, key, sizes[key])
        yield
    finally:
        for module, key, value in before:
            setattr(module, key, value)


def samples(entry: Any, quick: bool = False) -> Iterator[Any]:
    """Samples of an operator, by type and size, bounded; the same on every rank. A few of one type where ``quick``."""
    dtypes = [dtype for dtype in SAMPLES if dtype in entry.dtypes] or sorted(entry.dtypes, key=str)[:1]
    for dtype in dtypes[:1] if quick else dtypes:
        differentiable = entry.supports_autograd and (dtype.is_floating_point or dtype.is_complex)
        for sizes in ({}, DIVISIBLE) if not quick else (DIVISIBLE,):
            seed(SEED)
            # Some of the database's samples are only made for its own sizes.
            with _sizes(sizes), contextlib.suppress(RuntimeError, ValueError, IndexError, TypeError, AssertionError):
                drawn = entry.sample_inputs("cpu", dtype, requires_grad=differentiable)
                yield from itertools.islice(filter(_has_any, drawn), QUICK_SAMPLES if quick else SAMPLES.get(dtype, 6))


def seed(value: int) -> None:
    torch.manual_seed(value)
    random.seed(value)
    numpy.random.seed(value)


def _has_any(sample: Any) -> bool:
    """Whether a sample has a tensor that can be split."""
    leaves = tree_leaves((sample.input, sample.args, sample.kwargs))
    return any(isinstance(leaf, Tensor) and _may_split(leaf) for leaf in leaves)


def _may_split(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.dim() > 0 and tensor.numel() > 0 and not tensor.is_nested


def place(tensor: Tensor, first: bool, turn: int, size: int, rng: random.Random) -> Placement:
    """How to give ``tensor`` over ``size`` ranks: along dimension 1, 0 or the last in turn, where the ranks divide it;
    arguments after the first also plain, or along another dimension, and at times the first is the plain one."""
    if not _may_split(tensor) or (turn % 8 == 7 if first else rng.random() < 0.3):
        return Placement(None)
    count = tensor.dim()
    wanted = [1 % count, 0, count - 1][turn % 3]
    divisible = [dim for dim in range(count) if tensor.shape[dim] % size == 0]
    if wanted not in divisible or (not first and rng.random() < 0.3):
        wanted = rng.choice(divisible or [wanted])
    length = tensor.shape[wanted]
    if length % size == 0 and length // size > 1 and rng.random() < 0.25:
        return Placement(wanted, size * rng.randrange(1, length // size))
    return Placement(wanted)


class Arguments:
    """The arguments of one call: leaves of autograd, and what is made of them, plain or split.

    Args:
        tree: input, positional and keyword arguments of a sample.
        placements: of its tensors, in the order of ``tree_leaves``.
        ranks: ``None`` for plain tensors only.
        form: how they lie in memory: as they come, ``"channels_last"``, or ``"permuted"``, in reverse order. With
            ``"crossed"`` gradients come in another layout than outputs have.
    """

    def __init__(self, tree: Any, placements: list[Placement], ranks: Ranks | None, form: str) -> None:
        self.leaves: list[Tensor] = []
        self.given: list[Tensor] = []
        made: dict[int, Tensor] = {}
        order = iter(placements)

        def enter(tensor: Tensor) -> Tensor:
            placement = next(order)
            if id(tensor) in made:
                return made[id(tensor)]
            leaf = tensor.detach().clone()
            if form == "permuted" and leaf.dim() > 1 and leaf.layout == torch.strided:
                leaf = leaf.permute(*reversed(range(leaf.dim()))).contiguous().permute(*reversed(range(leaf.dim())))
            elif form == "channels_last" and leaf.dim() in (4, 5) and leaf.layout == torch.strided:
                last = torch.channels_last if leaf.dim() == 4 else torch.channels_last_3d
                leaf = leaf.contiguous(memory_format=last)
            leaf.requires_grad_(tensor.requires_grad)
            self.leaves.append(leaf)
            made[id(tensor)] = arrange(leaf, placement, ranks)
            self.given.append(made[id(tensor)])
            return made[id(tensor)]

        self.input, self.args, self.kwargs = tree_map_only(Tensor, enter, tree)

    def call(self, function: Callable[..., Any], **more: Any) -> Any:
        seed(SEED)
        return function(self.input, *self.args, **self.kwargs, **more)


def arrange(leaf: Tensor, placement: Placement, ranks: Ranks | None) -> Tensor:
    dim, joint, entered = placement
    if dim is None:
        return leaf.clone() if ranks is None or not entered else enter_ranks(leaf.clone(), ranks)
    parts = [leaf] if not joint else [leaf.narrow(dim, 0, joint), leaf.narrow(dim, joint, leaf.shape[dim] - joint)]
    given = [part.clone() if ranks is None else split(part, dim, ranks) for part in parts]
    return given[0] if not joint else torch.cat(given, dim)


def significant_strides(tensor: Tensor) -> list[int] | None:
    """Strides of the dimensions in which there is a step to make; ``None`` where there are gaps in memory."""
    pairs = [(stride, length) for stride, length in zip(tensor.stride(), tensor.shape, strict=True) if length > 1]
    step = 1
    for stride, length in sorted(pairs):
        if stride != step:
            return None
        step *= length
    return [stride for stride, _ in pairs]


def compare(name: str, actual: Any, expected: Any, strides: bool = True, values: bool = True) -> None:
    """Raises :class:`Differs` unless ``actual``, split or plain, is ``expected``."""
    if not isinstance(expected, Tensor):
        same = actual is expected or actual == expected or (actual != actual and expected != expected)
        if isinstance(expected, float) and not same:
            same = abs(actual - expected) <= 1e-10 * max(1.0, abs(expected))
        if not same:
            raise Differs(f"{name} is {actual!r}, not {expected!r}")
        return
    if not isinstance(actual, Tensor):
        raise Differs(f"{name} is a {type(actual).__name__}, not a tensor")
    plain = whole(actual.detach())
    for what in ("shape", "dtype", "layout"):
        for tensor in (actual, plain):
            if getattr(tensor, what) != getattr(expected, what):
                raise Differs(f"{name} has {what} {getattr(tensor, what)}, not {getattr(expected, what)}")
    if expected.layout != torch.strided or expected.is_nested or expected.is_quantized:
        return
    significant = significant_strides(expected)
    if strides and significant is not None and expected.numel():
        for tensor in (actual, plain):
            if significant_strides(tensor) != significant:
                raise Differs(f"{name} of {tuple(expected.shape)}: strides {tensor.stride()}, not {expected.stride()}")
    if values and not close(plain, expected.detach()):
        raise Differs(f"{name} of {tuple(expected.shape)} has other values")


def close(actual: Tensor, expected: Tensor) -> bool:
    if not (expected.is_floating_point() or expected.is_complex()) or expected.numel() == 0:
        return torch.equal(actual, expected)
    if expected.dtype.itemsize == 1:
        actual, expected = actual.float(), expected.float()
    tolerance = max(1e-10, 100 * torch.finfo(expected.dtype).eps)
    finite = expected.abs()[expected.isfinite()]
    scale = max(1.0, finite.max().item()) if finite.numel() else 1.0
    return torch.allclose(actual, expected, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def compare_trees(name: str, actual: Any, expected: Any, values: bool = True) -> None:
    left, right = tree_leaves(actual), tree_leaves(expected)
    if len(left) != len(right):
        raise Differs(f"{name} has {len(left)} parts, not {len(right)}")
    for a, b in zip(left, right, strict=True):
        compare(name, a, b, values=values)


@dataclass(frozen=True)
class Call:
    """One way to call one sample of an operator over ``size`` ranks: ``mode`` is ``"function"``, ``"in place"`` or
    ``"out="``."""

    size: int
    entry: Any
    tree: Any
    placements: list[Placement]
    mode: str
    form: str

    def verdict(self, ranks: Ranks) -> tuple[str, str]:
        """``OK``, ``WRONG``, ``RAISES``, or ``NONE`` where plain tensors raise or nothing is split; and why."""
        plain = Arguments(self.tree, self.placements, None, self.form)
        try:
            expected, outputs = self._result(plain, None)
        except Exception:
            return NONE, ""
        state = torch.get_rng_state()
        given = Arguments(self.tree, self.placements, ranks, self.form)
        if not any(type(tensor) is SplitTensor for tensor in given.given):
            return NONE, ""
        try:
            actual, split_outputs = self._result(given, ranks)
            self._check(plain, given, expected, actual, state)
            compare_trees("out", split_outputs, outputs)
        except Differs as error:
            return WRONG, f"{error} | {self}"
        except Exception as error:
            first = str(error).strip().split("\n")[0][:160]
            return RAISES, f"{type(error).__name__}: {first} | {self}"
        return OK, ""

    def __str__(self) -> str:
        def shown(tensor: Tensor) -> str:
            placement = next(order)
            where = "whole" if placement.entered else placement.dim
            return f"{str(tensor.dtype)[6:]}{list(tensor.shape)}@{where}" + f"+{placement.joint}" * bool(
                placement.joint
            )

        order = iter(self.placements)
        tree = tree_map_only(Tensor, shown, self.tree)
        return f"{self.mode}{self.form and f' {self.form}'} {tree}"[:400]

    def _result(self, given: Arguments, ranks: Ranks | None) -> tuple[Any, Any]:
        """What the call returns, and its ``out=``."""
        if self.mode == "function":
            return given.call(self.entry), None
        if self.mode == "in place":
            return given.call(self.entry.inplace_variant), None
        with torch.no_grad():
            other = Arguments(self.tree, self.placements, None, self.form)  # some operators write theirs
            like = other.call(self.entry)
            rng = random.Random(SEED)

            def blank(tensor: Tensor) -> Tensor:
                leaf = torch.full_like(tensor, 1)
                return arrange(leaf, place(leaf, True, 0, self.size, rng), ranks)

            out = tree_map_only(Tensor, blank, tuple(like) if isinstance(like, tuple) else like)
            return given.call(self.entry, out=out), out

    def _check(self, plain: Arguments, given: Arguments, expected: Any, actual: Any, state: Tensor) -> None:
        values = not any(part in self.entry.name for part in UNINITIALIZED)
        if not torch.equal(torch.get_rng_state(), state):
            raise Differs("the random numbers taken are others")
        compare_trees("output", actual, expected, values)
        if self.mode == "in place" and (expected is plain.input) != (actual is given.input):
            raise Differs("the result is not the tensor that was changed")
        for index, (left, right) in enumerate(zip(given.given, plain.given, strict=True)):
            compare(f"argument {index} afterwards", left, right, values=values)
        if values:
            self._check_gradients(plain, given, expected, actual)
            self._check_memory(plain, given, expected, actual)

    def _check_gradients(self, plain: Arguments, given: Arguments, expected: Any, actual: Any) -> None:
        pairs = [
            (left, right)
            for left, right in zip(tree_leaves(actual), tree_leaves(expected), strict=True)
            if isinstance(right, Tensor)
        ]
        for left, right in pairs:
            if left.requires_grad != right.requires_grad:
                raise Differs(f"output.requires_grad is {left.requires_grad}, not {right.requires_grad}")
        pairs = [pair for pair in pairs if pair[1].requires_grad and pair[1].layout == torch.strided]
        if not pairs:
            return
        generator = torch.Generator().manual_seed(SEED)
        cotangents = [torch.randn(r.shape, generator=generator, dtype=r.dtype) for _, r in pairs]
        try:
            torch.autograd.backward([right for _, right in pairs], cotangents)
        except Exception:  # some operators have gradients of some of their outputs or arguments only
            return
        # The loss is computed with whole tensors or with split ones; few operators take numbers of one or two bytes.
        if self.form == "crossed":
            rng = random.Random(str(self))
            given_to = [left for left, _ in pairs]
            torch.autograd.backward(
                given_to, [self._crossed(c, t, rng) for c, t in zip(cotangents, given_to, strict=True)]
            )
        elif self.form or any(r.dtype.itemsize < 4 or r.dtype == torch.complex32 for _, r in pairs):
            torch.autograd.backward([whole(left) for left, _ in pairs], cotangents)
        else:
            products = [(left * c).sum() for (left, _), c in zip(pairs, [c.conj() for c in cotangents], strict=True)]
            torch.autograd.backward([p.real if p.is_complex() else p for p in products])
        for index, (left, right) in enumerate(zip(given.leaves, plain.leaves, strict=True)):
            if (left.grad is None) != (right.grad is None):
                raise Differs(f"argument {index} has {'no' if left.grad is None else 'a'} gradient")
            if left.grad is not None:
                if type(left.grad) is not Tensor:
                    raise Differs(f"the gradient of argument {index} is a {type(left.grad).__name__}")
                compare(f"gradient of argument {index}", left.grad, right.grad, strides=False)

    def _crossed(self, cotangent: Tensor, output: Tensor, rng: random.Random) -> Tensor:
        """The gradient of ``output`` in a layout of its own."""
        if type(output) is not SplitTensor:
            return cotangent
        dims = [
            d for d in range(output.dim()) if d != output.cut.dim and output.shape[d] % self.size == 0 < output.shape[d]
        ]
        placement = Placement(rng.choice(dims)) if dims else Placement(None, entered=True)
        return arrange(cotangent, placement, output.ranks)

    @torch.no_grad()
    def _check_memory(self, plain: Arguments, given: Arguments, expected: Any, actual: Any) -> None:
        """A write to an argument shows in the outputs that are views of it, and the other way round."""
        if not isinstance(plain.input, Tensor) or plain.input.layout != torch.strided or self.mode != "function":
            return
        place_of = plain.input.untyped_storage().data_ptr()
        for left, right in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
            if not isinstance(right, Tensor) or right.layout != torch.strided or not right.numel():
                continue
            if right.untyped_storage().data_ptr() != place_of:
                continue
            for target, other in ((plain.input, given.input), (right, left)):
                write = Tensor.logical_not_ if target.dtype == torch.bool else Tensor.neg_
                try:
                    write(target)
                except RuntimeError:  # several elements in one place
                    continue
                write(other)
                compare("output after a write", left, right, strides=False)
                compare("input after a write", given.input, plain.input, strides=False)


def calls_of(entry: Any, size: int, quick: bool) -> Iterator[Call]:
    for index, sample in enumerate(samples(entry, quick)):
        rng = random.Random(SEED + index)
        tree = (sample.input, sample.args, sample.kwargs)
        tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
        first = next((i for i, tensor in enumerate(tensors) if _may_split(tensor)), 0)
        placements = [place(tensor, i == first, index, size, rng) for i, tensor in enumerate(tensors)]
        modes = ["function"]
        if entry.inplace_variant is not None and not sample.broadcasts_input:
            modes.append("in place")
        if entry.supports_out and index < 3:
            modes.append("out=")
        forms = [""]
        if entry.name not in LAST_DIMENSION_DENSE:
            if any(tensor.dim() in (4, 5) for tensor in tensors):
                forms.append("channels_last")
            if any(tensor.dim() > 1 for tensor in tensors):
                forms.append("permuted")
        for mode in modes:
            for form in forms:
                yield Call(size, entry, tree, placements, mode, form)
        if entry.supports_autograd:
            yield Call(size, entry, tree, placements, "function", "crossed")
            entered = [
                Placement(None, entered=True)
                if _may_split(tensor) and (i == first or placement.dim is None)
                else placement
                for i, (tensor, placement) in enumerate(zip(tensors, placements, strict=True))
            ]
            yield Call(size, entry, tree, entered, "function", "crossed")
