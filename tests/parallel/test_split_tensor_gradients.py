"""What autograd does with split tensors: gradients of every kind, hooks, functions of one's own, recomputation."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.parallel.common import run_ranks_once
from tests.parallel.properties import Given, properties_of, run_properties
from tlgc_mp.parallel.split_tensor import SplitTensor, whole


def given_leaves_of_both_kinds(given: Given) -> Any:
    x, w, b = given.leaf(3, 12), given.plain(12, 5, grad=True), given(5, dim=0, grad=True)
    return (x @ w).relu() + b, w * given(12, 5, dim=0), [w.sum(0) * given(2, 5)], torch.cat([x.t(), w], 1)


def given_autograd_grad(given: Given) -> Any:
    x, w = given.leaf(3, 12), given.plain(12, 4, grad=True)
    y = F.gelu(x @ w)
    first = torch.autograd.grad(y.sum(), [x, w], retain_graph=True)
    second = torch.autograd.grad(y, [w, x], torch.ones_like(y), retain_graph=True)
    plain = torch.autograd.grad(y, w, given.plain(3, 4), retain_graph=True)
    unused = torch.autograd.grad(y.sum(), [x, given.plain(2, grad=True)], allow_unused=True, materialize_grads=True)
    return first, second, plain, unused, [type(g) is Tensor for g in (first[1], second[0], plain[0])]


def second_derivatives(outputs: Tensor, inputs: list[Tensor], given: Given) -> Any:
    """Gradients of a random combination of the gradients of a random combination of ``outputs``."""
    loss = (outputs * given.plain(*outputs.shape)).sum()
    gradients = torch.autograd.grad(loss, inputs, create_graph=True)
    return gradients, sum((g * given.plain(*g.shape)).sum() for g in gradients)


def given_second_derivatives_of_functions_of_one_tensor(given: Given) -> Any:
    functions = [
        torch.relu,
        torch.tanh,
        F.silu,
        torch.square,
        lambda t: t * t * t,
        lambda t: t.softmax(1),
        lambda t: F.normalize(t, dim=1),
        lambda t: t.square().sum(1).sqrt(),
        lambda t: t[:, 3:8].exp().prod(1),
        lambda t: torch.cat([t, t * t], 1).logsumexp(1),
    ]
    found = []
    for function in functions:
        x = given(2, 12, grad=True)
        found.append(second_derivatives(function(x), [x], given))
    return found


def given_second_derivatives_of_layers(given: Given) -> Any:
    x, w = given(2, 12, 5, 5, grad=True), given(6, 12, 3, 3, dim=0, grad=True)
    grouped, plain = given(12, 4, 3, 3, dim=0, grad=True), given.plain(6, grad=True)
    scale, shift = given(12, dim=0, grad=True), given(12, dim=0, grad=True)
    found = [
        second_derivatives(F.conv2d(x, w, plain), [x, w, plain], given),
        second_derivatives(F.conv2d(x, grouped, groups=3), [x, grouped], given),
        second_derivatives(F.batch_norm(x, None, None, scale, shift, training=True), [x, scale, shift], given),
        second_derivatives(F.group_norm(x, 4, scale, shift), [x, scale, shift], given),
        second_derivatives(F.linear(x.mean((2, 3)), w.flatten(1)[:, :12], plain), [x, w, plain], given),
        second_derivatives(torch.bmm(x.flatten(2), x.flatten(2).mT), [x], given),
        second_derivatives(F.avg_pool2d(x, 2), [x], given),
    ]
    return found


def given_convolutions_of_whole_weights(given: Given) -> Any:
    """As code computes them: every rank has its share of the outputs."""
    x, whole_x = given(2, 12, 5, 5, grad=True), given.cut(given.plain(7, 2, 12, 5, 5, grad=True), 0).sum(0)
    weights = given.plain(24, 12, 3, 3, grad=True), given.plain(12, 12, 3, 3, grad=True)
    grouped, bias = given.plain(12, 2, 3, 3, grad=True), given.plain(24, grad=True)
    found = []
    for inputs in (x, whole_x):
        found += [
            F.conv2d(inputs, weights[0], bias),
            F.conv_transpose2d(inputs, weights[1], stride=2),
            F.conv2d(inputs, grouped, bias[:12], padding=1, groups=6),
        ]
    assert all(isinstance(y, SplitTensor) and y.cut.dim == 1 for y in found) or given.ranks is None
    return found


def given_products(given: Given) -> Any:
    a, b, c = given(2, 12, 6, grad=True), given(2, 6, 12, dim=0, grad=True), given(12, 6, dim=1, grad=True)
    p = given.plain(6, 4, grad=True)
    return (
        torch.bmm(a, b),
        a @ p,
        a @ c.t(),
        c @ b,
        p.t() @ a.mT,
        torch.einsum("bci,bic->bi", a, b),
        torch.einsum("bci,ik->bkc", a, p),
        torch.einsum("bci,bdi,ci->bcd", a, a, c),
        torch.baddbmm(a @ a.mT, a, b),
        torch.addmm(c.new_zeros(12, 4), c, p),
        torch.tensordot(a, b, dims=([1, 2], [2, 1])),
        torch.outer(a[0, 0], c[:, 1]),
        a[0, 0] @ p,
        c.mv(a[1, 5]),
        F.scaled_dot_product_attention(a, c.expand(2, 12, 6), a),
        F.cosine_similarity(a, c[None], dim=1),
        torch.cdist(a, c[None]),
        F.bilinear(a, a, given.plain(3, 6, 6, grad=True)),
    )


def given_losses(given: Given) -> Any:
    x, target = given(4, 12, grad=True), torch.tensor([0, 3, 11, 7])
    return (
        F.cross_entropy(x, target),
        F.cross_entropy(x, given.plain(4, 12).softmax(1), label_smoothing=0.1),
        F.nll_loss(x.log_softmax(1), target, weight=given.plain(12).abs()),
        F.mse_loss(x, given.plain(4, 12)),
        F.l1_loss(x, given(4, 12, dim=0)),
        F.binary_cross_entropy_with_logits(x, given.plain(4, 12).sigmoid()),
        F.kl_div(x.log_softmax(1), given.plain(4, 12).softmax(1), reduction="batchmean"),
        F.smooth_l1_loss(x, given.plain(4, 12)),
        F.hinge_embedding_loss(x, torch.ones(4, 12)),
        F.triplet_margin_loss(x, x.roll(1, 0), given.plain(4, 12)),
        F.embedding(target, given(12, 6, dim=1, grad=True)),
        F.one_hot(target, 12) * x,
    )


def given_hooks(given: Given) -> Any:
    seen: list[Tensor] = []

    def see(gradient: Tensor) -> None:
        seen.append(gradient)

    x, w = given.leaf(3, 12), given.plain(12, 4, grad=True)
    x.register_hook(lambda gradient: gradient * 2)
    w.register_hook(see)
    w.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))  # type: ignore[union-attr]
    x.register_post_accumulate_grad_hook(lambda leaf: seen.append(leaf.grad.clone()))  # type: ignore[union-attr]
    hidden = (x * 3).relu()
    hidden.register_hook(see)
    removed = hidden.register_hook(lambda gradient: gradient * 100)
    removed.remove()
    hidden.retain_grad()
    y = hidden @ w
    y.retain_grad()
    y.square().sum().backward(retain_graph=True)
    y.sum().backward()
    assert type(seen[-1]) in (type(x), Tensor)
    return seen, hidden.grad, y.grad


class ScaledRelu(torch.autograd.Function):
    """A function with a parameter, as users write them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, power: int) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.power = power
        return x.clamp(min=0).pow(power) * scale.view(1, -1, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, scale = ctx.saved_tensors
        positive = x.clamp(min=0)
        slope = ctx.power * positive.pow(ctx.power - 1) * (x > 0)
        return grad * slope * scale.view(1, -1, 1), (grad * positive.pow(ctx.power)).sum((0, 2)), None


class InPlaceTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.tanh_()
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y)


