"""What a rank keeps for backward of a 3-D U-Net: its share, though every dense convolution needs all channels.

``python -m tests.parallel.test_memory_of_activations`` prints it for larger images, and the peak of a step.
"""

from __future__ import annotations

import argparse
import resource
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.parallel.common import SEED, assert_close, gather_gradients, relative_error, run_ranks_once
from tests.ranks import run_ranks
from tlgc_mp.parallel import collectives, gather_state_dict, rules_convolution, shard
from tlgc_mp.parallel.split_tensor import SplitTensor

WIDTH, SIDE = 16, 16


def _block(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for first, second in ((inputs, outputs), (outputs, outputs)):
        layers += [nn.Conv3d(first, second, 3, padding=1), nn.GroupNorm(4, second), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet3d(nn.Module):
    """(B, 1, D, H, W) -> (B, 3, D, H, W): two levels down, two up, joined to what came down at each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.ModuleList([_block(1, width), _block(width, 2 * width)])
        self.bottom = _block(2 * width, 4 * width)
        self.up = nn.ModuleList(
            [nn.ConvTranspose3d(4 * width, 2 * width, 2, stride=2), nn.ConvTranspose3d(2 * width, width, 2, stride=2)]
        )
        self.joined = nn.ModuleList([_block(4 * width, 2 * width), _block(2 * width, width)])
        self.head = nn.Conv3d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for block in self.down:
            x = block(x)
            kept.append(x)
            x = nn.functional.max_pool3d(x, 2)
        x = self.bottom(x)
        for grow, block, skip in zip(self.up, self.joined, reversed(kept), strict=True):
            x = block(torch.cat([skip, grow(x)], 1))
        return self.head(x)


class Halves(nn.Module):
    """(B, 1, D, H, W) -> (B, 3): channels go in halves, as in ShuffleNet, and the features are written into a table, as
    in Faster R-CNN. Every rank holds halves and table whole before a layer reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 96, 3, padding=1)
        self.left = nn.Conv3d(48, 48, 1, groups=3)
        self.right = nn.Conv3d(48, 24, 1)
        self.head = nn.Linear(72 * 512, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.tanh(self.stem(x)).chunk(2, 1)
        joined = torch.cat([self.left(left), self.right(right)], 1)
        table = torch.zeros(1, 72 * 512, dtype=x.dtype)
        table[:, :] = nn.functional.avg_pool3d(joined, SIDE // 8).flatten(1)
        return self.head(table)


def _network(width: int = WIDTH) -> nn.Module:
    torch.manual_seed(SEED)
    return UNet3d(width)


def _images(side: int = SIDE) -> Tensor:
    return torch.randn(1, 1, side, side, side, generator=torch.Generator().manual_seed(SEED))


def _pass(model: nn.Module, side: int = SIDE) -> tuple[Tensor, int]:
    """The output of a training step's forward pass, and the bytes of memory that it keeps for backward."""
    own = {param.untyped_storage().data_ptr() for param in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = (tensor.share if isinstance(tensor, SplitTensor) else tensor).untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(_images(side))
    out.square().mean().backward()
    return out.detach(), sum(storages.values())


def _on_ranks() -> Any:
    return _pass(shard(_network()))


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_keeps_its_share(ranks: int) -> None:
    expected, whole = _pass(_network())
    for out, kept in run_ranks_once(ranks, _on_ranks):
        assert relative_error(out, expected) < 1e-4
        assert kept <= whole / ranks * 1.15, f"{kept / 1e6:.1f} MB a rank, {whole / 1e6:.1f} MB on one device"


def _halves(split: bool) -> tuple[Tensor, int, dict[str, Any]]:
    torch.manual_seed(SEED)
    model: nn.Module = Halves()
    model = shard(model) if split else model
    return *_pass(model), gather_gradients(model)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_row_parallel_layer_keeps_its_share_of_what_is_whole(ranks: int) -> None:
    expected, on_one_device, gradients = _halves(False)
    for out, kept, found in run_ranks_once(ranks, _halves, True):
        assert_close({"out": out, **found}, {"out": expected, **gradients}, 1e-4)
        # The two halves are views of one tensor on one device, and shares beside a share of it here.
        assert kept <= 2 * on_one_device / ranks * 1.05, f"{kept} bytes a rank, {on_one_device} on one device"


def _step(model: nn.Module) -> Tensor:
    """The output before a step of SGD."""
    out = model(_images().double())
    out.square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return out.detach()


def _in_blocks() -> list[Any]:
    answers: list[Any] = []
    for largest in (rules_convolution.LARGEST_TRANSIENT, 40_000, 1):
        model = shard(_network(8).double())
        sizes: list[int] = []

        def note(name: str, size: int, sizes: list[int] = sizes) -> None:
            sizes.append(size * dist.get_world_size() if name == "all_gather" else size)

        with mock.patch.object(rules_convolution, "LARGEST_TRANSIENT", largest):
            collectives.recorders.append(note)
            out = _step(model)
            collectives.recorders.remove(note)
        answers.append((largest, out, gather_state_dict(model), max(sizes)))
    return answers


@pytest.mark.parametrize("ranks", [2, 4])
def test_whole_inputs_come_in_blocks(ranks: int) -> None:
    one = _network(8).double()
    expected = _step(one)
    channel = 8 * SIDE**3  # bytes of one channel of the largest map, of which a block holds one a rank
    filters = max(8 * param.numel() for param in one.parameters())
    for answers in run_ranks_once(ranks, _in_blocks):
        for largest, out, state, biggest in answers:
            assert_close({"out": out, **state}, {"out": expected, **one.state_dict()}, 1e-9, least=1e-6)
            if largest == 40_000:
                assert biggest <= max(largest, ranks * channel, filters)
        assert answers[0][3] > 1.5 * answers[1][3], "no block was smaller than the whole"


def _peak(width: int, side: int, split: bool) -> tuple[int, int]:
    """Bytes kept for backward, and bytes that a step adds to the most that the process has held. Once a process."""
    torch.set_num_threads(1)
    model = shard(_network(width)) if split else _network(width)
    _pass(model)  # small, so that what a first step loads is there
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, kept = _pass(model, side)
    return kept, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.parallel.test_memory_of_activations", description=__doc__)
    parser.add_argument("--width", type=int, default=32, help="channels of the first block")
    parser.add_argument("--side", type=int, default=64, help="length of the three sides of the image")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    options = parser.parse_args()
    whole, most = run_ranks(1, _peak, options.width, options.side, False)[0]
    print(f"one device: {whole / 1e6:.0f} MB kept for backward, {most / 1e6:.0f} MB at the peak")
    for ranks in options.ranks:
        kept, peak = max(run_ranks(ranks, _peak, options.width, options.side, True))
        print(
            f"each of {ranks} ranks: {kept / 1e6:.0f} MB ({kept / whole:.2f}), {peak / 1e6:.0f} MB ({peak / most:.2f})"
        )


if __name__ == "__main__":
    main()
