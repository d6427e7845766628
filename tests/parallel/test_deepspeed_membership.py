"""What DeepSpeed sees of a split model: layers, marks, saved weights, communication log, checkpoint metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.parallel.common import batches, run_ranks_once, seeded_model
from tlgc_mp.engine import initialize
from tlgc_mp.parallel import gather_state_dict

RANKS, GROUPS, BATCH = 2, 4, 8
STEPS = 2


def _engine(stage: int) -> Any:
    settings = {
        "train_batch_size": BATCH,
        "tensor_parallel": {"autotp_size": RANKS},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "comms_logger": {"enabled": True, "prof_all": True},
    }
    model = seeded_model("gc-2l", GROUPS, torch.float32, "meta")
    engine, *_ = initialize(model=model, optimizer=lambda p: torch.optim.SGD(p, lr=0.01), config=settings)
    return engine


def _train(engine: Any) -> None:
    for images, labels in batches(STEPS, BATCH, torch.float32):
        engine.backward(F.cross_entropy(engine(images), labels))
        engine.step()


def _saved_weights(folder: str) -> dict[int, dict[str, dict[str, Tensor]]]:
    """ZeRO stage -> the model's whole state, what the engine consolidates of it, and what it writes (on rank 0)."""
    states = {}
    for stage in (0, 1, 2, 3):
        engine = _engine(stage)
        _train(engine)
        consolidated = engine._consolidated_16bit_state_dict()
        assert engine.save_16bit_model(folder, f"{stage}.bin")
        states[stage] = {"whole": gather_state_dict(engine.module), "consolidated": consolidated}
        if dist.get_rank() == 0:
            states[stage]["written"] = torch.load(Path(folder, f"{stage}.bin"))
    return states


def _membership() -> dict[str, Any]:
    from deepspeed.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO
    from deepspeed.comm.comm import comms_logger
    from deepspeed.module_inject.layers import TensorParallel_Layer

    engine = _engine(0)
    comms_logger.reset_data()
    _train(engine)
    module = engine.module
    logged = {
        name: {size: entry[0] for size, entry in by_size.items()} for name, by_size in comms_logger.comms_dict.items()
    }
    filters = [param for param in module.parameters() if param.dim() == 4]
    return {
        "filters channels_last": [param.is_contiguous(memory_format=torch.channels_last) for param in filters],
        "foreign layers": [
            name
            for name, layer in module.named_modules()
            if any(True for _ in layer.parameters(recurse=False)) and not isinstance(layer, TensorParallel_Layer)
        ],
        "marked": {name for name, param in module.named_parameters() if getattr(param, "tensor_model_parallel", False)},
        "all": {name for name, _ in module.named_parameters()},
        "logged": logged,
        "universal": getattr(module, UNIVERSAL_CHECKPOINT_INFO),
        "described": {
            name: param.ds_autotp_universal_checkpoint_meta["logical_shape"]
            for name, param in module.named_parameters()
        },
    }


def test_every_layer_with_parameters_is_one_of_deepspeeds() -> None:
    for found in run_ranks_once(RANKS, _membership):
        assert found["foreign layers"] == []


def test_filters_are_channels_last_without_zero() -> None:
    for found in run_ranks_once(RANKS, _membership):
        assert len(found["filters channels_last"]) > 10
        assert all(found["filters channels_last"])


def test_all_but_the_bias_of_the_head_is_marked_as_split() -> None:
    for found in run_ranks_once(RANKS, _membership):
        assert found["all"] - found["marked"] == {"head.bias"}
        assert len(found["all"]) > 20


def test_coarse_collectives_are_in_the_communication_log() -> None:
    """Of each of the three stages, at 8 x 8, 4 x 4 and 2 x 2 positions: three layers."""
    full = [BATCH * GROUPS * side * side * 4 for side in (8, 4, 2)]
    for found in run_ranks_once(RANKS, _membership):
        assert found["logged"]["all_gather_into_tensor"] == {size // RANKS: 3 * STEPS for size in full}
        assert found["logged"]["reduce_scatter_tensor"] == {size: 3 * STEPS for size in full}
        assert found["logged"]["all_reduce"][BATCH * 10 * 4] == STEPS


def test_checkpoint_metadata_describes_every_split() -> None:
    shapes = {n: tuple(p.shape) for n, p in seeded_model("gc-2l", GROUPS, torch.float32, "meta").named_parameters()}
    for found in run_ranks_once(RANKS, _membership):
        universal = found["universal"]
        assert found["described"] == shapes
        assert universal["parameter_with_row_parallelism_patterns"] == [r"^head\.weight$"]
        assert universal["tp_replicated_parameter_patterns"] == [r"^head\.bias$"]
        assert not universal["autotp_unsupported_parameter_patterns"]
        pieces = universal["affine_map"]["params"]["^units\\.0\\.conv1\\.prolongation$"]
        assert pieces["logical_shape"] == [32, GROUPS]
        assert [pieces["ranks"][rank]["shard_shape"] for rank in range(RANKS)] == [[16, GROUPS]] * RANKS


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, dict[str, Tensor]]]:
    return run_ranks_once(RANKS, _saved_weights, str(tmp_path_factory.mktemp("weights")))[0]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_consolidated_parameters_are_whole(saved: dict[int, dict[str, dict[str, Tensor]]], stage: int) -> None:
    names = [name for name, _ in seeded_model("gc-2l", GROUPS, torch.float32, "meta").named_parameters()]
    assert set(names) <= set(saved[stage]["consolidated"])
    differing = [n for n in names if not torch.equal(saved[stage]["consolidated"][n], saved[stage]["whole"][n])]
    assert not differing


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_saved_16bit_model_loads_on_one_device(saved: dict[int, dict[str, dict[str, Tensor]]], stage: int) -> None:
    one_device = seeded_model("gc-2l", GROUPS, torch.float32, "cpu")
    one_device.load_state_dict(saved[stage]["written"])
    state = one_device.state_dict()
    differing = [name for name, value in state.items() if not torch.equal(value, saved[stage]["whole"][name])]
    assert not differing
