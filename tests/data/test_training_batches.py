"""What a replica trains on follows from (seed, epoch, sample index), and from nothing else."""

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tlgc_mp.data import TrainingBatches
from tlgc_mp.errors import UsageError

Drawn = list[tuple[int, float]]


class Recorded(Dataset[tuple[Tensor, int]]):
    """Item ``i`` is labelled ``i``; its image is one number drawn at random, as augmentation would."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.rand(()).expand(3, 4, 4), index


def batches(length: int = 50, *, batch_size: int = 8, seed: int = 0, rank: int = 0, replicas: int = 1):
    return TrainingBatches(Recorded(length), batch_size=batch_size, seed=seed, rank=rank, replicas=replicas)


def drawn(source: TrainingBatches, epoch: int, start: int = 0) -> list[Drawn]:
    """The (index, random number) pairs of each batch."""
    return [
        list(zip(labels.tolist(), images[:, 0, 0, 0].tolist(), strict=True))
        for images, labels in source.epoch(epoch, start)
    ]


def test_an_epoch_is_a_shuffle_without_the_ragged_end() -> None:
    source = batches(50, batch_size=8)
    seen = drawn(source, 0)
    assert len(source) == len(seen) == 6 and all(len(batch) == 8 for batch in seen)
    indices = [index for batch in seen for index, _ in batch]
    assert len(set(indices)) == 48 and set(indices) <= set(range(50)) and indices != sorted(indices)
    assert len({number for batch in seen for _, number in batch}) == 48


def test_same_seed_and_epoch_give_the_same_batches() -> None:
    source = batches(seed=3)
    first = drawn(source, 2)
    assert drawn(source, 2) == first
    assert drawn(batches(seed=3), 2) == first


@pytest.mark.parametrize(("seed", "epoch"), [(4, 2), (3, 1)])
def test_another_seed_or_epoch_gives_another_order_and_other_augmentation(seed: int, epoch: int) -> None:
    first = [pair for batch in drawn(batches(seed=3), 2) for pair in batch]
    second = [pair for batch in drawn(batches(seed=seed), epoch) for pair in batch]
    assert [index for index, _ in first] != [index for index, _ in second]
    numbers = dict(first)
    assert all(numbers.get(index) != number for index, number in second)


@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_replicas_share_the_global_batches_of_a_single_one(replicas: int) -> None:
    whole = drawn(batches(100, batch_size=24), 1)
    parts = [drawn(batches(100, batch_size=24 // replicas, rank=r, replicas=replicas), 1) for r in range(replicas)]
    assert all(len(part) == len(whole) == 4 for part in parts)
    for number, batch in enumerate(whole):
        # As sorted lists: a sample drawn by two replicas would appear twice.
        assert sorted(pair for part in parts for pair in part[number]) == sorted(batch)


def test_start_gives_the_tail_of_the_epoch() -> None:
    source = batches()
    whole = drawn(source, 5)
    for start in range(len(source) + 1):
        assert drawn(source, 5, start) == whole[start:]


def test_epochs_asked_for_before_they_are_read_are_not_confused() -> None:
    source = batches()
    expected = drawn(source, 0)
    first = source.epoch(0)
    source.epoch(1, start=2)
    assert [labels.tolist() for _, labels in first] == [[index for index, _ in batch] for batch in expected]


def test_global_random_state_is_neither_used_nor_changed() -> None:
    torch.manual_seed(0)
    first = drawn(batches(), 0)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert drawn(batches(), 0) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_images_are_channels_last() -> None:
    images, labels = next(batches().epoch(0))
    assert images.shape == (8, 3, 4, 4) and images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.shape == (8,) and labels.dtype == torch.int64


def test_data_set_smaller_than_a_global_batch() -> None:
    assert len(batches(16, batch_size=8, replicas=2)) == 1
    with pytest.raises(
        UsageError, match="batch_size x replicas must be 15 or less, the samples of the training set, got 8 x 2"
    ):
        batches(15, batch_size=8, replicas=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"rank": 2, "replicas": 2}, "rank must be 0 to 1, one of 2 replicas, got 2"),
        ({"rank": -1}, "rank must be 0 to 0, one of 1 replicas, got -1"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        batches(**arguments)


@pytest.mark.parametrize("start", [-1, 7])
def test_start_outside_the_epoch(start: int) -> None:
    with pytest.raises(UsageError, match=rf"start must be 0 to 6, a batch of the epoch, got {start}$"):
        batches().epoch(0, start)