def given_functions_of_ones_own(given: Given) -> Any:
    x, scale = given(2, 12, 3, grad=True), given.plain(12, grad=True)
    scale.register_hook(whole)  # as the plain parameters of a split model have: no subclass sees a function like this
    y = ScaledRelu.apply(x, scale, 2)
    z = ScaledRelu.apply(x, given(12, dim=0, grad=True), 3)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    return y, z, gradient, InPlaceTanh.apply(x * 2), ScaledRelu.apply(given.plain(2, 12, 3, grad=True), scale, 2)


def given_recomputation(given: Given) -> Any:
    found = []
    for reentrant in (False, True):
        x, w = given(2, 12, 4, 4, grad=True) * 1, given(12, 12, 3, 3, dim=0, grad=True)
        plain = given.plain(12, 1, 1, grad=True)

        def block(x: Tensor, w: Tensor, plain: Tensor) -> Tensor:
            return F.dropout(F.conv2d(x, w, padding=1).relu_() * plain, 0.3) + x

        found.append(checkpoint(block, x, w, plain, use_reentrant=reentrant))
        found.append(checkpoint(block, found[-1], w, plain, use_reentrant=reentrant))
    return found


def given_saved_tensors_are_packed(given: Given) -> Any:
    x, w = given(2, 12, grad=True), given.plain(12, 3, grad=True)
    with torch.autograd.graph.save_on_cpu():
        y = (x.tanh() @ w).exp()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t / 2):
        z = x.sigmoid() * y.mean() * x
    with torch.autograd.detect_anomaly(check_nan=True):
        (z.square().sum() + y.sum()).backward(retain_graph=True)
    return y, z


