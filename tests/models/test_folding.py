"""A folded model computes what the model computes in evaluation, in plain torch, and the model stays as it was."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tlgc_mp
from tests.nn.test_dense_matrix import LAYERS, SEEDS, Case, drawn, random_case
from tlgc_mp.errors import UsageError
from tlgc_mp.models.folding import SumOfLevels
from tlgc_mp.nn import TwoLevelConv2d

SEED = 47


def settled(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """With running statistics and factors that are not those of the start."""
    generator = torch.Generator().manual_seed(SEED)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 2.0, generator=generator)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(generator=generator)
    return model.to(dtype).eval()


def images(size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))


def created(name: str, conv: str, groups: int, **arguments: Any) -> nn.Module:
    torch.manual_seed(SEED)
    coarse = {"coarse_init": "scaled"} if conv.startswith("gc-2l") else {}
    return settled(tlgc_mp.create_model(name, conv=conv, groups=groups, num_classes=10, **coarse, **arguments))


MODELS = [
    ("mobilenet_v2", "gc-2l", 4, {"coarse_everywhere": True}, 64),
    ("mobilenet_v2", "gc-2l-proto", 4, {}, 64),
    ("mobilenet_v2", "sc", 1, {}, 64),
    ("wrn-10-4", "gc-2l", 4, {}, 16),
    ("wrn-10-4", "gc-2l", 2, {"coarse_kernel_size": 1}, 16),
    ("wrn-10-4", "gc-2l", 2, {"coarse_kernel_size": 5}, 16),
    ("wrn-10-4", "gc-2l", 2, {"coarse_channels": 3}, 16),
    ("wrn-10-4", "gc-2l-proto", 2, {"coarse_channels": 2, "coarse_sum": True}, 16),
    ("wrn-10-2", "gc", 4, {}, 16),
    ("wrn-10-8", "bgc", 4, {}, 16),
    ("wrn-10-2", "shuffle", 4, {}, 16),
    ("wrn-10-2", "flgc", 4, {}, 16),
    ("torchvision:resnet18", "gc-2l", 4, {}, 64),
    ("timm:mobilenetv3_small_050", "gc-2l", 4, {}, 64),
]


@pytest.mark.parametrize(("name", "conv", "groups", "arguments", "size"), MODELS)
def test_a_model(name: str, conv: str, groups: int, arguments: dict[str, Any], size: int) -> None:
    model = created(name, conv, groups, **arguments)
    before = copy.deepcopy(model.state_dict())
    folded = tlgc_mp.fold(model)
    with torch.no_grad():
        expected, found = model(images(size)), folded(images(size))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * expected.abs().max().item())
    assert not any(isinstance(module, TwoLevelConv2d) for module in folded.modules())
    assert not folded.training and not any(param.requires_grad for param in folded.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    norms = {key for key, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert norms == {*folded.folding.batch_norms, *folded.folding.left}


NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@pytest.mark.parametrize("dims", LAYERS)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_layer(seed: int, dims: int) -> None:
    case: Case = random_case(seed, dims)
    layer, x, _ = drawn(case)
    network = settled(nn.Sequential(layer, NORMS[dims](case.out_channels)))
    for module in (layer, network):
        folded = tlgc_mp.fold(module)
        assert module is layer or folded.folding.batch_norms == ["1"]
        expected, found = module(x.detach()), folded(x.detach())
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, msg=lambda m: f"{m}\n{case}")


@pytest.mark.parametrize(
    ("channels", "kernel", "coarse_kernel", "groups", "kind"),
    [
        ((960, 320), 1, 1, 4, nn.Conv2d),  # narrow, and one node where three would be
        ((320, 320), 3, 3, 4, SumOfLevels),
        ((64, 64), 3, 3, 4, nn.Conv2d),
        ((1024, 1024), 1, 1, 4, SumOfLevels),
        ((512, 512), 1, 1, 2, SumOfLevels),
        ((16, 8), 3, 1, 2, nn.Conv2d),
        ((512, 512), 3, 1, 2, SumOfLevels),
    ],
)
@pytest.mark.parametrize("dial", [(1, False), (3, False), (3, True)])
def test_which_form(
    channels: tuple[int, int], kernel: int, coarse_kernel: int, groups: int, kind: type, dial: tuple[int, bool]
) -> None:
    layer = TwoLevelConv2d(
        *(*channels, kernel, 1, kernel // 2),
        groups=groups,
        coarse_kernel_size=coarse_kernel,
        coarse_init="he",
        coarse_channels=dial[0],
        coarse_sum=dial[1],
    )
    folded = tlgc_mp.fold(settled(nn.Sequential(layer, nn.BatchNorm2d(channels[1]), nn.ReLU())))
    assert type(folded[0]) is kind and type(folded[1]) is nn.Identity
    x = torch.randn(1, channels[0], 5, 4, dtype=torch.float64)
    model = nn.Sequential(layer)
    assert type(tlgc_mp.fold(model)[0]) is kind
    torch.testing.assert_close(tlgc_mp.fold(model)(x), model(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("coarse_kernel", [1, 3, 5])
@pytest.mark.parametrize("kind", ["TwoLevelConv", "TwoLevelPrototypeConv", "BalancedConv"])
def test_the_levels_apart_of_waveforms_and_volumes(kind: str, coarse_kernel: int, dims: int) -> None:
    torch.manual_seed(SEED)
    coarse = {} if kind == "BalancedConv" else {"coarse_kernel_size": coarse_kernel, "coarse_init": "he"}
    width = {1: 1024, 3: 128}[dims]
    make = getattr(tlgc_mp.nn, f"{kind}{dims}d")
    layer = make(width, width, 3, 2, 0, groups=4, bias=True, **coarse)
    model = settled(nn.Sequential(layer, NORMS[dims](width)))
    folded = tlgc_mp.fold(model)
    assert type(folded[0]) is SumOfLevels and folded.folding.batch_norms == ["1"]
    x = torch.randn(2, width, *(7, 5, 6)[:dims], dtype=torch.float64)
    expected = model(x)
    torch.testing.assert_close(folded(x), expected, rtol=0, atol=1e-11 * expected.abs().max().item())


class Branches(nn.Module):
    """Of its BatchNorms only the first may go into the convolution before it."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(6))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(6))
        self.norms.append(nn.BatchNorm2d(4, track_running_stats=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](self.convs[0](x))
        twice = self.convs[1](x)
        x = self.norms[1](twice) + twice  # its output is read elsewhere
        x = self.norms[2](self.convs[2](self.convs[2](x)))  # called twice
        x = self.norms[3](self.convs[3](x) + self.convs[3].weight.mean())  # not its output alone
        x = self.norms[4](self.convs[4](x)) + self.convs[4].weight.mean()  # its weight is read elsewhere
        x = self.norms[5](F.relu(self.convs[5](x))) + self.norms[5](x)
        return self.norms[6](self.convs[5](x))


def test_what_must_stay() -> None:
    torch.manual_seed(SEED)
    model = Branches()
    for norm in model.norms[:6]:
        settled(norm)
    model = model.double().eval()
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    folded = tlgc_mp.fold(model)
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-9)
    assert folded.folding.batch_norms == ["norms.0"]


