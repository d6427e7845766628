"""Networks from the meta device, split or not, inside the engine or out of it: values of every layer, or an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.parallel.common import SEED, run_ranks_once, sgd
from tlgc_mp import UsageError
from tlgc_mp.engine import initialize
from tlgc_mp.nn import init_parameters
from tlgc_mp.parallel import gather_state_dict, shard


class _Pixels(nn.Module):
    """Computes what it scales by when it is built, and no state dict holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x / self.scale


def _network(*first: nn.Module) -> nn.Module:
    return nn.Sequential(
        *first,
        *(
            nn.Conv2d(3, 8, 3),
            nn.GroupNorm(2, 8),
            nn.ConvTranspose2d(8, 8, 2, stride=2),
            nn.InstanceNorm2d(8, affine=True),
        ),
        *(nn.PReLU(8), nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8), nn.LayerNorm(8)),
        *(nn.Bilinear(2, 2, 8), nn.ModuleDict({"qkv": nn.Linear(8, 24)}), nn.Linear(8, 10)),
    )


def _expected() -> dict[str, Tensor]:
    model = _network()
    init_parameters(model, SEED)
    return model.state_dict()


def _refusal(start: Any) -> str:
    with torch.device("meta"):
        model = _network(_Pixels())
    with pytest.raises(UsageError) as refused:
        start(model)
    return str(refused.value)


def _engine(model: nn.Module) -> nn.Module:
    config = {
        "train_batch_size": 2,
        "tensor_parallel": {"autotp_size": dist.get_world_size()},
        "zero_allow_untested_optimizer": True,
    }
    return initialize(model=model, optimizer=sgd, config=config, seed=SEED)[0].module


def _on_ranks() -> Any:
    states, refusals = [], []
    for start in (lambda model: shard(model, seed=SEED), _engine):
        with torch.device("meta"):
            model = _network()
        states.append(gather_state_dict(start(model)))
        refusals.append(_refusal(start))
    return states, refusals


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_layer_has_the_values_of_one_device(ranks: int) -> None:
    expected = _expected()
    for states, _ in run_ranks_once(ranks, _on_ranks):
        for state in states:
            assert state.keys() == expected.keys()
            assert [name for name in expected if not torch.equal(state[name], expected[name])] == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_buffer_that_nothing_computes_again_is_refused(ranks: int) -> None:
    for _, refusals in run_ranks_once(ranks, _on_ranks):
        for said in refusals:
            assert said == (
                "model: 0, a _Pixels, must have a reset_parameters() that gives scale initial values, got none; write "
                "one, or build the model on a real device"
            )
