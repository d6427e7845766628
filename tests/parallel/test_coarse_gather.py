"""The collectives of a forward and backward pass: values, gradients, and what torch's tools see of them.

Gradients are checked by finite differences on 2 and 3 ranks. The function checked has the inputs of all ranks for its
input and the outputs of all ranks for its output, so every rank perturbs the same numbers in step, and its Jacobian
says how each rank's output depends on every rank's input.

On one host the coarse exchange is Gloo's collectives, and between hosts sends and receives. Here all ranks lie on one;
for the other case the test says where each lies.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile

from tests.parallel.common import (
    SEED,
    assert_close,
    assert_gradients_close,
    gather_gradients,
    gather_shares,
    run_ranks_once,
    smooth_network,
)
from tests.ranks import run_ranks
from tlgc_mp.bench.ranks.meters import CollectiveClock
from tlgc_mp.nn import TwoLevelConv2d
from tlgc_mp.parallel import shard, sharding
from tlgc_mp.parallel.collectives import (
    coarse_gather,
    coarse_reduce_scatter,
    copy_to_ranks,
    sum_partials,
)
from tlgc_mp.parallel.exchange import CoarseExchange
from tlgc_mp.parallel.layout import Layout

RANKS = [2, 3]


def _exchange(group: dist.ProcessGroup, over_network: bool) -> CoarseExchange:
    return CoarseExchange(dist.get_world_size(group), group.group_name, over_network)


def _world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


class _Mine(torch.autograd.Function):
    """(P, ...) of all ranks, whole on each -> this rank's (...)."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor) -> Tensor:
        return whole[dist.get_rank()].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return gather_shares(grad[None], Layout(0, None), _world())


