"""A model whose forward pass mixes split channels between layers is refused by name, at its first pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from tests.parallel.common import SEED, relative_error, run_ranks_once
from tlgc_mp import UsageError
from tlgc_mp.parallel import shard


class Between(nn.Module):
    """A stem, ``middle`` as a function of its 8 channels, and a head that takes what comes out."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.middle = middle
        self.stem = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        channels = torch.cat([images[:, 0:1], images[:, 1:]], 1)  # not split yet
        x = self.middle(self.stem(channels))
        logits = self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return torch.cat([logits.narrow(1, 0, 4), logits[:, 4:]], dim=1)  # not split any more


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "cat": lambda x: torch.cat([x[:, :, ::2], x[:, :, ::2]], dim=1),
    "concat": lambda x: torch.concat((x, x), -3),
    "chunk": lambda x: x.chunk(2, 1)[0],
    "split": lambda x: torch.split(x, 2, dim=1)[0],
    "narrow": lambda x: x.narrow(1, 0, 2),
    "__getitem__": lambda x: x[:, :2],
    "mean": lambda x: x * x.mean((1, 2), keepdim=True),
    "softmax": lambda x: F.softmax(x, dim=1),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 2),
}
LOCAL: dict[str, Callable[[Tensor], Tensor]] = {
    "cat of rows": lambda x: torch.cat([x, x], dim=2),
    "chunk of images": lambda x: torch.cat(x.chunk(2)),
    "rows": lambda x: x[:, :, 1:] + x[..., 1:, :],
    "mean over positions": lambda x: x * x.mean((2, 3), keepdim=True),
    "softmax over positions": lambda x: F.softmax(x.flatten(2), dim=-1).view_as(x),
}


def _one(middle: Callable[[Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(SEED)
    return Between(middle).double()


def _images() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)


def _refusals() -> dict[str, str]:
    messages = {}
    for name, middle in MIXING.items():
        model = shard(_one(middle))
        with pytest.raises(UsageError) as caught:
            model(_images())
        messages[name] = str(caught.value)
        assert not _hooks(model)
    return messages


def _hooks(model: nn.Module) -> list[Any]:
    return [hook for module in model.modules() for hook in (*module._forward_pre_hooks, *module._forward_hooks)]


@pytest.mark.parametrize("name", MIXING)
def test_refused_by_name(name: str) -> None:
    for messages in run_ranks_once(2, _refusals):
        assert messages[name] == (
            f"the model: {name} along the channels gives something else where they are split over ranks; "
            "use a model without, or tensor_parallel=1"
        )


def _local() -> dict[str, Tensor]:
    answers = {}
    for name, middle in LOCAL.items():
        model = shard(_one(middle))
        answers[name] = model(_images()).detach()
        assert not _hooks(model), "later passes are watched"
        torch.testing.assert_close(model(_images()), answers[name])
    return answers


@pytest.mark.parametrize("name", LOCAL)
def test_what_is_the_same_for_a_share_passes(name: str) -> None:
    expected = _one(LOCAL[name])(_images())
    for answers in run_ranks_once(2, _local):
        assert relative_error(answers[name], expected) < 1e-12


NETWORKS: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "densenet121": (torchvision.models.densenet121, "features.denseblock1.denselayer1: cat "),
    "shufflenet_v2_x0_5": (torchvision.models.shufflenet_v2_x0_5, "stage2.0: cat "),
}


def _networks() -> dict[str, str]:
    messages = {}
    for name, (make, _) in NETWORKS.items():
        model = shard(make(num_classes=10))
        with pytest.raises(UsageError) as caught:
            model(torch.randn(2, 3, 64, 64))
        messages[name] = str(caught.value)
    return messages


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_that_join_channels(name: str) -> None:
    for messages in run_ranks_once(2, _networks):
        assert messages[name].startswith(NETWORKS[name][1])


def _alone() -> int:
    return len(_hooks(shard(_one(MIXING["cat"]))))


def test_one_rank_is_not_watched() -> None:
    assert run_ranks_once(1, _alone) == [0]
