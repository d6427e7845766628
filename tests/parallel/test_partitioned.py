"""A weight that is read where ZeRO 3 has it in pieces is refused: it would be empty."""

from __future__ import annotations

import deepspeed
import torch

from tests.networks import engine_of
from tests.parallel.common import run_ranks_once
from tlgc_mp.errors import UsageError
from tlgc_mp.parallel import gather_state_dict, whole
from tlgc_mp.parallel.sharded import ShardedLayer


def _read() -> tuple[int, set[str]]:
    engine = engine_of("test_resnet", 2, 3)
    model = engine.module
    state = gather_state_dict(model)
    said: set[str] = set()
    found = 0
    for name, layer in model.named_modules():
        if not isinstance(layer, ShardedLayer):
            continue
        for key in layer.tlgc_placement.dims:
            if layer._parameters.get(key) is None:
                continue
            found += 1
            assert getattr(layer, key).requires_grad
            for read in (torch.linalg.vector_norm, torch.sum, lambda weight: weight * 2, lambda weight: weight.shape):
                try:
                    read(getattr(layer, key))
                except UsageError as error:
                    said.add(str(error))
                else:
                    raise AssertionError(f"{name}.{key} was read")
            with deepspeed.zero.GatheredParameters(list(layer.parameters())):
                torch.testing.assert_close(whole(getattr(layer, key)), state[f"{name}.{key}"], rtol=0, atol=0)
    repr(model)
    return found, said


def test_a_partitioned_weight_is_not_read() -> None:
    for found, said in run_ranks_once(2, _read):
        assert found > 10
        assert (
            "weight of a split Conv2d must be read within a pass of the model at ZeRO 3, got it partitioned; read it"
            in {text[: text.index(" within deepspeed")] for text in said}
        )