class _Everyones(torch.autograd.Function):
    """This rank's (...) -> (P, ...) of all ranks, whole on each."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor) -> Tensor:
        return gather_shares(mine[None], Layout(0, None), _world())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad[dist.get_rank()].clone()


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)


def _check_gradients() -> dict[str, bool]:
    rank, ranks, name = dist.get_rank(), dist.get_world_size(), _world().group_name
    weights = _random(2, ranks, 4, 4)

    def gathered(shares: Tensor) -> Tensor:
        return _Everyones.apply(coarse_gather(_Mine.apply(shares), ranks, name).sin())

    def summed(partials: Tensor) -> Tensor:
        return sum_partials(_Mine.apply(partials).sin(), name).cos()

    def copied(whole: Tensor) -> Tensor:
        return _Everyones.apply(weights[0, rank] @ copy_to_ranks(whole, name).sin())

    def column_then_row(whole: Tensor) -> Tensor:
        return sum_partials(weights[1, rank] @ (weights[0, rank] @ copy_to_ranks(whole, name)).tanh(), name)

    group_channels = 2

    def two_level(mode: str, over_network: bool, shares: Tensor, **parameters: Tensor) -> Tensor:
        layer = TwoLevelConv2d(group_channels * ranks, ranks, 3, padding=1, stride=2, groups=ranks)
        layer.local_groups, layer.exchange, layer.coarse_mode = 1, _exchange(_world(), over_network), mode
        for key, whole in parameters.items():
            delattr(layer, key)
            setattr(layer, key, _Mine.apply(whole))
        return _Everyones.apply(layer(_Mine.apply(shares)))

    def check_two_level(mode: str, over_network: bool) -> bool:
        return check(
            lambda x, w, r, p: two_level(mode, over_network, x, weight=w, restriction=r, prolongation=p),
            _random(ranks, 1, group_channels, 3, 3),
            _random(ranks, 1, group_channels, 3, 3),
            _random(ranks, 1, group_channels, 3, 3),
            _random(ranks, 1, ranks),
        )

    def check(function: Any, *inputs: Tensor) -> bool:
        return torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in inputs])

    return {
        "coarse_gather": check(gathered, _random(ranks, 2, 3)),
        "sum_partials": check(summed, _random(ranks, 2, 3)),
        "copy_to_ranks": check(copied, _random(4, 2)),
        "copy_to_ranks, then sum_partials": check(column_then_row, _random(4, 2)),
        "TwoLevelConv2d, overlapped": check_two_level("overlapped", False),
        "TwoLevelConv2d, overlapped, between hosts": check_two_level("overlapped", True),
        "TwoLevelConv2d, fused": check_two_level("fused", False),
        "TwoLevelConv2d, fused, between hosts": check_two_level("fused", True),
    }


@pytest.mark.parametrize("ranks", RANKS)
def test_gradients_are_those_of_finite_differences(ranks: int) -> None:
    for checked in run_ranks_once(ranks, _check_gradients):
        assert len(checked) == 8
        assert all(checked.values())


def _values(over_network: bool) -> dict[str, Tensor]:
    rank, ranks, group = dist.get_rank(), dist.get_world_size(), _world()
    exchange = _exchange(group, over_network)
    everyones = _random(ranks, ranks * 2, 3)
    first, second = exchange.backward(everyones[rank]), exchange.backward(2 * everyones[rank])
    doubled, single = second(), first()
    return {
        "gathered": exchange.forward(everyones[rank])(),
        "gathered, not contiguous": exchange.forward(everyones[rank].t())(),
        "scattered": single,
        "scattered, second in flight": doubled,
        "scattered, bf16": exchange.backward(everyones[rank].bfloat16())(),
        "summed": sum_partials(everyones[rank], group.group_name),
        "copied": copy_to_ranks(everyones[rank], group.group_name),
    }


@pytest.mark.parametrize("over_network", [False, True])
@pytest.mark.parametrize("ranks", RANKS)
def test_values(ranks: int, over_network: bool) -> None:
    everyones = _random(ranks, ranks * 2, 3)
    for rank, found in enumerate(run_ranks_once(ranks, _values, over_network)):
        assert torch.equal(found["gathered"], everyones.flatten(0, 1))
        assert torch.equal(found["gathered, not contiguous"], torch.cat([one.t() for one in everyones]))
        share = everyones.sum(0)[2 * rank : 2 * rank + 2]
        torch.testing.assert_close(found["scattered"], share)
        torch.testing.assert_close(found["scattered, second in flight"], 2 * share)
        torch.testing.assert_close(found["scattered, bf16"].double(), share, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(found["summed"], everyones.sum(0))
        assert torch.equal(found["copied"], everyones[rank])


def _bytes_given() -> dict[str, tuple[int, int]]:
    exchange, group = _exchange(_world(), True), _world()
    found = {}
    for name, start, tensor in (
        ("gather", exchange.forward, torch.ones(2, 5)),
        ("reduce_scatter", exchange.backward, torch.ones(2 * group.size(), 5)),
    ):
        with CollectiveClock() as clock:
            start(tensor)()
        kinds = clock.by_kind()
        assert set(kinds) == {"send", "receive"}
        found[name] = (int(kinds["send"]["bytes"]), int(kinds["receive"]["bytes"]))
    return found


@pytest.mark.parametrize("ranks", RANKS)
def test_a_rank_sends_a_share_to_every_other(ranks: int) -> None:
    """Gloo's reduce-scatter would send all to all."""
    shares = (ranks - 1) * 2 * 5 * 4
    for found in run_ranks_once(ranks, _bytes_given):
        assert found == {"gather": (shares, shares), "reduce_scatter": (shares, shares)}


def _step_on_hosts(hosts: list[str]) -> tuple[dict[str, Tensor], dict[str, int], set[bool]]:
    """Output and gradients of a step of ranks on ``hosts``, how often each kind of collective ran, and what the layers'
    exchanges say of the hosts."""
    with mock.patch.object(sharding, "host_on_network", return_value=hosts[dist.get_rank()]):
        model = shard(smooth_network("cpu").double())
    model(_images())  # the first pass compares the ranks
    with CollectiveClock() as clock:
        output = model(_images())
        output.square().sum().backward()
    found = {"output": output.detach(), **gather_gradients(model)}
    kinds = {kind: int(traffic["calls"]) for kind, traffic in clock.by_kind().items()}
    layers = [module for module in model.modules() if isinstance(module, TwoLevelConv2d)]
    return found, kinds, {layer.exchange.over_network for layer in layers}


def _images() -> Tensor:
    return _random(2, 3, 8, 8)


