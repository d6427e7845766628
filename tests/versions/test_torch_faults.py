"""Where torch itself is wrong on one device, and split tensors are right. A test that passes says that torch has mended
it: what the package does about it can go then."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F


@pytest.mark.xfail(strict=True, reason="batch norm's backward takes a gradient in channels_last for a contiguous one")
def test_the_gradient_of_an_instance_norm_whose_tokens_are_read() -> None:
    """``rules_layers._one_batch`` gives the batch of one, which an instance norm is to torch, the stride of a batch."""
    generator = torch.Generator().manual_seed(0)
    x, tokens = (torch.randn(shape, generator=generator).double() for shape in ((4, 8, 4, 4), (16, 4, 8)))

    def loss(x: torch.Tensor) -> torch.Tensor:
        return (F.instance_norm(x).flatten(2).permute(2, 0, 1) * tokens).sum()

    assert torch.autograd.gradcheck(loss, x.requires_grad_(), raise_exception=False)
