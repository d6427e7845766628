"""Code that views, writes, reads and copies tensors does the same with split tensors as with plain ones."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parallel.common import run_ranks_once
from tests.parallel.properties import Given, properties_of, run_properties

# Views and writes. Channels are split over two and over three ranks; some of the slices here end between two shares.


def given_a_slice_is_written(given: Given) -> Any:
    x = given(2, 12, 4, 4, grad=True) * 1
    x[:, :4].mul_(2)
    x[:, 2:7] += given.plain(2, 5, 1, 1, grad=True)
    x[:, 0] = 0
    x[:, -1] = given(2, 4, 4, dim=0, grad=True)
    return x


def given_a_chunk_is_written(given: Given) -> Any:
    x = given(2, 12, 3)
    first, second, third, *_ = x.chunk(5, dim=1)
    second.mul_(2)
    third.copy_(first)
    rows = x.unbind(1)
    rows[7].zero_()
    parts = x.split([1, 6, 5], dim=1)
    parts[1][:, 1:3].neg_()
    return x, first, second, third, rows, parts


def given_the_base_is_written_after_the_view(given: Given) -> Any:
    x = given(2, 12, 4, grad=True) * 1
    aligned, other = x[:, :6], x[:, 3:8]
    x.mul_(2)
    x[:, 4] = 1
    return x, aligned, other, x.view(-1)


def given_overlapping_views_are_written(given: Given) -> Any:
    x = given(2, 12, 4, grad=True) * 1
    a, b = x[:, :5], x[:, 3:9]
    a.add_(1)
    b.mul_(2)
    c = a[:, 2:4]
    b.sub_(0.5)
    c.exp_()
    return x, a, b, c


def given_a_view_of_a_view_is_written(given: Given) -> Any:
    x = given(2, 12, 4, 4, grad=True) * 1
    x[:, 1:8][:, 2:4].add_(1)
    x.view(2, 3, 4, 4, 4)[:, 1].mul_(3)
    x.flatten(1)[:, 5] = 1
    x.permute(0, 2, 3, 1)[..., 3:5].zero_()
    x.transpose(1, 3).select(3, 7).neg_()
    x.diagonal(dim1=2, dim2=3).fill_(2)
    x.movedim(1, 0)[10].div_(3)
    x[:, ::2].mul_(1.5)
    return x


def given_a_whole_view_is_read_after_both_were_written(given: Given) -> Any:
    x = given(12, 4, dim=0)
    view = x[1:8]
    inner = view[1:3]
    x.copy_(given.plain(12, 4))
    view[0] = 5
    inner.zero_()
    x[2].add_(1)
    return x, view, inner


def given_data_is_written(given: Given) -> Any:
    x = given.leaf(2, 12)
    x.data.mul_(2)
    x.detach()[:, 3] = 1
    with torch.no_grad():
        x += given(2, 12, dim=0)
        x.clamp_(-1, 1)
    return x * 1


def given_data_is_replaced(given: Given) -> Any:
    x = given.leaf(2, 12)
    x.data = given(2, 12).detach() + 1
    return x * 2


def given_shapes_change_in_place(given: Given) -> Any:
    x = given(2, 12, 1, 4)
    x.squeeze_(2)
    a = x.clone().unsqueeze_(0).transpose_(1, 2)
    a.add_(1)
    b = given(4, 12).t_()
    c = given(2, 12, grad=True) * 1
    return x, a, b.mul_(2), c.transpose_(0, 1).mul_(3), c.unsqueeze_(1)


def given_values_are_put_by_masks_and_indices(given: Given) -> Any:
    x, y = given(2, 12, 3, grad=True) * 1, given(2, 12, 3, grad=True)
    mask = given.plain(2, 12, 3) > 0
    x[x > 1] = 0
    x[mask] *= 2
    x[:, [0, 5, 3]] = y[:, [1, 1, 2]]
    x[torch.tensor([1, 0]), 2] = 7
    x.masked_fill_(mask & (y < 0), -1).index_add_(1, torch.tensor([4, 4]), y[:, :2])
    x.scatter_(1, torch.zeros(2, 1, 3, dtype=torch.long), 3.0)
    return x, y[mask], y[y > 0], y[..., None, 1:], y[1, :, 0], torch.where(mask, x, y), torch.where(x > 0, 0.0, y)


def given_outputs_are_written_to(given: Given) -> Any:
    x, y, out, plain = given(2, 12), given(2, 12, dim=0), given(2, 12), given.plain(2, 12)
    torch.add(x, y, out=out)
    torch.mul(x, y, out=plain)
    joined, view = given(2, 24), given(2, 24)
    torch.cat([x, y], 1, out=joined)
    torch.exp(x, out=view[:, 5:17])
    values, indices = given(2, 3), torch.zeros(2, 3, dtype=torch.long)
    torch.topk(x, 3, out=(values, indices))
    return out, plain, joined, view, values, indices


def given_plain_tensors_are_written(given: Given) -> Any:
    x, plain = given(2, 12, grad=True), given.plain(3, 12)
    plain[0] = x[0]
    plain[1:].add_(x)
    rows = [given.plain(12) for _ in range(2)]
    torch._foreach_add_(rows, list(x.detach().unbind(0)))
    return plain, rows


def given_views_of_other_kinds(given: Given) -> Any:
    x = given(2, 12, 6, grad=True)
    return (
        x.unfold(1, 4, 3),
        x.unfold(2, 3, 1),
        x.as_strided((2, 5), (1, 7), 3),
        x[:, :1].expand(2, 5, 6),
        x[None].expand(3, -1, -1, -1),
        x.reshape(4, 36),
        x.reshape(-1),
        x.unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2),
        x.ravel()[5:30:2],
        x.mT,
        x.swapaxes(0, 1),
        x.narrow(1, 3, 4),
        x.tensor_split(5, 1),
        x.repeat(1, 2, 1),
        x.repeat_interleave(2, 1),
        x.roll(1, 1),
        x.flip(1),
        F.pad(x, (0, 0, 1, 2)),
        F.pixel_shuffle(x[..., None], 2),
    )


def given_channels_are_shuffled(given: Given) -> Any:
    x = given(2, 12, 4, 4, grad=True)
    b, c, h, w = x.shape
    a = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
    d = x.view(b, 3, c // 3, h, w).transpose(1, 2).contiguous().view(b, c, h, w)
    joined = torch.cat([a, x[:, :6], d], 1)
    left, right = joined.chunk(2, 1)
    return a, d, joined * torch.arange(30.0).view(1, 30, 1, 1), left * right.sigmoid(), joined.mean((0, 2, 3))


# Values that leave as Python's.


def given_values_are_read(given: Given) -> Any:
    x = given(2, 12)
    branches = ["positive" if value > 0 else "negative" for value in (x.sum(), x[0, 7], x.max() - 3)]
    return (
        branches,
        x.sum().item(),
        x[1, 11].item(),
        float(x.mean()),
        int(x.abs().max() * 10),
        bool((x > 0).any()),
        bool((x > 0).all()),
        x.tolist(),
        x.numpy().tolist(),
        x.argmax().item(),
        max(x[0]),
        sum(x.unbind(0)),
        [row.norm() for row in x],
        len(x),
        torch.equal(x, x + 0),
        torch.allclose(x, x + 1),
        (x > 0).nonzero(),
        (x > 0).sum().item(),
        f"{x.sum():.5f} {x.max():.3e}",
        torch.from_dlpack(x),
        x.unique(),
        x.sum() in [x.sum()],
    )


def given_attributes_are_read(given: Given) -> Any:
    x = given(2, 12, 4, 4).contiguous(memory_format=torch.channels_last)
    y = x[:, 4:]
    return (
        list(x.shape),
        x.size(1),
        x.numel(),
        x.dim(),
        list(x.stride()),
        list(y.stride()),
        y.storage_offset(),
        x.is_contiguous(),
        x.is_contiguous(memory_format=torch.channels_last),
        y.is_contiguous(memory_format=torch.channels_last),
        str(x.dtype),
        str(x.device),
        str(x.layout),
        x.element_size(),
        x.is_floating_point(),
        x.requires_grad,
        x.is_leaf,
        isinstance(x, Tensor),
        torch.is_tensor(x),
        x.shape[1] ** -0.5 * x,
        x.is_sparse,
        x.itemsize,
        x.nbytes,
    )


def given_tensors_are_made_like_it(given: Given) -> Any:
    x = given(2, 12)
    return (
        x.new_zeros(3, 4),
        x.new_full((2, 12), 2.0),
        x.new_tensor([1.0, 2.0]),
        x.new_empty(0),
        torch.zeros_like(x),
        torch.full_like(x, 3, dtype=torch.float32),
        torch.ones_like(x, memory_format=torch.contiguous_format),
        torch.randn_like(x),
        torch.rand_like(x) < 0.5,
        torch.tensor([x.sum(), 1.0]),
        torch.as_tensor(x) + 1,
        torch.arange(x.shape[1]).to(x),
    )


def given_types_are_converted(given: Given) -> Any:
    x = given(2, 12, grad=True)
    return (
        x.float(),
        x.half(),
        x.to(torch.bfloat16),
        x.double() * 2,
        x.to(given.plain(1).float()),
        x.type(torch.float32),
        x.type_as(torch.ones(1)),
        x.cpu() + 1,
        x.to("cpu", torch.float32, copy=True),
        x.long(),
        (x > 0).to(x.dtype),
        x.float().to(x),
        x.to(torch.complex128).abs(),
        torch.view_as_real(torch.complex(x, x)),
    )


def given_random_numbers_are_drawn(given: Given) -> Any:
    x = given(2, 12, 4, 4, grad=True)
    noise = torch.randn_like(x) + torch.empty_like(x).uniform_() + x.new_empty(2, 12, 1, 1).bernoulli_(0.5)
    return (
        F.dropout(x, 0.4),
        F.dropout2d(x, 0.4),
        F.alpha_dropout(x, 0.3),
        F.feature_alpha_dropout(x, 0.3),
        F.rrelu(x, training=True),
        x + noise,
        torch.bernoulli(x.sigmoid()),
        torch.normal(x, 1.0),
        F.gumbel_softmax(x, dim=1),
        x[:, torch.randperm(12)],
        torch.multinomial(x.flatten(1).softmax(1), 3),
        F.dropout(x[:, :5], 0.4),
        F.dropout(x.to(memory_format=torch.channels_last), 0.4),
    )


def given_errors_are_raised(given: Given) -> Any:
    x, y = given(2, 12, grad=True), given(2, 11)

    def kind(function: Any) -> str:
        try:
            function()
        except Exception as error:
            return type(error).__name__
        return "none"

    def written_after_it_was_saved() -> None:
        z = x.exp()
        z.add_(1)
        z.sum().backward()

    return [
        kind(lambda: x + y),
        kind(lambda: x @ x),
        kind(lambda: x.view(5, 5)),
        kind(lambda: bool(x)),
        kind(lambda: x.item()),
        kind(lambda: x[:, 12]),
        kind(lambda: x[3]),
        kind(lambda: torch.cat([x, x[0]])),
        kind(lambda: x.numpy()),
        kind(lambda: x.detach().requires_grad_().add_(1)),
        kind(written_after_it_was_saved),
        kind(lambda: x.backward()),
    ]


def given_copies_are_made(given: Given) -> Any:
    x = given.leaf(2, 12)
    y = copy.deepcopy(x)
    assert type(y) is type(x) and y.is_leaf and y.requires_grad
    z = copy.copy(x.detach())
    with torch.no_grad():
        y.add_(1)
        z.add_(1)
    shared = copy.deepcopy({"a": x, "b": [x]})
    return x * 1, y, z, shared["a"] is shared["b"][0], shared["a"]


def given_it_is_saved(given: Given) -> Any:
    x = given(2, 12).requires_grad_(True)
    file = io.BytesIO()
    torch.save({"x": x, "view": x[:, 3:5].detach()}, file)
    file.seek(0)
    loaded = torch.load(file)
    pickled = pickle.loads(pickle.dumps(x.detach()))
    assert type(loaded["x"]) is Tensor and type(loaded["view"]) is Tensor and type(pickled) is Tensor
    return loaded["x"], loaded["view"], pickled, loaded["x"].requires_grad


def given_one_rank_prints(given: Given) -> Any:
    x = given(2, 12, grad=True) * 1
    if given.ranks is None or given.ranks.rank == 0:
        assert len({repr(x), str(x), repr([x])[1:-1]}) == 1 and repr(x)
    return x


def given_modes_without_gradients(given: Given) -> Any:
    x = given(2, 12, grad=True)
    with torch.no_grad():
        a = x * 2
        a[:, 3:5] += 1
    with torch.inference_mode():
        b = given(2, 12) * 2
        b[:, 3:5] += 1
        c = b[:, 3:].relu_() + x[:, :9]
    with torch.no_grad(), torch.enable_grad():
        d = x * 3
    return a, b, c.clone(), d, a.requires_grad, b.is_inference(), c.is_inference(), d.requires_grad


def given_an_optimizer_steps(given: Given) -> Any:
    found = []
    for optimizer in (torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop):
        weights = [given.leaf(4, 12), given.leaf(12, dim=0), given.leaf(5, 3)]
        stepper = optimizer(weights, lr=0.1)
        for _ in range(2):
            stepper.zero_grad()
            ((given(3, 4, dim=0) @ weights[0] + weights[1]).square().mean() + weights[2].abs().sum()).backward()
            found.append(torch.nn.utils.clip_grad_norm_(weights, 0.5))
            stepper.step()
        found.extend(weight.detach() for weight in weights)
    return found


NAMES = list(properties_of(sys.modules[__name__]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [2, 3])
def test_property(size: int, name: str) -> None:
    """As on one device over two and three ranks: values, strides, gradients, and the random numbers taken."""
    problem = run_ranks_once(size, run_properties, __name__)[0][name]
    assert not problem, problem
