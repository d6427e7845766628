"""Every public function refuses an argument of a wrong kind or value by its name, and not with an error from within."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tlgc_mp
import tlgc_mp.checkpoint
import tlgc_mp.data
import tlgc_mp.models
import tlgc_mp.nn
import tlgc_mp.parallel
from tests.ranks import run_ranks
from tlgc_mp.errors import UsageError

CONFIG = {"train_batch_size": 1}


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))


class Eight:
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(3, 4, 4), 0


def batches(**changes: Any) -> tlgc_mp.data.TrainingBatches:
    arguments: dict[str, Any] = {"batch_size": 1, "seed": 0, "rank": 0, "replicas": 1, **changes}
    return tlgc_mp.data.TrainingBatches(arguments.pop("dataset", Eight()), **arguments)


def create(name: Any = "wrn-10-1", **arguments: Any) -> Callable[[], Any]:
    return lambda: tlgc_mp.create_model(name, **arguments)


def convert(model: Any = None, **arguments: Any) -> Callable[[], Any]:
    return lambda: tlgc_mp.convert(network() if model is None else model, **{"groups": 2, **arguments})


def initialize(**arguments: Any) -> Callable[[], Any]:
    return lambda: tlgc_mp.initialize(**{"model": network(), "config": CONFIG, **arguments})


def datasets(**arguments: Any) -> Callable[[], Any]:
    return lambda: tlgc_mp.data.load_datasets("synthetic", None, **{"seed": 0, **arguments})


def layers(**arguments: Any) -> list[Callable[[], Any]]:
    given = {"in_channels": 8, "out_channels": 8, "kernel_size": 3, "groups": 2, **arguments}
    kinds: list[Any] = [
        tlgc_mp.nn.TwoLevelConv2d,
        tlgc_mp.nn.TwoLevelPrototypeConv2d,
        tlgc_mp.nn.ShuffleConv2d,
        tlgc_mp.nn.FullyLearnableGroupConv2d,
    ]
    return [lambda kind=kind: kind(**given) for kind in kinds]  # type: ignore[misc]


def deep(levels: int) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for _ in range(levels):
        settings = {"a": settings}
    return settings


def permuted(**changes: Any) -> Callable[[], Any]:
    tensors = {"weight": torch.zeros(4, 2, 3, 3), "bias": None}
    orders = {"input_order": torch.arange(4), "output_order": torch.arange(4)}
    window = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 2}
    arguments: dict[str, Any] = {**tensors, **orders, **window, **changes}
    return lambda: tlgc_mp.nn.PermutedGroupConv2d(**arguments)


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (create(5), "model=5 is unknown"),
    (create(["wrn-10-1"]), "model=['wrn-10-1'] is unknown"),
    (create(conv=None), "conv=None is unknown"),
    (create(groups="4"), "groups='4' does not divide the stem's 16 channels; use one of 1, 2, 4, 8, 16"),
    (create(groups=4.0), "groups=4.0 does not divide"),
    (create(groups=True), "groups=True does not divide"),
    (create(num_classes="ten"), "num_classes='ten' is not a number of classes"),
    (create(num_classes=10**9), "num_classes=1000000000 is too large; use 1000000 or less"),
    (create(coarse_kernel_size="3"), "coarse_kernel_size='3' cannot be centred"),
    (create("mobilenet_v2", coarse_everywhere="yes", groups=2), "coarse_everywhere='yes' is not True or False"),
    (create(device="gpu"), "device='gpu' is none; use 'cpu', 'cuda' or 'meta', say"),
    (create(device=[5]), "device=[5] is none"),
    (convert("network"), "model: a str is none; give a torch.nn.Module"),
    (convert(conv=[]), "conv=[] is unknown"),
    (convert(init=[]), "init=[] is unknown"),
    (convert(where=5), "where=5 is neither a function of (name, layer) nor a pattern"),
    (convert(where=lambda: True), "cannot be called with (name, layer); give a function of those two"),
    (convert(where="["), "where='[': none of its 2 convolutions can be replaced"),
    (convert(where=lambda name, layer: []), "none of its 2 convolutions can be replaced"),
    (lambda: tlgc_mp.fold("network"), "model: a str is none; give a torch.nn.Module"),  # type: ignore[arg-type]
    (lambda: tlgc_mp.shard(None), "model: a NoneType is none; give a torch.nn.Module"),  # type: ignore[arg-type]
    (lambda: tlgc_mp.shard(network()), "shard: torch.distributed is not initialized; call "),
    (lambda: tlgc_mp.shard(network(), device="gpu"), "device='gpu' is none"),
    (lambda: tlgc_mp.shard(network(), seed="x"), "seed='x' is no seed; use an int"),  # type: ignore[arg-type]
    (lambda: tlgc_mp.parallel.gather_state_dict(5), "model: a int is none"),  # type: ignore[arg-type]
    (lambda: tlgc_mp.checkpoint_activations(network(), 5), "blocks=5 are no classes"),  # type: ignore[arg-type]
    (lambda: tlgc_mp.checkpoint_activations(network(), ()), "blocks=() are no classes"),
    (lambda: tlgc_mp.checkpoint_activations(None), "blocks: NoneType does not say"),  # type: ignore[arg-type]
    (lambda: tlgc_mp.checkpoint_activations(5, nn.ReLU), "model: a int is none"),  # type: ignore[arg-type]
    (initialize(model="network"), "model: a str is none; give a torch.nn.Module"),
    (initialize(config=[]), "config=[] is no configuration; give a dict or the path of a JSON file"),
    (initialize(config=5), "config=5 is no configuration"),
    (initialize(config=b"{}"), "is no configuration"),
    (initialize(config=deep(10_000)), "config: it cannot be copied: maximum recursion depth"),
    (initialize(config={"a": (item for item in ())}), "config: it cannot be copied: cannot pickle 'generator' object"),
    (lambda: tlgc_mp.load_model("weights.safetensors", device="gpu"), "device='gpu' is none"),
    (initialize(config={"tensor_parallel": 2}), "tensor_parallel=2 is not an object"),
    (initialize(config={"zero_optimization": {"stage": {1}}}), 'zero_optimization.stage="{1}" is not a ZeRO stage'),
    (initialize(config={**CONFIG, "gradient_clipping": "auto"}), 'gradient_clipping="auto" in the DeepSpeed conf'),
    (
        initialize(config={**CONFIG, "gradient_clipping": -1}),
        "gradient_clipping=-1 in the DeepSpeed configuration is not",
    ),
    (
        initialize(config={**CONFIG, "gradient_predivide_factor": 0}),
        "gradient_predivide_factor=0 in the DeepSpeed conf",
    ),
    (
        initialize(config={**CONFIG, "steps_per_print": 0.5}),
        "steps_per_print=0.5 in the DeepSpeed configuration is not",
    ),
    (initialize(optimizer="SGD"), "optimizer='SGD' is none; give a torch optimizer, or a callable that makes one"),
    (initialize(lr_scheduler="step"), "lr_scheduler='step' is none"),
    (initialize(model_parameters=5), "model_parameters: give parameters of the model"),
    (initialize(model_parameters={"params": []}), "model_parameters: give parameters of the model"),
    (initialize(model_parameters=[5]), "model_parameters: 5 is no parameter"),
    (initialize(model_parameters=[{"lr": 1.0}]), "model_parameters: {'lr': 1.0} is no parameter, nor a group"),
    (initialize(distributed_port="x"), "distributed_port='x' is no port; use 1 to 65535"),
    (initialize(distributed_port=70000), "distributed_port=70000 is no port"),
    (initialize(seed=1.5), "seed=1.5 is no seed; use an int"),
    *((call, "in_channels=8 is not a number of channels") for call in layers(in_channels="8")),
    *((call, "in_channels=4294967296 is too large") for call in layers(in_channels=2**32)),
    *((call, "groups=True does not divide") for call in layers(groups=True)),
    *((call, "groups=[2] does not divide") for call in layers(groups=[2])),
    *((call, "kernel_size='3' is not a positive int or a pair of them") for call in layers(kernel_size="3")),
    *((call, "kernel_size=0 is not a positive int") for call in layers(kernel_size=0)),
    *((call, "stride=0 is not a positive int") for call in layers(stride=0)),
    *((call, "stride=(1, 1, 1) is not a positive int") for call in layers(stride=(1, 1, 1))),
    *((call, "dilation=-1 is not a positive int") for call in layers(dilation=-1)),
    *((call, "padding='full' is not a non-negative int") for call in layers(padding="full")),
    *((call, "padding=True is not a non-negative int") for call in layers(padding=True)),
    *((call, "padding='same' needs stride 1") for call in layers(padding="same", stride=2)),
    *((call, "dtype='float' is none for weights") for call in layers(dtype="float")),
    *((call, "dtype=torch.int64 is none for weights") for call in layers(dtype=torch.int64)),
    *((call, "device='gpu' is none") for call in layers(device="gpu")),
    *((call, "in_channels, out_channels and kernel_size ask for 8 x 4 x ") for call in layers(kernel_size=2**30)),
    (permuted(weight="x"), "weight: it is no tensor of filters"),
    (permuted(weight=torch.zeros(4, 2)), "weight: it is no tensor of filters"),
    (permuted(input_order=[0, 1]), "input_order: it is no list of channels"),
    (permuted(output_order=torch.zeros(4)), "output_order: it is no list of channels"),
    (permuted(groups=3), "groups=3 does not divide out_channels=4"),
    (permuted(input_order=torch.arange(6)), "input_order: 6 channels; 2 groups read 4"),
    (permuted(bias=torch.zeros(5)), "bias: it is not one number for each of 4 output channels"),
    (lambda: tlgc_mp.nn.init_parameters(None, 0), "model: a NoneType is none"),  # type: ignore[arg-type]
    (lambda: tlgc_mp.nn.init_parameters(network(), "x"), "seed='x' is no seed"),  # type: ignore[arg-type]
    (lambda: tlgc_mp.data.check_dataset([], None), "--dataset [] is unknown"),  # type: ignore[arg-type]
    (lambda: tlgc_mp.data.check_dataset("cifar10", 5), "--data-dir 5 is no path"),  # type: ignore[arg-type]
    (lambda: tlgc_mp.data.check_dataset("imagefolder", "a" * 5000), "cannot be read: File name too long"),
    (lambda: tlgc_mp.data.check_dataset("cifar10", "a" * 5000), "cannot be read: File name too long"),
    (datasets(seed="x"), "seed='x' is no seed; use an int"),
    (datasets(image_size="x"), "image_size='x' is not positive; use 1 or more"),
    (datasets(num_classes=True), "num_classes=True is not positive"),
    (datasets(synthetic_length=1.5), "synthetic_length=1.5 is not positive"),
    (lambda: batches(dataset=None), "dataset: a NoneType has no length or no items"),
    (lambda: batches(dataset=iter([1])), "dataset: a list_iterator has no length or no items"),
    (lambda: batches(batch_size="1"), "batch_size='1' is not positive; use 1 or more"),
    (lambda: batches(batch_size=1.5), "batch_size=1.5 is not positive"),
    (lambda: batches(rank="0"), "rank='0' is not one of 1 replicas; use 0..0"),
    (lambda: batches(replicas=0), "replicas=0 is not positive; use 1 or more"),
    (lambda: batches(num_workers=None), "num_workers=None is negative; use 0 or more"),
    (lambda: batches(seed=None), "seed=None is no seed"),
    (lambda: batches().epoch("x"), "epoch='x' is no epoch; use 0 or more"),  # type: ignore[arg-type]
    (lambda: batches().epoch(0, 1.5), "start=1.5 is not a batch of the epoch; use 0..8"),  # type: ignore[arg-type]
    (
        lambda: tlgc_mp.data.EvaluationBatches(None, batch_size=1, rank=0, replicas=1),  # type: ignore[arg-type]
        "dataset: a NoneType has no length or no items",
    ),
]


@pytest.mark.parametrize(("call", "said"), REFUSED, ids=[f"{n}-{said[:40]}" for n, (_, said) in enumerate(REFUSED)])
def test_refused(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        call()
    assert said in str(caught.value) and str(caught.value).isprintable()


# What DeepSpeed itself makes of a configuration, on a rank of its own.

CONFIGURATIONS: dict[str, Any] = {
    "optimizer of no kind": {**CONFIG, "optimizer": {"type": "Steepest", "params": {"lr": 0.1}}},
    "optimizer with odd arguments": {**CONFIG, "optimizer": {"type": "SGD", "params": {"lr": 0.1, "speed": 1}}},
    "optimizer as text": {**CONFIG, "optimizer": "SGD"},
    "scheduler of no kind": {
        **CONFIG, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "scheduler": {"type": "Never", "params": {}},
    },
    "no batch": {},
    "batch of none": {"train_batch_size": 0},
    "batch as text": {"train_batch_size": "many"},
    "batch of lists": {"train_batch_size": [1]},
    "two batches": {"train_batch_size": 3, "train_micro_batch_size_per_gpu": 2},
    "offload as text": {**CONFIG, "zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}},
    "offload to nowhere": {**CONFIG, "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "moon"}}},
    "a key of ZeRO that is none": {**CONFIG, "zero_optimization": {"stage": 2, "stages": 3}},
    "fp16 and bf16": {**CONFIG, "fp16": {"enabled": True}, "bf16": {"enabled": True}},
    "bf16 as text": {**CONFIG, "bf16": {"enabled": "perhaps"}},
    "autocast of no type": {**CONFIG, "torch_autocast": {"enabled": True, "dtype": "float12"}},
}  # fmt: skip


def refusals() -> dict[str, str]:
    """What ``initialize`` says of each configuration."""
    said = {}
    for name, config in CONFIGURATIONS.items():
        try:
            tlgc_mp.initialize(model=network(), config=config)
            said[name] = "taken"
        except UsageError as error:
            said[name] = str(error)
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


@pytest.mark.timeout(180)
def test_configurations_that_deepspeed_refuses() -> None:
    (said,) = run_ranks(1, refusals)
    assert {name: text for name, text in said.items() if not text.startswith("deepspeed_config is refused by ")} == {}


# A rank that is not in the group.


def outside() -> str:
    import torch.distributed as dist

    group = dist.new_group([0])
    try:
        tlgc_mp.shard(network(), group)
    except UsageError as error:
        return str(error)
    return "taken"


@pytest.mark.timeout(120)
def test_a_rank_outside_the_group_is_told() -> None:
    first, second = run_ranks(2, outside)
    assert first == "taken" and "is none that this rank is in" in second
