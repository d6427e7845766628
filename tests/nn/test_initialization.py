"""He initialization with the fan of one group, and draws that depend on (seed, parameter name, block) alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tlgc_mp.errors import UsageError
from tlgc_mp.nn import TwoLevelConv2d, init_parameters
from tlgc_mp.nn.init import materialize

SEED = 4
GROUPS = 4


def model() -> nn.Sequential:
    """One of each kind of layer that has initial values."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False),
        TwoLevelConv2d(16, 32, 3, groups=GROUPS, bias=True, coarse_init="he"),
        nn.BatchNorm2d(32),
        TwoLevelConv2d(32, 16, 3, groups=GROUPS, coarse_kernel_size=1, coarse_init="he"),
        nn.Conv2d(16, 16, 3, groups=GROUPS),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def drawn(whole: nn.Module, seed: int) -> dict[str, Tensor]:
    init_parameters(whole, seed)
    return dict(whole.state_dict())


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key in expected:
        assert torch.equal(actual[key], expected[key]), f"{key}, seed {SEED}"


@pytest.mark.parametrize(
    "initialize",
    [lambda layer: layer.reset_parameters(), lambda layer: init_parameters(layer, SEED)],
    ids=["reset_parameters", "init_parameters"],
)
@pytest.mark.parametrize("coarse_kernel_size", [3, 5])
def test_spread(initialize: Callable[[TwoLevelConv2d], None], coarse_kernel_size: int) -> None:
    torch.manual_seed(SEED)
    layer = TwoLevelConv2d(512, 1024, 3, groups=8, bias=True, coarse_kernel_size=coarse_kernel_size, coarse_init="he")
    with torch.no_grad():
        for param in layer.parameters():
            param.fill_(math.nan)
    initialize(layer)

    weight = layer.weight.detach().unflatten(0, (8, -1))
    fans = {
        "fine": (weight, 9 * 512 // 8),
        "restriction": (layer.restriction, coarse_kernel_size**2 * 512 // 8),
        "prolongation": (layer.prolongation, 8),
    }
    for name, (values, fan_in) in fans.items():
        expected = math.sqrt(2.0 / fan_in)
        assert values.std().item() == pytest.approx(expected, rel=0.04), f"{name}, seed {SEED}"
        # Five standard errors of a mean.
        assert abs(values.mean().item()) < 5 * expected / math.sqrt(values.numel()), f"{name}, seed {SEED}"
    assert layer.bias is not None
    assert torch.equal(layer.bias, torch.zeros(1024))


def test_spread_of_the_other_layers() -> None:
    layers = nn.Sequential(nn.Conv2d(64, 128, 3, groups=4), nn.Linear(256, 100), nn.BatchNorm2d(8))
    with torch.no_grad():
        for tensor in layers.state_dict().values():
            tensor.fill_(5)
    values = drawn(layers, SEED)
    assert values["0.weight"].std().item() == pytest.approx(math.sqrt(2.0 / (9 * 16)), rel=0.04)
    assert values["1.weight"].std().item() == pytest.approx(math.sqrt(1.0 / 256), rel=0.04)
    for key in ("0.bias", "1.bias", "2.bias", "2.running_mean"):
        assert torch.equal(values[key], torch.zeros_like(values[key])), key
    for key in ("2.weight", "2.running_var"):
        assert torch.equal(values[key], torch.ones(8)), key
    assert values["2.num_batches_tracked"].item() == 0


def test_no_two_blocks_are_alike() -> None:
    for key, param in dict(drawn(model(), SEED)).items():
        blocks = param.unflatten(0, (GROUPS, -1)) if key.split(".")[0] in ("1", "3") else param
        if "bias" not in key and not key.startswith("2."):
            assert len({tuple(block.flatten().tolist()) for block in blocks}) == len(blocks), key


def test_same_seed_same_values_whatever_was_drawn_before() -> None:
    torch.manual_seed(1)
    first = drawn(model(), SEED)
    torch.manual_seed(2)
    torch.rand(11)
    state = torch.get_rng_state()
    whole = model()
    torch.set_rng_state(state)
    second = drawn(whole, SEED)
    assert_same(second, first)
    assert torch.equal(torch.get_rng_state(), state), "torch's own random state is not to be drawn from"


def test_another_seed_or_name_gives_other_values() -> None:
    def values(seed: int, name: str) -> Tensor:
        return drawn(nn.ModuleDict({name: TwoLevelConv2d(8, 8, 3, groups=2)}), seed)[f"{name}.weight"]

    assert torch.equal(values(SEED, "a"), values(SEED, "a"))
    assert not torch.isclose(values(SEED, "a"), values(SEED + 1, "a")).any()
    assert not torch.isclose(values(SEED, "a"), values(SEED, "b")).any()
    assert not torch.equal(values(-1, "a"), values(1, "a"))


def test_values_do_not_depend_on_dtype_or_memory_format() -> None:
    expected = drawn(model(), SEED)
    assert_same(drawn(model().to(memory_format=torch.channels_last), SEED), expected)
    in_double = {key: value.double() if value.is_floating_point() else value for key, value in expected.items()}
    assert_same(drawn(model().double(), SEED), in_double)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_shard_draws_its_rows_of_the_whole(ranks: int) -> None:
    whole = model()
    expected = drawn(whole, SEED)
    for rank in range(ranks):
        part = copy.deepcopy(whole)
        cut_dim = {"6.weight": 1, "6.bias": None}
        shares: dict[str, Tensor] = {}
        for key, value in expected.items():
            dim = cut_dim.get(key, 0)
            shares[key] = value if dim is None or value.dim() == 0 else value.chunk(ranks, dim)[rank]
        for name, module in part.named_modules():
            for key in module._parameters:
                if module._parameters[key] is not None:
                    setattr(module, key, nn.Parameter(torch.empty(shares[f"{name}.{key}"].shape)))
            if isinstance(module, TwoLevelConv2d):
                module.local_groups //= ranks
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean = torch.empty(32 // ranks)
                module.running_var = torch.empty(32 // ranks)
        init_parameters(part, SEED, shard_index=rank)
        assert_same(dict(part.state_dict()), shares)


class _Scale(nn.Module):
    """Of a user's own; the second is not persistent, and computed when it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))
        self.register_buffer("table", torch.arange(4.0), persistent=False)


class _DrawnScale(_Scale):
    def reset_parameters(self) -> None:
        nn.init.normal_(self.gain)


def test_a_module_without_a_rule_is_refused_by_name() -> None:
    with pytest.raises(
        UsageError, match=r"^model: 1, a _Scale, must have a reset_parameters\(\) that gives gain initial"
    ):
        init_parameters(nn.Sequential(nn.Linear(4, 4), _Scale()), SEED)


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (_Scale, "must have a reset_parameters() that gives gain, table"),
        (_DrawnScale, "must give table initial values"),
    ],
)
def test_what_nothing_draws_does_not_come_from_the_meta_device(module: type[nn.Module], said: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), module())
    with pytest.raises(UsageError) as refused:
        materialize(model, torch.device("cpu"), SEED)
    assert str(refused.value).startswith(f"model: 1, a {module.__name__}, {said}")


def test_layers_of_torch_come_from_the_meta_device_as_they_reset_themselves() -> None:
    def layers() -> nn.Sequential:
        norms = nn.GroupNorm(2, 4), nn.LayerNorm([4]), nn.BatchNorm1d(4), nn.InstanceNorm2d(4, affine=True), nn.PReLU(4)
        drawn = nn.ConvTranspose2d(4, 6, 3), nn.Conv1d(4, 6, 3), nn.Embedding(7, 4), nn.Bilinear(2, 3, 4), nn.LSTM(3, 5)
        same = nn.Linear(4, 4)
        return nn.Sequential(nn.Conv2d(3, 4, 3), *norms, *drawn, same, nn.Linear(4, 4), same)

    with torch.device("meta"):
        model = layers()
        model[12].weight = model[11].weight
        model[1].register_buffer("kept", torch.arange(3.0, device="cpu"))
    state = torch.get_rng_state()
    materialize(model, torch.device("cpu"), SEED)
    assert torch.equal(torch.get_rng_state(), state)
    assert model[12].weight is model[11].weight
    assert model[1].kept.tolist() == [0, 1, 2]
    again = layers()
    init_parameters(again, SEED)
    again[12].load_state_dict(again[11].state_dict() | {"weight": model[12].weight})
    again[11].load_state_dict({"weight": model[12].weight}, strict=False)
    again[1].register_buffer("kept", model[1].kept)
    assert_same(dict(model.state_dict()), dict(again.state_dict()))
    for part, std in ((model[6], 6 * 9), (model[7], 4 * 3)):  # torch's own: uniform, with variance 1 / (3 fan-in)
        assert part.weight.std().item() == pytest.approx((3 * std) ** -0.5, rel=0.15)
    assert torch.equal(model[5].weight, torch.full((4,), 0.25)) and model[8].weight.std().item() > 0.5
