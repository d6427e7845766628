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
    (create(5), "got 5; use e.g. wrn-28-10"),
    (create(["wrn-10-1"]), "got ['wrn-10-1']; use e.g. wrn-28-10"),
    (create(conv=None), "conv must be one of sc, gc, gc-2l, gc-2l-proto, shuffle, flgc, bgc, got None"),
    (create(groups="4"), "groups must be a divisor of the stem's 16 channels, got '4'; use one of 1, 2, 4, 8, 16"),
    (create(groups=4.0), "got 4.0; use one of"),
    (create(groups=True), "got True; use one of"),
    (create(num_classes="ten"), "num_classes must be 1 or more, got 'ten'"),
    (create(num_classes=10**9), "num_classes must be 1000000 or less, got 1000000000"),
    (create(coarse_kernel_size="3"), "coarse_kernel_size must be odd, to be centred on kernels of 1 and 3, got '3'"),
    (create("mobilenet_v2", coarse_everywhere="yes", groups=2), "coarse_everywhere must be True or False, got 'yes'"),
    (create(device="gpu"), "device must be a device that torch knows, got 'gpu'"),
    (create(device=[5]), "device must be a device that torch knows, got [5]"),
    (convert("network"), "model must be a torch.nn.Module, got str"),
    (convert(conv=[]), "conv must be one of gc, gc-2l, gc-2l-proto, shuffle, flgc, bgc, got []"),
    (convert(init=[]), "init must be one of random, from_dense, got []"),
    (convert(where=5), "where must be a function of (name, layer), or a pattern, got 5"),
    (convert(where=lambda: True), "where must be a function of (name, layer), got <function"),
    (convert(where="["), "where must select layers, got '[': none of its 2 convolutions can be replaced"),
    (convert(where=lambda name, layer: []), "none of its 2 convolutions can be replaced"),
    (lambda: tlgc_mp.fold("network"), "model must be a torch.nn.Module, got str"),  # type: ignore[arg-type]
    (lambda: tlgc_mp.shard(None), "model must be a torch.nn.Module, got NoneType"),  # type: ignore[arg-type]
    (lambda: tlgc_mp.shard(network()), "torch.distributed must be initialized; call "),
    (lambda: tlgc_mp.shard(network(), device="gpu"), "device must be a device that torch knows, got 'gpu'"),
    (lambda: tlgc_mp.shard(network(), seed="x"), "seed must be an int, got 'x'"),  # type: ignore[arg-type]
    (lambda: tlgc_mp.parallel.gather_state_dict(5), "model must be a torch.nn.Module, got int"),  # type: ignore[arg-type]
    (
        lambda: tlgc_mp.checkpoint_activations(network(), 5),
        "blocks must be a class of modules, or a tuple of them, got 5",
    ),  # type: ignore[arg-type]
    (
        lambda: tlgc_mp.checkpoint_activations(network(), ()),
        "blocks must be a class of modules, or a tuple of them, got ()",
    ),
    (lambda: tlgc_mp.checkpoint_activations(None), "blocks must be given for a NoneType, got none"),  # type: ignore[arg-type]
    (lambda: tlgc_mp.checkpoint_activations(5, nn.ReLU), "model must be a torch.nn.Module, got int"),  # type: ignore[arg-type]
    (initialize(model="network"), "model must be a torch.nn.Module, got str"),
    (initialize(config=[]), "config must be a dict, or the path of a JSON file, got []"),
    (initialize(config=5), "config must be a dict, or the path of a JSON file, got 5"),
    (initialize(config=b"{}"), "config must be a dict, or the path of a JSON file, got b'{}'"),
    (
        initialize(config=deep(10_000)),
        "config must be what a JSON file can hold, got an error in copying it: maximum recursion depth",
    ),
    (
        initialize(config={"a": (item for item in ())}),
        "config must be what a JSON file can hold, got an error in copying it: cannot pickle 'generator' object",
    ),
    (
        lambda: tlgc_mp.load_model("weights.safetensors", device="gpu"),
        "device must be a device that torch knows, got 'gpu'",
    ),
    (
        initialize(config={"tensor_parallel": 2}),
        'tensor_parallel in the DeepSpeed configuration must be {"autotp_size": P}, got 2',
    ),
    (
        initialize(config={"zero_optimization": {"stage": {1}}}),
        'zero_optimization.stage in the DeepSpeed configuration must be 0, 1, 2 or 3, got "{1}"',
    ),
    (
        initialize(config={**CONFIG, "gradient_clipping": "auto"}),
        'gradient_clipping in the DeepSpeed configuration must be 0 or more, got "auto"',
    ),
    (
        initialize(config={**CONFIG, "gradient_clipping": -1}),
        "gradient_clipping in the DeepSpeed configuration must be 0 or more, got -1",
    ),
    (
        initialize(config={**CONFIG, "gradient_predivide_factor": 0}),
        "gradient_predivide_factor in the DeepSpeed configuration must be a positive number, got 0",
    ),
    (
        initialize(config={**CONFIG, "steps_per_print": 0.5}),
        "steps_per_print in the DeepSpeed configuration must be 1 or more, got 0.5",
    ),
    (initialize(optimizer="SGD"), "optimizer must be a torch optimizer, or a callable that makes one, got 'SGD'"),
    (initialize(lr_scheduler="step"), "lr_scheduler must be a scheduler, or a callable that makes one, got 'step'"),
    (initialize(model_parameters=5), "model_parameters must be a list of the model's parameters, or of groups, got "),
    (
        initialize(model_parameters={"params": []}),
        "model_parameters must be a list of the model's parameters, or of groups, got ",
    ),
    (initialize(model_parameters=[5]), "model_parameters must be parameters, or groups of them with 'params', got 5"),
    (
        initialize(model_parameters=[{"lr": 1.0}]),
        "model_parameters must be parameters, or groups of them with 'params', got {'lr': 1.0}",
    ),
    (initialize(distributed_port="x"), "distributed_port must be 1 to 65535, got 'x'"),
    (initialize(distributed_port=70000), "distributed_port must be 1 to 65535, got 70000"),
    (initialize(seed=1.5), "seed must be an int, got 1.5"),
    *((call, "in_channels must be 1 or more, got '8'") for call in layers(in_channels="8")),
    *((call, "in_channels must be 2147483647 or less, got 4294967296") for call in layers(in_channels=2**32)),
    *((call, "got True; use one of") for call in layers(groups=True)),
    *((call, "got [2]; use one of") for call in layers(groups=[2])),
    *((call, "kernel_size must be a positive int or a pair of them, got '3'") for call in layers(kernel_size="3")),
    *((call, "kernel_size must be a positive int or a pair of them, got 0") for call in layers(kernel_size=0)),
    *((call, "stride must be a positive int or a pair of them, got 0") for call in layers(stride=0)),
    *((call, "stride must be a positive int or a pair of them, got (1, 1, 1)") for call in layers(stride=(1, 1, 1))),
    *((call, "dilation must be a positive int or a pair of them, got -1") for call in layers(dilation=-1)),
    *(
        (call, "padding must be a non-negative int, a pair of them, 'same' or 'valid', got 'full'")
        for call in layers(padding="full")
    ),
    *(
        (call, "padding must be a non-negative int, a pair of them, 'same' or 'valid', got True")
        for call in layers(padding=True)
    ),
    *((call, "padding must be given in numbers unless stride is 1") for call in layers(padding="same", stride=2)),
    *((call, "dtype must be a floating-point type, got 'float'") for call in layers(dtype="float")),
    *((call, "dtype must be a floating-point type, got torch.int64") for call in layers(dtype=torch.int64)),
    *((call, "device must be a device that torch knows, got 'gpu'") for call in layers(device="gpu")),
    *(
        (call, "in_channels x out_channels x kernel_size must be 576460752303423488 weights or fewer, got 8 x 4 x ")
        for call in layers(kernel_size=2**30)
    ),
    (permuted(weight="x"), "weight must be a tensor of filters (m', n'/N, d, d)"),
    (permuted(weight=torch.zeros(4, 2)), "weight must be a tensor of filters (m', n'/N, d, d)"),
    (permuted(input_order=[0, 1]), "input_order must be a list of channels"),
    (permuted(output_order=torch.zeros(4)), "output_order must be a list of channels"),
    (permuted(groups=3), "groups must be a divisor of out_channels=4, got 3"),
    (permuted(input_order=torch.arange(6)), "input_order must name the 4 channels that 2 groups read, got 6"),
    (permuted(bias=torch.zeros(5)), "bias must be one number for each of 4 output channels"),
    (lambda: tlgc_mp.nn.init_parameters(None, 0), "model must be a torch.nn.Module, got NoneType"),  # type: ignore[arg-type]
    (lambda: tlgc_mp.nn.init_parameters(network(), "x"), "seed must be an int, got 'x'"),  # type: ignore[arg-type]
    (
        lambda: tlgc_mp.data.check_dataset([], None),
        "--dataset must be one of digits, cifar10, cifar100, imagenet, imagefolder, synthetic, got []",
    ),  # type: ignore[arg-type]
    (lambda: tlgc_mp.data.check_dataset("cifar10", 5), "--data-dir must be a path, got 5"),  # type: ignore[arg-type]
    (lambda: tlgc_mp.data.check_dataset("imagefolder", "a" * 5000), "--data-dir must be a readable folder, got 'aaa"),
    (lambda: tlgc_mp.data.check_dataset("cifar10", "a" * 5000), "--data-dir must be a readable folder, got 'aaa"),
    (datasets(seed="x"), "seed must be an int, got 'x'"),
    (datasets(image_size="x"), "image_size must be 1 or more, got 'x'"),
    (datasets(num_classes=True), "num_classes must be 1 or more, got True"),
    (datasets(synthetic_length=1.5), "synthetic_length must be 1 or more, got 1.5"),
    (lambda: batches(dataset=None), "dataset must be a Dataset with a length and items, got NoneType"),
    (lambda: batches(dataset=iter([1])), "dataset must be a Dataset with a length and items, got list_iterator"),
    (lambda: batches(batch_size="1"), "batch_size must be 1 or more, got '1'"),
    (lambda: batches(batch_size=1.5), "batch_size must be 1 or more, got 1.5"),
    (lambda: batches(rank="0"), "rank must be 0 to 0, one of 1 replicas, got '0'"),
    (lambda: batches(replicas=0), "replicas must be 1 or more, got 0"),
    (lambda: batches(num_workers=None), "num_workers must be 0 or more, got None"),
    (lambda: batches(seed=None), "seed must be an int, got None"),
    (lambda: batches().epoch("x"), "epoch must be 0 or more, got 'x'"),  # type: ignore[arg-type]
    (lambda: batches().epoch(0, 1.5), "start must be 0 to 8, a batch of the epoch, got 1.5"),  # type: ignore[arg-type]
    (
        lambda: tlgc_mp.data.EvaluationBatches(None, batch_size=1, rank=0, replicas=1),  # type: ignore[arg-type]
        "dataset must be a Dataset with a length and items, got NoneType",
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
    assert {
        name: text
        for name, text in said.items()
        if not text.startswith("deepspeed_config must be one that DeepSpeed accepts, got an error: ")
    } == {}


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
    assert first == "taken" and "process_group must be a group that this rank is in, got " in second
