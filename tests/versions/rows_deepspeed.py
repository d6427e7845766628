"""Private names of DeepSpeed: what the package relies upon, checked with the DeepSpeed that is installed."""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.ranks import run_ranks
from tests.versions.rows import relies_on


def _on_ranks() -> None:
    from deepspeed.utils import groups

    from tlgc_mp.engine.start import start_distributed

    start_distributed()
    names = ("_TENSOR_MODEL_PARALLEL_GROUP", "_MODEL_PARALLEL_GROUP", "_DATA_PARALLEL_GROUP")
    others = ("mpu", "mesh_device", "_WORLD_GROUP", "_ZERO_PARAM_INTRA_PARALLEL_GROUP")
    unset = {name for name in (*names, *others) if vars(groups).get(name, groups) is not None}
    assert not unset, f"deepspeed.utils.groups has no {', '.join(sorted(unset))} that begins as None"
    groups._init_tp_mesh_device(tensor_model_parallel_size=2)
    sizes = [dist.get_world_size(getattr(groups, name)) for name in names]
    assert sizes == [2, 2, 1], f"_init_tp_mesh_device made groups of {sizes} ranks"
    assert groups.get_tensor_model_parallel_group() is groups._TENSOR_MODEL_PARALLEL_GROUP
    other = vars(groups)["_TENSOR_MODEL_PARALLEL_GROUP"] = dist.new_group()
    assert groups.get_tensor_model_parallel_group() is other, "its functions do not read the module's globals"


@relies_on(
    "deepspeed.utils.groups._init_tp_mesh_device",
    "._TENSOR_MODEL_PARALLEL_GROUP",
    "._MODEL_PARALLEL_GROUP",
    "._DATA_PARALLEL_GROUP",
    "._WORLD_GROUP",
    "._ZERO_PARAM_INTRA_PARALLEL_GROUP",
)
def groups_of_an_engine() -> None:
    """Globals of one module, ``None`` until groups are made, that its functions read at each call."""
    run_ranks(2, _on_ranks)


@relies_on(
    "deepspeed.utils.groups._EXPERT_PARALLEL_GROUP.values",
    "._EXPERT_PARALLEL_GROUP",
    "._EXPERT_PARALLEL_GROUP_RANKS",
    "._EXPERT_DATA_PARALLEL_GROUP",
    "._EXPERT_DATA_PARALLEL_GROUP_RANKS",
    "._ALL_TO_ALL_GROUP",
)
def groups_of_experts() -> None:
    """Dicts, which can be emptied."""
    from deepspeed.utils import groups

    for name in ("EXPERT_PARALLEL", "EXPERT_DATA_PARALLEL"):
        for kind in (f"_{name}_GROUP", f"_{name}_GROUP_RANKS"):
            assert isinstance(getattr(groups, kind), dict), kind
    assert isinstance(groups._ALL_TO_ALL_GROUP, dict)


@relies_on("._backward_epilogue", "._consolidated_16bit_state_dict")
def entries_of_an_engine() -> None:
    """Methods of an engine below which it reads its groups."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    for name in ("_backward_epilogue", "_consolidated_16bit_state_dict"):
        assert callable(getattr(DeepSpeedEngine, name)), name


@relies_on("._hp_mapping")
def fragments() -> None:
    """Where ZeRO 1 and 2 keep a parameter's fragment: in which flat tensor, and where in both."""
    from deepspeed.utils import link_hp_params

    parameters: list[Any] = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(5))]
    flat = torch.zeros(4)  # the second rank of three: elements 4 to 7 of 11
    link_hp_params(parameters, flat, {}, {}, False, 1, 4, 4, None)
    first, second = (parameter._hp_mapping for parameter in parameters)
    assert (first.param_group_index, second.param_group_index) == (1, 1)
    places = [(f.lp_fragment_address.start, f.hp_fragment_address.start, f.hp_fragment_address.numel)
              for f in (first, second)]  # fmt: skip
    assert places == [(4, 0, 2), (0, 2, 2)]
    link_hp_params(parameters, flat, {}, {}, False, 1, 0, 4, None)
    assert parameters[1]._hp_mapping is None


