"""torch's own operator database gives on split tensors what it gives on plain ones."""

from __future__ import annotations

import pytest

from tests.parallel.operators import OK, computed, database, failures, run

SPREAD = """
sgn cumulative_trapezoid cumprod nn.functional.one_hot
add div.no_rounding_mode addcmul where masked_fill clamp pow sum mean amax var std_mean prod argmax cumsum softmax
log_softmax logsumexp norm sort topk cat stack chunk split view reshape permute transpose squeeze expand narrow
unfold flip roll repeat index_select index_put gather scatter_add __getitem__ select_scatter matmul bmm einsum addmm
linalg.vector_norm linalg.inv fft.fft nn.functional.conv2d nn.functional.conv_transpose2d nn.functional.batch_norm
nn.functional.group_norm nn.functional.layer_norm nn.functional.instance_norm nn.functional.max_pool2d
nn.functional.avg_pool2d nn.functional.adaptive_avg_pool2d nn.functional.interpolate.bilinear
nn.functional.pad.constant nn.functional.dropout nn.functional.relu nn.functional.gelu nn.functional.prelu
nn.functional.hardswish nn.functional.hardtanh nn.functional.mish
nn.functional.normalize nn.functional.cross_entropy nn.functional.linear nn.functional.embedding bernoulli rand_like
"""
PARTS = 14


def test_a_spread_of_operators() -> None:
    records = run(tuple(SPREAD.split()), 2, quick=True)
    assert not failures(records)
    assert not [name for name, record in records.items() if not record.kinds[OK]]
    assert {"add", "relu", "hardswish_backward", "convolution", "cat", "sum"} <= {
        name for name, counts in computed(records).items() if counts["shares"]
    }


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("size", [2, 3])
def test_the_database(size: int, part: int) -> None:
    assert not failures(run(tuple(database())[part::PARTS], size, timeout=1100.0))