def test_a_hook_sees_what_it_saw() -> None:
    seen: list[Tensor] = []
    model = settled(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    model[3].register_forward_hook(lambda module, inputs, output: seen.append(output))
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    model(x)
    before = list(seen)
    seen.clear()
    folded = tlgc_mp.fold(model)
    folded(x)
    assert folded.folding.batch_norms == [] and len(seen) == 2
    assert all(torch.equal(got, want) for got, want in zip(seen, before, strict=True))


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = TwoLevelConv2d(4, 4, 3, groups=2, coarse_init="he")
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return y if y.sum() > 0 else -y


def test_a_model_without_a_graph_keeps_its_batch_norm() -> None:
    torch.manual_seed(SEED)
    model = settled(Untraceable())
    folded = tlgc_mp.fold(model)
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-10)
    assert type(folded.conv) is nn.Conv2d
    assert "torch.fx makes no graph" in folded.folding.left["norm"]
    assert "1 two-level or balanced layers and 0 of BatchNorm folded" in str(folded.folding)


class OwnForward(TwoLevelConv2d):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


def hooked() -> nn.Module:
    layer = TwoLevelConv2d(4, 4, 3, groups=2)
    layer.register_forward_hook(lambda *args: None)
    return layer


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: nn.Sequential(hooked()), "without hooks, got some at '0'"),
        (lambda: OwnForward(4, 4, 3, groups=2), "got a OwnForward with a forward of its own"),
        (lambda: "wrn-10-1", "model"),
    ],
)
def test_what_cannot_be_folded_is_refused(model: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        tlgc_mp.fold(model())


def nodes(model: nn.Module, size: int, path: Path) -> int:
    import onnx
    import onnxruntime

    batch = images(size).float()
    program = torch.onnx.export(
        model,
        (batch,),
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    assert program is not None
    program.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    other = images(size, batch=3).float()
    (found,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    expected = model(other)
    scale = expected.abs().max().item()
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-4 * scale)
    return len(onnx.load(str(path)).graph.node)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(240)
def test_onnx_has_no_more_nodes_than_the_dense_network(tmp_path: Path) -> None:
    folded = tlgc_mp.fold(created("mobilenet_v2", "gc-2l", 4).float())
    dense = created("mobilenet_v2", "sc", 1).float()
    counts = [nodes(model, 32, tmp_path / "model.onnx") for model in (folded, dense)]
    assert counts[0] <= counts[1], counts


def test_tools_take_a_folded_model() -> None:
    torch.manual_seed(SEED)
    wide = TwoLevelConv2d(160, 160, 3, groups=2, padding=1, coarse_init="he")
    narrow = TwoLevelConv2d(160, 8, 1, groups=2, coarse_init="he")
    model = tlgc_mp.fold(settled(nn.Sequential(nn.Conv2d(3, 160, 3), wide, nn.BatchNorm2d(160), nn.ReLU(), narrow)))
    assert [type(module) for module in model] == [nn.Conv2d, SumOfLevels, nn.Identity, nn.ReLU, nn.Conv2d]
    x = images(6, batch=3)
    program = torch.export.export(model, (images(6),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    by_sample = torch.func.vmap(lambda image: model(image[None])[0])(x)
    for found in (program.module()(x), torch.fx.symbolic_trace(model)(x), by_sample):
        torch.testing.assert_close(found, model(x), rtol=0, atol=1e-10)


def test_random_state_stays() -> None:
    torch.manual_seed(SEED)
    random.seed(SEED)
    model = nn.Sequential(TwoLevelConv2d(4, 4, 3, groups=2))
    before = torch.get_rng_state(), random.getstate()
    tlgc_mp.fold(model)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
