"""Tensor-parallel ranks of a replica that are not equal are found, by name and within a bounded number of passes."""

from __future__ import annotations

import copy
import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.parallel.common import run_ranks_once
from tlgc_mp.errors import UsageError
from tlgc_mp.parallel import checksums
from tlgc_mp.parallel.layout import Ranks
from tlgc_mp.parallel.replicas import CHECK_EVERY, ReplicaWatch, agree_on_model, held_whole, watch_replicas

SIDE, PASSES = 12, 3 * CHECK_EVERY


def _network(dropout: bool = True) -> nn.Module:
    """With the weights that torch's random state gives."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5 if dropout else 0.0),
        nn.Flatten(),
        nn.Linear(8 * (SIDE - 2) ** 2, 10),
    )


def _various() -> nn.Module:
    """Tensors of many types and memory formats."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 64, 3).to(memory_format=torch.channels_last), nn.Linear(100, 100).bfloat16())
    model.register_buffer("flags", torch.rand(5000) > 0.5)
    model.register_buffer("count", torch.tensor(7))
    model.register_buffer("table", torch.randn(3, 5000, dtype=torch.complex64).conj())
    model.register_buffer("empty", torch.empty(0, 3))
    model.register_buffer("doubles", torch.randn(9000, dtype=torch.float64)[::2])
    return model


def _said(function: Callable[[], Any]) -> str:
    try:
        function()
    except UsageError as error:
        return str(error)
    return ""


def _changed(name: str, index: int) -> nn.Module:
    """:func:`_various`, of which the last rank holds another last bit in one element of one tensor."""
    model = _various()
    if dist.get_rank() == dist.get_world_size() - 1:
        flat = checksums.flattened(model.get_parameter(name) if "." in name else model.get_buffer(name))
        bits = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
        bits[index] ^= 1
    return model


CHANGES = {
    "0.weight": 12345,
    "0.bias": 63,
    "1.weight": 9999,
    "flags": 4999,
    "count": 0,
    "doubles": 4499,
}


