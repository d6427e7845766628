"""Code that reads or replaces the memory of a tensor past its operators gets the whole one's, or one clear error."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.parallel.common import run_ranks_once
from tests.parallel.properties import Given, properties_of, run_properties
from tests.ranks import run_ranks
from tlgc_mp.parallel.split_tensor import Ranks, split


def given_numpy_reads_it(given: Given) -> Any:
    x = given(2, 12)
    arrays = np.asarray(x), np.array(x, dtype="f4"), np.stack([x, x[:, :12]]), np.from_dlpack(x), np.add(x.numpy(), 1)
    return [array.tolist() for array in arrays], torch.from_numpy(x.numpy().copy()), x.cpu().numpy().tolist()


def given_torch_reads_it(given: Given) -> Any:
    x = given(2, 12)
    copied = torch.asarray(x, copy=True)
    copied[:, 3] = 0
    return x, copied, torch.tensor(x), torch.as_tensor(x), torch.Tensor(x.float()), x.view(torch.int64), x.nbytes


def given_a_repeated_tensor_is_cut_one_wide(given: Given) -> Any:
    """Of which a share has a stride of zero, and one that says nothing."""
    found = []
    for width in (2, 3):
        x, repeated = given(3, 6, 1, width), given(1, 6, 1, width, dim=3).expand(3, 6, 1, width)
        narrow, other = given(1, width).expand(6, width), given(6, width, dim=0)
        found += [repeated * x, x * repeated, torch.where(repeated > 0, x, 0.0), narrow + other.exp()]
    return found


def given_torch_writes_its_output_unseen(given: Given) -> Any:
    square = given(6, 6)
    split_out, plain_out = given.cut(torch.zeros((), dtype=torch.long), 0), torch.zeros((), dtype=torch.long)
    torch.linalg.matrix_rank(square, out=split_out)
    torch.linalg.matrix_rank(square, out=plain_out)
    return split_out, plain_out


def given_another_process_gets_it(given: Given) -> Any:
    return pickle.loads(bytes(ForkingPickler.dumps(given(2, 12))))


def given_its_memory_is_replaced(given: Given) -> Any:
    x, y, plain = given(2, 12), given(2, 12), given.plain(3, 4)
    written, other = x * 1, x * 1
    view = written[:, 3:9]
    view.set_(plain)  # a view no more
    view.zero_()
    other.set_(plain.clone().untyped_storage(), 2, (2, 4), (4, 1))
    return x.clone().set_(plain), x.clone().set_(y * 2), given.plain(2).set_(y), x.clone().set_(), written, other


def given_its_size_is_set(given: Given) -> Any:
    x = given(2, 12)
    return x.clone().resize_(3, 4), x.clone().resize_(2, 12), x.clone().resize_as_(given.plain(4, 6)), x


def given_a_function_of_python_changes_it(given: Given) -> Any:
    x, plain = given(2, 12), given.plain(2, 12)
    before = plain.clone()
    seen: list[float] = []
    part = x[:, 2:7]
    part.apply_(lambda value: seen.append(value) or value + 1)  # type: ignore[func-returns-value]
    plain.apply_(lambda value: value * 2)
    mapped = plain.clone().map_(before, lambda a, b: a - b)
    return x, part, seen, plain, mapped


def given_a_leaf_is_not_changed_by_a_function_of_python(given: Given) -> Any:
    with pytest.raises(RuntimeError, match=r"Can't call apply_\(\) on Variable that requires grad"):
        given.leaf(2, 12).apply_(lambda value: value)
    return given.leaf(2, 12) * 1


NAMES = list(properties_of(sys.modules[__name__]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [2, 3])
def test_property(size: int, name: str) -> None:
    """As on one device over two and three ranks: values, strides, gradients, and the random numbers taken."""
    problem = run_ranks_once(size, run_properties, __name__)[0][name]
    assert not problem, problem


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "data_ptr": lambda x: x.data_ptr(),
    "const_data_ptr": lambda x: x.const_data_ptr(),  # type: ignore[attr-defined]
    "mutable_data_ptr": lambda x: x.mutable_data_ptr(),  # type: ignore[attr-defined]
    "untyped_storage": lambda x: x.untyped_storage(),
    "storage": lambda x: x.storage(),
    "share_memory_": lambda x: x.share_memory_(),
    "is_shared": lambda x: x.is_shared(),
}


def _refusals() -> dict[str, str]:
    import torch.distributed as dist

    ranks, found = Ranks(dist.new_group()), {}
    for name, read in REFUSED.items():
        for tensor in (split(torch.arange(24.0).view(2, 12), 1, ranks), split(torch.ones(2), 0, ranks).sum()):
            try:
                read(tensor)
                found[name, tensor.dim()] = "nothing"
            except RuntimeError as error:
                found[name, tensor.dim()] = str(error)
    return {f"{name} of {dim} dimensions": message for (name, dim), message in found.items()}


def test_what_has_no_answer_says_what_to_do() -> None:
    """Without waiting for other ranks, and without an address that is not there."""
    advice = "a split tensor has no memory of its own; use tlgc_mp.parallel.split_tensor.whole(tensor) first"
    for found in run_ranks(2, _refusals):
        assert found == {f"{name} of {dim} dimensions": advice for name in REFUSED for dim in (2, 0)}
