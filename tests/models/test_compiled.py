"""torch.compile takes a model of every convolution whole, in training, and gives the same gradients."""

from __future__ import annotations

import pytest
import torch

from tlgc_mp import create_model
from tlgc_mp.models.names import CONVOLUTIONS, TWO_LEVEL

SEED = 59


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("conv", CONVOLUTIONS)
def test_without_a_graph_break(conv: str) -> None:
    torch.manual_seed(SEED)
    init = "scaled" if conv in TWO_LEVEL else "zero"
    model = create_model("wrn-10-1", conv=conv, groups=1 if conv == "sc" else 4, coarse_init=init).double()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    names, params = zip(*model.named_parameters(), strict=True)
    expected = torch.autograd.grad(model(images).square().sum(), params)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(images).square().sum(), params)
    for name, got, want in zip(names, found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}, seed {SEED}: {m}")
