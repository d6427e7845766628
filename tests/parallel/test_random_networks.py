"""Random networks over the layers of torch.nn and code between them: split, they give what one device gives."""

from __future__ import annotations

import inspect

import pytest
from torch import nn

from tests.parallel import random_code, random_layers, random_modules, random_operators
from tests.parallel.common import run_ranks_once
from tests.parallel.random_layers import PIECES
from tests.parallel.random_networks import run_on_rank
from tests.ranks import run_ranks

IN_EVERY_RUN = tuple(range(1000, 1030))
BATCH, BATCHES = 25, 42

NOT_DRAWN = {
    "by what holds them": "Module Container Sequential ModuleList ModuleDict ParameterList ParameterDict DataParallel",
    "losses, of which the heads draw one": "L1Loss NLLLoss NLLLoss2d PoissonNLLLoss GaussianNLLLoss KLDivLoss MSELoss "
    "BCELoss BCEWithLogitsLoss HingeEmbeddingLoss MultiLabelMarginLoss SmoothL1Loss HuberLoss SoftMarginLoss "
    "CrossEntropyLoss MultiLabelSoftMarginLoss CosineEmbeddingLoss MarginRankingLoss MultiMarginLoss "
    "TripletMarginLoss TripletMarginWithDistanceLoss CTCLoss AdaptiveLogSoftmaxWithLoss LinearCrossEntropyLoss",
    "made of those that are drawn": "Transformer TransformerEncoder TransformerDecoder RNNBase RNNCellBase",
    "on accelerators only": "SyncBatchNorm",
}
"""Why -> classes of torch.nn that no piece is made of. Lazy ones become the others with their first batch."""


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_networks_in_every_run(ranks: int) -> None:
    _assert_exact(run_ranks_once(ranks, run_on_rank, IN_EVERY_RUN)[0])


def test_every_piece_over_two_ranks() -> None:
    _assert_exact(run_ranks(2, run_on_rank, tuple(sorted(PIECES)), timeout=250.0)[0])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [3, 4])
def test_every_piece(ranks: int) -> None:
    _assert_exact(run_ranks(ranks, run_on_rank, tuple(sorted(PIECES)), timeout=1700.0)[0])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("batch", range(BATCHES))
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_many_networks(ranks: int, batch: int) -> None:
    seeds = tuple(range(BATCH * batch, BATCH * (batch + 1)))
    _assert_exact(run_ranks(ranks, run_on_rank, seeds, timeout=1700.0)[0])


def _assert_exact(results: dict[int | str, str]) -> None:
    skipped = [seed for seed, text in results.items() if text.startswith("skipped")]
    failures = [text for seed, text in results.items() if text and seed not in skipped]
    assert not failures, "\n".join(failures)
    assert len(skipped) <= len(results) // 5, f"one device does not run the networks of seeds {skipped}"


def test_every_layer_of_torch_is_drawn() -> None:
    sources = "".join(inspect.getsource(m) for m in (random_layers, random_modules, random_code, random_operators))
    excluded = {name for names in NOT_DRAWN.values() for name in names.split()}
    missing = []
    for name, value in vars(nn).items():
        if isinstance(value, type) and issubclass(value, nn.Module) and not name.startswith("Lazy"):
            stem = name[:-2] if name[-2:] in ("1d", "2d", "3d") else name
            if name not in excluded and f"nn.{name}" not in sources and f'"{stem}"' not in sources:
                missing.append(name)
    assert not missing
