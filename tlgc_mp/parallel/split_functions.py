"""Functions of torch that stand above its operators and have to know that a tensor is split.

Started from split tensors, a backward pass would run with the functions of this subclass switched off, and so would
what is recomputed in it, and hooks. It is started from the edges of the graph instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves

from tlgc_mp.errors import UsageError
from tlgc_mp.parallel.layout import Layout, Ranks
from tlgc_mp.parallel.signatures import Args, Function, Kwargs
from tlgc_mp.parallel.split_tensor import (
    FUNCTIONS,
    SplitTensor,
    enter_leaves,
    enter_ranks,
    from_share,
    plain_gradient,
    share_in,
    through_torch,
    whole,
)


def entered(func: Function, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """The arguments, each plain tensor that needs a gradient as a SplitTensor that is whole on every rank.

    Its gradient then comes back plain and whole.
    """
    ranks = next(t.ranks for t in tree_leaves((args, kwargs)) if type(t) is SplitTensor)
    if in_place(func) and args:
        if isinstance(args[0], Tensor) and type(args[0]) is not SplitTensor and args[0].requires_grad:
            args[0].register_hook(plain_gradient)  # of its value before it changes, which may get a split gradient
        rest, named = enter_leaves((args[1:], kwargs), ranks)
        return (args[0], *rest), named
    return enter_leaves((args, kwargs), ranks)  # type: ignore[no-any-return]


def _tuple(value: object) -> Args:
    return tuple(value) if isinstance(value, Sequence) and not hasattr(value, "node") else (value,)


def _edges(tensors: Args) -> list[Any]:
    """Where the graph holds them; a parameter's share is where it begins."""
    return [
        tensor if type(tensor) is not SplitTensor else get_gradient_edge(tensor if tensor.held is None else tensor.held)
        for tensor in tensors
    ]


def _seeds(outputs: Args, gradients: object) -> list[Any] | None:
    """The gradient to start from for each output; ``None`` where torch has something to complain about."""
    given = [None] * len(outputs) if gradients is None else list(_tuple(gradients))
    if len(given) != len(outputs):
        return None
    for index, (output, gradient) in enumerate(zip(outputs, given, strict=True)):
        if type(output) is not SplitTensor:
            continue
        if not output.requires_grad or (gradient is None and output.numel() != 1):
            return None
        if gradient is None:
            given[index] = torch.ones_like(output.detach())
        elif gradient.shape != output.shape:
            return None
        elif type(gradient) is not SplitTensor:
            given[index] = enter_ranks(gradient, output.ranks)
    return given


