"""The initial weights of a two-level layer make its two terms as large as ``coarse_init`` says.

Unit white noise goes in; He initialization of a group convolution doubles its variance.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tlgc_mp.errors import UsageError
from tlgc_mp.nn import TwoLevelConv2d, TwoLevelPrototypeConv2d

VARIANCES = {"he": (2.0, 4.0), "zero": (2.0, 0.0), "scaled": (1.0, 1.0)}
"""Of the fine and of the coarse term."""


def mean_variances(
    kind: Any, coarse_init: str, kernel_size: int, coarse_kernel_size: int, dial: tuple[int, bool]
) -> tuple[float, float]:
    """Over draws of the weights: a layer's own output varies with its N representatives."""
    fine, coarse = [], []
    for seed in range(40):
        torch.manual_seed(seed)
        layer = kind(
            64,
            64,
            kernel_size,
            groups=8,
            coarse_kernel_size=coarse_kernel_size,
            padding=(kernel_size - 1) // 2,
            coarse_init=coarse_init,
            coarse_channels=dial[0],
            coarse_sum=dial[1],
        )
        x = torch.randn(2, 64, 12, 12)
        whole = layer(x)
        with torch.no_grad():
            layer.restriction.zero_()
        alone = layer(x)
        fine.append(alone.var())
        coarse.append((whole - alone).var())
    return torch.stack(fine).mean().item(), torch.stack(coarse).mean().item()


@pytest.mark.parametrize(("kernel_size", "coarse_kernel_size"), [(3, 3), (3, 1), (1, 1)])
@pytest.mark.parametrize("coarse_init", VARIANCES)
@pytest.mark.parametrize("dial", [(1, False), (3, False), (8, True)])
@pytest.mark.parametrize("kind", [TwoLevelConv2d, TwoLevelPrototypeConv2d], ids=lambda k: k.__name__)
def test_variances_of_the_terms(
    kind: Any, dial: tuple[int, bool], coarse_init: str, kernel_size: int, coarse_kernel_size: int
) -> None:
    fine, coarse = mean_variances(kind, coarse_init, kernel_size, coarse_kernel_size, dial)
    border = 0.9 if kernel_size > 1 else 1.0  # where a kernel reads padding, a term is smaller
    expected_fine, expected_coarse = VARIANCES[coarse_init]
    assert fine == pytest.approx(expected_fine * border, rel=0.15)
    assert coarse == pytest.approx(expected_coarse * (border if coarse_kernel_size > 1 else 1.0), rel=0.25)


def test_an_unknown_one_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^coarse_init must be one of zero, scaled, he, got 'small'$"):
        TwoLevelConv2d(8, 8, 3, groups=2, coarse_init="small")