@relies_on("._swappable_optimizer_subgroup")
def offloaded_to_nvme() -> None:
    """Whether ZeRO 3 keeps a group of parameters on NVMe: not where nothing is swapped."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    optimizer = types.SimpleNamespace(swap_optimizer=False)
    assert DeepSpeedZeroOptimizer_Stage3._swappable_optimizer_subgroup(optimizer, 0) is False


def _layer() -> Any:
    from deepspeed.module_inject.layers import TensorParallel_Layer

    class Layer(TensorParallel_Layer):
        def __init__(self) -> None:
            super().__init__(None)
            self.tp_world_size, self.support_training = 2, True
            self.weight, self.bias, self.calls = nn.Parameter(torch.ones(4, 3)), None, []

        def forward(self, x: Any) -> Any:
            return x

        def gather_params(self, params_list: Any) -> None:
            self.calls.append(("gather", params_list))

        def _tp_partition(self, params_list: Any) -> None:
            self.calls.append(("partition", params_list))

        def _mark_uc_metadata(self) -> None:
            self._set_param_uc_meta(
                self.weight, partition_type="column", partition_dim=0, logical_shape=(8, 3), original_shape=(8, 3),
                partition_sizes=(4, 4), is_bias=False, replicated=False,
            )  # fmt: skip

    return Layer()


@relies_on("._tp_partition")
def gathered_and_cut_again() -> None:
    """What DeepSpeed calls after a consolidated save, for a parameter that it had gathered."""
    from deepspeed.module_inject.layers import GatherReplacedLayerParams

    layer = _layer()
    layer.config_tp_params(layer.weight)
    with GatherReplacedLayerParams([layer.weight], layer):
        assert [name for name, _ in layer.calls] == ["gather"]
    assert [name for name, _ in layer.calls] == ["gather", "partition"]
    assert layer.calls[1][1][0] is layer.weight


@relies_on("._mark_uc_metadata", "._set_param_uc_meta")
def described_for_checkpoints() -> None:
    """DeepSpeed has every layer describe its split, which this leaves at the parameter."""
    from deepspeed.module_inject.layers import collect_autotp_universal_checkpoint_info

    layer = _layer()
    collect_autotp_universal_checkpoint_info(nn.Sequential(layer))
    described = layer.weight.ds_autotp_universal_checkpoint_meta
    assert described["logical_shape"] == (8, 3) and described["partition_dim"] == 0


@relies_on("._take_model_step")
def step_of_the_model() -> None:
    """Steps the optimizer, then the scheduler that the engine has; ``was_step_applied`` says whether it did."""
    import inspect

    from deepspeed import DeepSpeedEngine

    step = DeepSpeedEngine._take_model_step
    assert list(inspect.signature(step).parameters)[:2] == ["self", "lr_kwargs"]
    assert "self.lr_scheduler is not None" in inspect.getsource(step)
    assert callable(DeepSpeedEngine.was_step_applied)


@relies_on("._external_params", "._original_parameters")
def attributes_of_zero_3() -> None:
    """What ZeRO 3 keeps on modules, and a copy must not."""
    import inspect

    from deepspeed.runtime.zero import parameter_offload, partition_parameters

    module = nn.Module()
    partition_parameters._init_external_params(module)
    assert "_external_params" in vars(module)
    assert "module._original_parameters = module._parameters" in inspect.getsource(parameter_offload)


@relies_on("._link_all_hp_params")
def links_to_full_precision() -> None:
    """Tells each parameter of ZeRO 1 and 2 where its state in full precision lies; takes no arguments."""
    import inspect

    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    assert list(inspect.signature(DeepSpeedZeroOptimizer._link_all_hp_params).parameters) == ["self"]