def _grad(
    outputs: object,
    inputs: object,
    grad_outputs: object = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    only_inputs: bool = True,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> object:
    outputs, inputs = _tuple(outputs), _tuple(inputs)
    seeds = _seeds(outputs, grad_outputs)
    if is_grads_batched:
        raise UsageError(
            "is_grads_batched must be False of a split tensor, got True; take one gradient after the other"
        )
    if seeds is None or any(isinstance(t, Tensor) and not t.requires_grad for t in inputs):
        return NotImplemented
    found = torch.autograd.grad(
        _edges(outputs),
        _edges(inputs),
        seeds,
        retain_graph=retain_graph,
        create_graph=create_graph,
        allow_unused=materialize_grads if allow_unused is None else allow_unused,
    )
    found = tuple(
        gradient
        if gradient is None or type(tensor) is not SplitTensor or tensor.held is None
        else _shown(gradient, tensor)
        for gradient, tensor in zip(found, inputs, strict=True)
    )
    if not materialize_grads:
        return found
    return tuple(
        torch.zeros_like(tensor, requires_grad=create_graph) if gradient is None else gradient
        for gradient, tensor in zip(found, inputs, strict=True)
    )


def _backward(
    tensors: object,
    grad_tensors: object = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: object = None,
) -> object:
    tensors = _tuple(tensors)
    seeds = _seeds(tensors, grad_tensors)
    if seeds is None:
        return NotImplemented
    torch.autograd.backward(
        _edges(tensors),
        seeds,
        retain_graph=retain_graph,
        create_graph=create_graph,
        inputs=None if inputs is None else _edges(_tuple(inputs)),
    )
    return None


def _tensor_backward(tensor: Tensor, gradient: object = None, **options: Any) -> object:
    return _backward(tensor, gradient, **options)


def set_data(tensor: Tensor, value: Tensor) -> None:
    """``tensor.data = value``."""
    if type(tensor) is not SplitTensor:
        tensor.data = whole(value.detach())  # type: ignore[attr-defined]
        return None
    value = value.detach()
    source = value if type(value) is SplitTensor else enter_ranks(value, tensor.ranks)
    if tensor.held is not None:
        source = _shown(share_in(source, tensor.cut, tensor.ranks).clone(), tensor)
        tensor.held.data = source.share
    with torch._C.DisableTorchFunctionSubclass():
        Tensor.data.__set__(tensor, source)  # type: ignore[attr-defined]
    tensor.share, tensor.cut, tensor.family = source.share, source.cut, source.family
    return None


# What is asked of a parameter that code has read from a layer.


def hook_of_whole(hook: Callable[[Tensor], Tensor | None], layout: Layout, ranks: Ranks, grad: Tensor) -> Tensor | None:
    """Calls ``hook`` with the whole of a share's gradient; the share of what it makes of it."""
    changed = hook(SplitTensor(grad, layout, ranks))
    return None if changed is None else share_in(changed, layout, ranks)


def _shown(share: Tensor, tensor: SplitTensor) -> SplitTensor:
    """``share``, which is cut as ``tensor`` is, as a split tensor."""
    return from_share(share, tensor.cut, tensor.ranks)


def _of_held(function: Callable[..., object]) -> Callable[..., object]:
    """``function(tensor, held, ...)`` where the tensor shows a parameter; as torch does otherwise."""

    def replace(tensor: Tensor, *args: object, **kwargs: object) -> object:
        if type(tensor) is not SplitTensor or tensor.held is None:
            return NotImplemented
        return function(tensor, tensor.held, *args, **kwargs)

    return replace


def _get_grad(tensor: SplitTensor, held: Tensor) -> Tensor | None:
    return None if held.grad is None else _shown(held.grad.as_subclass(Tensor), tensor)


def _set_grad(tensor: Tensor, value: Tensor | None) -> object:
    if type(tensor) is not SplitTensor:
        tensor.grad = whole(value)
    elif tensor.held is not None:
        held = tensor.held
        share = None if value is None else share_in(value, tensor.cut, tensor.ranks).clone().view(held.shape)
        mark = getattr(held.grad, "mark", None)  # of one that knows that it is a share
        held.grad = share if mark is None or share is None else mark(share)
    elif value is None or type(value) is SplitTensor:
        return NotImplemented
    else:
        tensor.grad = enter_ranks(value, tensor.ranks)
    return None


def _delete_grad(tensor: SplitTensor, held: Tensor) -> None:
    del held.grad


def _require_grad(tensor: SplitTensor, held: Tensor, requires_grad: bool = True) -> SplitTensor:
    held.requires_grad_(requires_grad)
    return tensor


def _set_requires_grad(tensor: SplitTensor, held: Tensor, requires_grad: bool) -> None:
    held.requires_grad = requires_grad


def _register_hook(tensor: SplitTensor, held: Tensor, hook: Callable[[Tensor], Tensor | None]) -> object:
    return held.register_hook(functools.partial(hook_of_whole, hook, tensor.cut, tensor.ranks))


def _register_post_hook(tensor: SplitTensor, held: Tensor, hook: Callable[[Tensor], Tensor | None]) -> object:
    def call(param: Tensor) -> None:
        shown = _shown(param, tensor)
        shown.held = param
        hook(shown)

    return held.register_post_accumulate_grad_hook(call)


def _tensor_split(function: Function) -> Callable[..., object]:
    """Indices in a tensor are read from its memory."""

    def replace(tensor: Tensor, indices: object, *args: object, **kwargs: object) -> object:
        if type(indices) is not SplitTensor:
            return NotImplemented
        return function(tensor, whole(indices), *args, **kwargs)

    return replace


def _element_by_element(function: Function) -> Callable[..., Tensor]:
    """A function in place that calls one of Python's for each element, which it finds in memory."""

    def replace(tensor: Tensor, *args: object) -> Tensor:
        changed = whole(tensor.detach()).clone().requires_grad_(tensor.requires_grad)  # which torch then refuses
        return tensor.copy_(function(changed, *whole(args)))

    return replace


def _matrix_rank(*args: Any, out: Tensor | None = None, **kwargs: Any) -> object:
    """torch writes ``out`` here without an operator that could be seen."""
    if out is None:
        return NotImplemented
    rank = torch.linalg.matrix_rank(*args, **kwargs)
    if out.shape == rank.shape:
        out.copy_(whole(rank))
    elif type(out) is SplitTensor:
        set_data(out, rank)
    else:
        out.resize_(rank.shape).copy_(whole(rank))
    return out


# Row-parallel linear layers. Autograd asks for the gradients of the input and of the weight in two products, and each
# would gather the gradient of the output.


def _gathered(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """``grads``, each as a split tensor that is whole on every rank. Differentiable."""
    return tuple(
        enter_ranks(whole(grad), grad.ranks) if type(grad) is SplitTensor and grad.cut.dim is not None else grad
        for grad in grads
    )


def _linear(*args: Any, **kwargs: Any) -> object:
    y = through_torch(F.linear, args, kwargs)
    x = args[0] if args else kwargs["input"]
    weight = args[1] if len(args) > 1 else kwargs["weight"]
    is_row = type(y) is SplitTensor and type(weight) is SplitTensor and weight.cut.dim == 1
    if is_row and y.cut.dim == y.dim() - 1 and x.requires_grad and weight.requires_grad and y.grad_fn:
        y.grad_fn.register_prehook(_gathered)
    return y


def _attention(*args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]:
    """Its last product is that of a row-parallel layer."""
    y, weights = through_torch(F.multi_head_attention_forward, args, kwargs)
    if type(y) is SplitTensor and y.cut.dim == y.dim() - 1 and y.requires_grad:
        y.grad_fn.register_prehook(_gathered)  # type: ignore[union-attr]
    return y, weights


def _one_hot(tensor: Tensor, num_classes: int = -1) -> object:
    """Contiguous, and of classes that are there: torch looks neither to the one nor to the other of a subclass."""
    if tensor.dtype is torch.int64 and tensor.numel() and not tensor.is_meta:
        low, high = tensor.amin().item(), tensor.amax().item()
        if low < 0 or (num_classes != -1 and num_classes <= high):
            return F.one_hot(whole(tensor), num_classes)  # which raises
    return through_torch(F.one_hot, (tensor, num_classes), None).contiguous()


_TENSOR: Any = Tensor
"""Of which an attribute is a descriptor."""

FUNCTIONS.update(
    {
        Tensor.apply_: _element_by_element(Tensor.apply_),
        Tensor.map_: _element_by_element(Tensor.map_),
        torch.autograd.grad: _grad,
        torch.autograd.backward: _backward,
        Tensor.backward: _tensor_backward,
        F.linear: _linear,
        F.one_hot: _one_hot,
        F.multi_head_attention_forward: _attention,
        torch.linalg.matrix_rank: _matrix_rank,
        torch.tensor_split: _tensor_split(torch.tensor_split),
        Tensor.tensor_split: _tensor_split(Tensor.tensor_split),
        _TENSOR.data.__set__: set_data,
        _TENSOR.grad.__get__: _of_held(_get_grad),
        _TENSOR.grad.__set__: _set_grad,
        _TENSOR.grad.__delete__: _of_held(_delete_grad),
        _TENSOR.grad_fn.__get__: _of_held(lambda tensor, held: None),
        _TENSOR.is_leaf.__get__: _of_held(lambda tensor, held: True),
        _TENSOR.requires_grad.__get__: _of_held(lambda tensor, held: held.requires_grad),
        _TENSOR.requires_grad.__set__: _of_held(_set_requires_grad),
        Tensor.requires_grad_: _of_held(_require_grad),
        Tensor.register_hook: _of_held(_register_hook),
        Tensor.register_post_accumulate_grad_hook: _of_held(_register_post_hook),
        Tensor.retain_grad: _of_held(lambda tensor, held: None),
    }
)


def in_place(func: Function) -> bool:
    """Whether ``func`` changes its first argument, which must then stay the tensor that it is."""
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__invert__", "__index__", "__int__"))
    return name.endswith("_")
