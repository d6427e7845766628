"""Evaluation counts every sample exactly once, with as many equal batches on every replica."""

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tlgc_mp.data import EvaluationBatches


class Numbered(Dataset[tuple[Tensor, int]]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((3, 2, 2), float(index)), index


@pytest.mark.parametrize("length", [1, 11, 23, 24, 25, 50])
@pytest.mark.parametrize(("batch_size", "replicas"), [(4, 1), (4, 3), (8, 3), (5, 4)])
def test_each_sample_counts_once(length: int, batch_size: int, replicas: int) -> None:
    parts = [
        EvaluationBatches(Numbered(length), batch_size=batch_size, rank=rank, replicas=replicas)
        for rank in range(replicas)
    ]
    counted = []
    for part in parts:
        seen = list(part)
        assert len(seen) == len(part) == -(-length // (batch_size * replicas))
        for images, labels, weights in seen:
            assert images.shape == (batch_size, 3, 2, 2) and images.is_contiguous(memory_format=torch.channels_last)
            assert labels.dtype == torch.int64 and torch.equal(images[:, 0, 0, 0], labels.float())
            assert weights.shape == (batch_size,) and weights.dtype == torch.float32
            assert set(weights.tolist()) <= {0.0, 1.0}
            counted += labels[weights == 1].tolist()
    assert sorted(counted) == list(range(length))


def test_every_pass_is_the_same_and_leaves_the_random_state() -> None:
    part = EvaluationBatches(Numbered(10), batch_size=3, rank=1, replicas=2)
    state = torch.get_rng_state()
    first, second = list(part), list(part)
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
