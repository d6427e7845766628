"""In evaluation on a CPU the dense filters are composed once, and never served when a parameter has changed."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tlgc_mp.nn.composed as composed_filters
from tlgc_mp.nn import TwoLevelConv2d, TwoLevelPrototypeConv2d
from tlgc_mp.nn.capture import is_captured

SEED = 53


def layer_of(kind: type[TwoLevelConv2d] = TwoLevelConv2d) -> TwoLevelConv2d:
    torch.manual_seed(SEED)
    layer = kind(8, 12, 3, padding=1, groups=4, bias=True, coarse_init="he", dtype=torch.float64)
    layer.coarse_mode = "dense"
    return layer.eval()


def batch(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(SEED)).to(dtype)


def fresh(layer: TwoLevelConv2d, x: Tensor) -> Tensor:
    """What the layer gives with filters that are composed for this call."""
    other = copy.deepcopy(layer).train()
    assert not is_captured(x)
    return other(x)


def by_load(layer: TwoLevelConv2d) -> None:
    layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()})


def by_assigning_load(layer: TwoLevelConv2d) -> None:
    layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()}, assign=True)


def by_step(layer: TwoLevelConv2d) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(batch()).square().sum().backward()
    optimizer.step()


def by_data(layer: TwoLevelConv2d) -> None:
    layer.restriction.data[0, 0, 0, 0] += 1.0


def by_other_data(layer: TwoLevelConv2d) -> None:
    layer.weight.data = layer.weight.data + 1.0


def by_parameter(layer: TwoLevelConv2d) -> None:
    layer.weight = nn.Parameter(layer.weight.detach() + 1.0)


def by_storage(layer: TwoLevelConv2d) -> None:
    """As through a view that someone else has, numpy's say."""
    layer.weight.detach().numpy()[0] = 3.0


def by_single_precision(layer: TwoLevelConv2d) -> None:
    layer.float()


def by_format(layer: TwoLevelConv2d) -> None:
    layer.to(memory_format=torch.channels_last)
    by_data(layer)


CHANGES: list[Callable[[TwoLevelConv2d], None]] = [
    by_load, by_assigning_load, by_step, by_data, by_other_data, by_parameter, by_storage,
    by_single_precision, by_format,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_seen(change: Callable[[TwoLevelConv2d], None]) -> None:
    layer = layer_of()
    before = layer(batch())
    change(layer)
    x = batch(layer.weight.dtype)
    found = layer(x)
    assert torch.equal(found, fresh(layer, x)) and not torch.equal(found.double(), before)


def test_a_change_of_the_prototypes_parts_is_seen() -> None:
    layer = layer_of(TwoLevelPrototypeConv2d)
    layer(batch())
    for part in ("coarse", "spread", "weight", "bias"):
        getattr(layer, part).data.mul_(2.0)
        assert torch.equal(layer(batch()), fresh(layer, batch())), part


@pytest.fixture
def compositions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts = [0]
    original = composed_filters.composed

    def counted(*parameters: Tensor, groups: int) -> Tensor:
        counts[0] += 1
        return original(*parameters, groups=groups)

    monkeypatch.setattr(composed_filters, "composed", counted)
    return counts


def test_filters_are_composed_once(compositions: list[int]) -> None:
    layer = layer_of()
    outputs = [layer(batch()) for _ in range(3)]
    with torch.no_grad():
        outputs.append(layer(batch()))
    with torch.inference_mode():
        outputs.append(layer(batch()))
    assert compositions == [1]
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    layer.train()
    layer(batch())
    layer(batch())
    assert compositions == [3]
    layer.eval()(batch())
    assert compositions == [4]


def test_filters_are_kept_in_the_format_of_the_input(compositions: list[int]) -> None:
    """Else every call would reorder them."""
    layer = layer_of()
    for count, form in enumerate((torch.contiguous_format, torch.channels_last), start=1):
        for _ in range(2):
            x = batch().contiguous(memory_format=form)
            y = layer(x)
            (kept,) = (saved for saved in y.grad_fn.saved_tensors if saved.shape == (12, 8, 3, 3))
            assert kept.is_contiguous(memory_format=form) and kept is layer._kept.filters(
                x, layer.groups, *list(layer.parameters())[:3]
            )
        assert compositions == [count]


def test_gradients_are_right_through_kept_filters() -> None:
    layer = layer_of()
    with torch.inference_mode():
        layer(batch())
    x = batch().requires_grad_()
    found = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    other = copy.deepcopy(layer).train()
    expected = torch.autograd.grad(other(x).square().sum(), [x, *other.parameters()])
    assert all(torch.equal(got, want) for got, want in zip(found, expected, strict=True))


def test_copies_keep_none() -> None:
    layer = layer_of()
    empty = io.BytesIO()
    torch.save(layer, empty)
    layer(batch())
    full = io.BytesIO()
    torch.save(layer, full)
    assert full.getbuffer().nbytes == empty.getbuffer().nbytes
    other = copy.deepcopy(layer)
    other.weight.data.mul_(2.0)
    assert torch.equal(other(batch()), fresh(other, batch()))
    assert torch.equal(layer(batch()), fresh(layer, batch()))


@pytest.mark.filterwarnings("ignore")
def test_a_traced_or_compiled_layer_reads_its_parameters() -> None:
    layer = layer_of()
    layer(batch())
    traced = torch.jit.trace(layer, batch())
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(batch())
    layer.weight.data.mul_(2.0)
    for tool in (traced, compiled):
        torch.testing.assert_close(tool(batch()), fresh(layer, batch()), rtol=0, atol=1e-12)


def test_under_autocast() -> None:
    layer = layer_of().float()
    x = batch(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), fresh(layer, x))
    assert torch.equal(layer(x), fresh(layer, x))