def given_gradients_that_are_cut_of_results_that_are_whole(given: Given) -> Any:
    """The indices that backward takes were computed whole."""
    maps = [given.cut(given.plain(3, 6, *[6] * dims, grad=True), 0).sum(0, keepdim=True) for dims in (1, 2, 3)]
    one, two, three = (t.expand(3, *t.shape[1:]) * given.plain(*t.shape, grad=True) for t in maps)
    pooled = [
        F.max_pool1d(one, 2),
        F.max_pool2d(two, 2),
        F.adaptive_max_pool2d(two, 3),
        F.max_pool3d(three, 2),
        F.adaptive_max_pool3d(three, 3),
    ]
    assert given.ranks is None or all(y.cut.dim is None for y in pooled)
    return [y * given(*y.shape) for y in pooled]


def given_tokens_of_instance_norm(given: Given) -> Any:
    """Their gradient comes as (tokens, images, channels) lie in memory. Torch's own backward is wrong then
    (``test_torch_faults.py``), so the other side has its gradient contiguous."""
    x, w, b = given(4, 12, 4, 4, grad=True), given(12, dim=0, grad=True), given(12, dim=0, grad=True)
    y = F.instance_norm(x, weight=w, bias=b)
    if given.ranks is None:
        y.register_hook(Tensor.contiguous)
    return y.flatten(2).permute(2, 0, 1).contiguous() * given.cut(given.plain(16, 4, 12), 2)


def given_autocast(given: Given) -> Any:
    x, w = given(2, 12, 4, 4, grad=True), given(6, 12, 3, 3, dim=0, grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = F.conv2d(x.float(), w.float())
        z = y.flatten(1) @ y.flatten(1).t()
        total = z.float().softmax(1)
    return [str(t.dtype) for t in (y, z, total)], y.float().mean() > 1e9


def given_branches_on_values(given: Given) -> Any:
    x = given(4, 12, grad=True)
    y = x * 2 if x.mean() > 0 else x * 3
    while y.norm() > 1:
        y = y / 2
    for row in y:
        if row.max() > 0.2:
            y = y + row
    best = int(y.detach().sum(0).argmax())
    return y, y[:, best], y[:, : best + 1], best


def given_graphs_are_cut(given: Given) -> Any:
    x = given(2, 12, grad=True)
    y = x * x.detach()
    z = y.detach().requires_grad_()
    (z * 2).sum().backward()
    frozen = given(2, 12).requires_grad_(False)
    return y, z.grad, (x + frozen).requires_grad, (frozen * 2).requires_grad, y.grad_fn is not None, x.data * 2


def given_functional_transforms(given: Given) -> Any:
    x, w = given(3, 12), given.plain(12, 4)

    def loss(w: Tensor) -> Tensor:
        return (x @ w).tanh().sum()

    transforms = (
        torch.func.vmap(lambda row: (row @ w).tanh())(x),
        torch.func.vmap(torch.sin, in_dims=1)(x),
        torch.func.jvp(lambda t: (t @ w).tanh(), (x,), (x * 2,)),
        torch.func.jacrev(lambda t: (t @ w).tanh().sum(0))(x),
    )
    jacobian = torch.autograd.functional.jacobian(lambda t: (t @ w).tanh().sum(1), x)
    products = torch.autograd.functional.vjp(lambda t: (t @ w).sum(0), x, given.plain(4))[1]
    return transforms, jacobian, products, torch.autograd.functional.hvp(loss, w, given.plain(12, 4))[1]


NAMES = list(properties_of(sys.modules[__name__]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [2, 3])
def test_property(size: int, name: str) -> None:
    """As on one device over two and three ranks: values, strides, gradients, and the random numbers taken."""
    problem = run_ranks_once(size, run_properties, __name__)[0][name]
    assert not problem, problem