LAYERS, CLASSES = 3, 10
"""Of the network: layers of two levels, and outputs of the head."""


@pytest.mark.parametrize(
    "hosts", [["one", "one"], ["one", "two"], ["one", "one", "one", "two"]], ids=lambda hosts: "-".join(hosts)
)
def test_only_ranks_on_several_hosts_exchange_by_sends(hosts: list[str]) -> None:
    over_network, others = len(set(hosts)) > 1, len(hosts) - 1
    model = smooth_network("cpu").double()
    expected = model(_images())
    expected.square().sum().backward()
    gradients = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    for found, kinds, said in run_ranks(len(hosts), _step_on_hosts, hosts):
        assert said == {over_network}
        assert kinds.get("all_gather", 0) == kinds.get("reduce_scatter", 0) == (0 if over_network else LAYERS)
        head = 0 if CLASSES % len(hosts) else 2 * others  # is gathered for, forward, and so are the logits
        assert kinds["send"] == kinds["receive"] == head + (2 * LAYERS * others if over_network else 0)
        assert_close({"output": found.pop("output")}, {"output": expected.detach()}, 1e-9)
        assert_gradients_close(found, gradients, 1e-9)


def _operator_checks() -> dict[str, dict[str, str]]:
    ranks, name = dist.get_world_size(), _world().group_name
    x = _random(4, 3).requires_grad_()

    def check(operator: Any, *arguments: Any) -> dict[str, str]:
        return torch.library.opcheck(operator, arguments, raise_exception=False)

    return {
        "coarse_gather": check(coarse_gather, x, ranks, name),
        "coarse_reduce_scatter": check(coarse_reduce_scatter, x.detach(), ranks, name),
        "sum_partials": check(sum_partials, x, name),
        "copy_to_ranks": check(copy_to_ranks, x, name),
    }


@pytest.mark.parametrize("operator", ["coarse_gather", "coarse_reduce_scatter", "sum_partials", "copy_to_ranks"])
def test_operators_satisfy_torch(operator: str) -> None:
    for checks in run_ranks_once(2, _operator_checks):
        failed = {check: str(result) for check, result in checks[operator].items() if result != "SUCCESS"}
        assert not failed


@pytest.mark.parametrize("ranks", [1, 4, 1024])
def test_shapes_without_a_process_group(ranks: int) -> None:
    with FakeTensorMode():
        share = torch.empty(3, 5, dtype=torch.bfloat16)
        full = coarse_gather(share, ranks, "a group that does not exist")
        scattered = torch.ops.tlgc_mp.coarse_reduce_scatter(full, ranks, "a group that does not exist")
        summed = sum_partials(share.t(), "a group that does not exist")
    assert (full.shape, full.dtype) == ((3 * ranks, 5), torch.bfloat16)
    assert (scattered.shape, scattered.dtype) == ((3, 5), torch.bfloat16)
    assert (summed.shape, summed.stride()) == ((5, 3), (3, 1))


def test_traced_graph_names_the_operators() -> None:
    def passes(share: Tensor) -> Tensor:
        return torch.autograd.grad(coarse_gather(share, 4, "group").square().sum(), share)[0]

    graph = make_fx(passes, tracing_mode="fake")(torch.ones(2, 3, requires_grad=True)).graph
    called = [str(node.target) for node in graph.nodes if str(node.target).startswith("tlgc_mp")]
    assert called == ["tlgc_mp.coarse_gather.default", "tlgc_mp.coarse_reduce_scatter.default"]


def _profiled_names(over_network: bool) -> list[str]:
    layer = TwoLevelConv2d(4, 4, 1, groups=4)
    layer.local_groups, layer.exchange = 2, _exchange(_world(), over_network)
    for param in layer.parameters():
        param.data = param.data[:2]
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        layer(torch.ones(1, 2, 3, 3)).sum().backward()
    return [event.name for event in profiler.events()]


@pytest.mark.parametrize("over_network", [False, True])
def test_profiler_names_the_operators(over_network: bool) -> None:
    for names in run_ranks_once(2, _profiled_names, over_network):
        assert names.count("tlgc_mp::coarse_gather") == 1
        assert names.count("tlgc_mp::coarse_reduce_scatter") == 1