def _compared() -> dict[str, tuple[str, str, bool]]:
    """What was said, on which the ranks agreed or not: (the error, the warning, whether all hold the same after)."""
    group, rank = dist.group.WORLD, dist.get_rank()
    assert group is not None

    def compare(model: nn.Module, seed: int | None = None) -> tuple[str, str, bool]:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            seeds: list[Any] = []
            error = _said(lambda: seeds.append(agree_on_model(model, group, seed)))
        held = [None if value.is_meta else checksums.exact(value).item() for value in model.state_dict().values()]
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, (held, seeds))
        return error, "".join(str(warning.message) for warning in warned), all(each == every[0] for each in every)

    found = {"equal": compare(_various())}
    for name, index in CHANGES.items():
        found[name] = compare(_changed(name, index))
    torch.manual_seed(1234 + rank)
    found["seed of each rank"] = compare(_network())
    torch.manual_seed(0)
    found["shapes"] = compare(nn.Linear(3, 4 + rank // 2))
    torch.manual_seed(0)
    found["more tensors"] = compare(nn.Linear(3, 4, bias=rank != 2))
    frozen = _various()
    frozen.get_parameter("0.bias").requires_grad_(rank != 2)
    found["frozen"] = compare(frozen)
    with torch.device("meta"):
        meta = _network()
    torch.manual_seed(1234 + rank)
    found["meta, a seed of each rank"] = compare(meta)
    found["meta, given a seed of each rank"] = compare(meta, rank // 2)
    found["meta, one seed given"] = compare(meta, 5)
    torch.manual_seed(5)
    found["meta, one seed"] = compare(meta)
    return found


def test_one_model_is_agreed_upon() -> None:
    first, *others = run_ranks_once(3, _compared)
    for name, (error, _, same) in first.items():
        assert all(found[name] == (error, "", same) for found in others), name  # the first rank warns
        assert same or error, name
    for name in ("equal", "meta, one seed given", "meta, one seed", "meta, a seed of each rank"):
        assert first[name] == ("", "", True), name
    for name in CHANGES:
        error, warning, same = first[name]
        assert not error and f"hold other values of {name}, and of 1 tensors in all" in warning and same, name
    assert "hold other values of 0.weight, and of 4 tensors in all" in first["seed of each rank"][1]
    assert "those of rank 0 are taken" in first["seed of each rank"][1]
    assert "got another weight on rank 2" in first["shapes"][0]
    assert "got another bias on rank 2" in first["more tensors"][0]
    assert "got another 0.bias on rank 2" in first["frozen"][0]
    assert "got 1 on rank 2 and 0 on rank 0" in first["meta, given a seed of each rank"][0]


def _ranks() -> Ranks:
    return Ranks(dist.group.WORLD)


def _watched(model: nn.Module) -> nn.Module:
    watch_replicas(model, _ranks())
    return model


def _train(
    model: nn.Module,
    change: Callable[[int, Tensor], Tensor] = lambda number, images: images,
    passes: int = PASSES,
) -> tuple[int, str]:
    """The forward pass that raised, and what; (0, "") where none did. ``change`` may do anything before a pass."""
    torch.manual_seed(3)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data = torch.Generator().manual_seed(0)
    for number in range(1, passes + 1):
        images = change(number, torch.randn(4, 3, SIDE, SIDE, generator=data))
        try:
            loss = model(images).square().mean()
        except UsageError as error:
            return number, str(error)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return 0, ""


def _fresh(dropout: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return _watched(_network(dropout))


def _runs() -> dict[str, tuple[int, str]]:
    last = dist.get_rank() == dist.get_world_size() - 1

    def on_last(at: int, action: Callable[[Tensor], Tensor | None]) -> Callable[[int, Tensor], Tensor]:
        def change(number: int, images: Tensor) -> Tensor:
            if last and number >= at:
                changed = action(images)
                return images if changed is None else changed
            return images

        return change

    def once(at: int, action: Callable[[], Any]) -> Callable[[int, Tensor], Tensor]:
        def change(number: int, images: Tensor) -> Tensor:
            if last and number == at:
                with torch.no_grad():
                    action()
            return images

        return change

    def evaluating(model: nn.Module) -> Callable[[int, Tensor], Tensor]:
        def change(number: int, images: Tensor) -> Tensor:
            model.eval()
            model(images + dist.get_rank())  # another batch on each rank: nothing is trained with it
            model.train()
            return images

        return change

    found = {"equal": _train(_fresh())}
    model = _fresh()
    found["evaluated between"] = _train(model, evaluating(model))
    found["batch"] = _train(_fresh(), on_last(5, lambda images: images + torch.randn(1)))
    found["mirror image"] = _train(_fresh(), on_last(5, lambda images: torch.cat([images[:3], images[3:].flip(3)])))
    found["batch from the first"] = _train(_fresh(), on_last(1, lambda images: images * (1 + 1e-6)))
    found["size"] = _train(_fresh(), on_last(1, lambda images: images[:3]))
    found["random state"] = _train(_fresh(), on_last(2, lambda images: torch.rand(1).fill_(0) + images))
    found["random state that nothing draws from"] = _train(
        _fresh(dropout=False), on_last(1, lambda images: torch.rand(1).fill_(0) + images)
    )
    model = _fresh()
    found["weight"] = _train(model, once(17, lambda: model[5].bias[3].add_(0.5)))
    model = _fresh()
    found["rounding"] = _train(model, once(17, lambda: model[5].weight.mul_(1 + 1e-6)))
    model = _fresh()
    found["statistics"] = _train(model, once(3, lambda: model[1].running_mean.add_(0.5)))
    model = _fresh()
    found["count"] = _train(model, once(3, lambda: model[1].num_batches_tracked.add_(1)))
    model = _fresh()
    found["NaN on all"] = _train(model, lambda number, images: images * math.nan)
    model = _fresh()
    found["NaN on one"] = _train(model, once(17, lambda: model[5].bias.fill_(math.nan)))
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_drift_apart_are_found_in_time(ranks: int) -> None:
    first, *others = run_ranks_once(ranks, _runs)
    assert all(found == first for found in others), "ranks raise at different times, or different errors"
    for name in (
        "equal",
        "evaluated between",
        "random state that nothing draws from",
        "rounding",
        "NaN on all",
    ):
        assert first[name] == (0, ""), name
    on = f"got another on rank {ranks - 1} than on rank 0 in forward pass"
    for name, (what, at, noticed) in {
        "batch": ("the batch", CHECK_EVERY + 1, CHECK_EVERY + 2),
        "mirror image": ("the batch", CHECK_EVERY + 1, CHECK_EVERY + 2),
        "batch from the first": ("the batch", 1, 2),
        "size": ("the batch", 1, 2),
        "random state": ("torch's random state", CHECK_EVERY + 1, CHECK_EVERY + 2),
        "weight": ("5.bias", CHECK_EVERY + 1, CHECK_EVERY + 2),
        "statistics": ("1.running_mean", CHECK_EVERY + 1, CHECK_EVERY + 2),
        "count": ("1.num_batches_tracked", CHECK_EVERY + 1, CHECK_EVERY + 2),
    }.items():
        number, message = first[name]
        assert message.startswith(what), (name, message)
        assert f"{on} {at} in training" in message, (name, message)
        assert number == noticed, name
    assert first["NaN on one"][0] == CHECK_EVERY + 2


def _many_tensors() -> tuple[int, str]:
    torch.manual_seed(0)
    layers = [nn.Linear(32, 32) for _ in range(40)]
    model = nn.Sequential(*layers, nn.Linear(32, 40_000))
    ranks = Ranks(dist.new_group())
    own = ReplicaWatch(ranks, held_whole, every=1)
    model.register_forward_pre_hook(own.before, with_kwargs=True)
    model.register_forward_hook(own.after)
    if dist.get_rank() == 1:
        with torch.no_grad():
            model[40].weight[39_999].add_(1.0)
    for number in range(1, 100):
        try:
            model(torch.ones(1, 32))
        except UsageError as error:
            return number, str(error)
    return 0, ""


def test_all_whole_tensors_are_looked_at_in_turn() -> None:
    """82 tensors at 16 a check, 1.3 million more elements at 2^19 a check: nine checks at most, and one to judge."""
    for number, message in run_ranks_once(2, _many_tensors):
        assert message.startswith("40.weight must be the same")
        assert 2 < number <= 10


def _copies() -> dict[str, Any]:
    found: dict[str, Any] = {}
    model = _fresh(dropout=False)
    _train(model, passes=3)
    copied = copy.deepcopy(model)
    found["copy, equal"] = _train(copied, passes=CHECK_EVERY + 2)
    found["copy, other batches"] = _train(copied, lambda number, images: images + dist.get_rank())
    file = io.BytesIO()
    torch.save(model, file)
    if dist.get_rank() == 0:  # alone: it talks to nobody
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        found["loaded"] = _train(loaded, lambda number, images: images + dist.get_rank())
        same = all(map(torch.equal, loaded.parameters(), copied.parameters()))
        found["loaded is trained"] = not same
    dist.barrier()
    found["original"] = _train(model, passes=2 * CHECK_EVERY)
    compiled = torch.compile(_fresh(dropout=False), backend="eager", fullgraph=True)
    found["compiled"] = _train(compiled, passes=CHECK_EVERY + 2)
    return found


def test_copies_are_watched_and_saved_models_are_at_rest() -> None:
    for rank, found in enumerate(run_ranks_once(2, _copies)):
        assert found["copy, equal"] == (0, "")
        number, message = found["copy, other batches"]
        assert message.startswith("the batch must be the same")
        assert number <= CHECK_EVERY + 2
        if rank == 0:
            assert found["loaded"] == (0, "")
            assert found["loaded is trained"]
        assert found["original"] == found["compiled"] == (0, "")


def test_checksums_tell_places_apart_and_see_every_bit() -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 7, 41, 53, generator=generator)
    first, second, rest = images.flatten().tensor_split([4096, 8192])
    moved = (images.flip(3), images.flip(2), images.flip(0), images.roll(1, 3), torch.cat([second, first, rest]))
    for other in (*moved, images + 0.5):
        assert checksums.exact(other) != checksums.exact(images)
        assert not checksums.agree(_floats(other.view(images.shape)), _floats(images))
    assert checksums.exact(images.clone()) == checksums.exact(images)
    assert checksums.exact(images.to(memory_format=torch.channels_last)) != checksums.exact(images)
    assert checksums.agree(_floats(images * (1 + 1e-6)), _floats(images))
    assert checksums.agree(_floats(images * math.nan), _floats(images * math.nan))
    assert not checksums.agree(_floats(images * math.nan), _floats(images))
    for index in torch.randint(images.numel(), (200,), generator=generator).tolist():
        changed = images.clone()
        changed.view(torch.int32).view(-1)[index] ^= 1
        assert checksums.exact(changed) != checksums.exact(images)


def _floats(tensor: Tensor) -> tuple[float, float]:
    projection, squares = checksums.rounded(tensor).tolist()
    return projection, squares
