"""Any part of a tensor is read from whatever parts it was written in."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tlgc_mp.checkpoint import folder as folders
from tlgc_mp.checkpoint.reader import INDEX, CheckpointReader, Part, Piece
from tlgc_mp.parallel.layout import WHOLE, Layout, Ranks, take_share

TAG = "epoch-1"
WHOLE_TENSOR = torch.arange(24.0 * 12).view(24, 12)
CUTS = [
    *[(WHOLE, 1), (Layout(0, None), 1), (Layout(0, None), 2), (Layout(0, None), 4), (Layout(1, None), 2)],
    *[(Layout(1, None), 4), (Layout(0, (8, 8, 8)), 2), (Layout(0, (8, 8, 8)), 4), (Layout(0, (16, 8)), 2)],
    (Layout(1, (4, 8)), 2),
]


def _part(layout: Layout, count: int, index: int) -> tuple[Part, torch.Tensor]:
    share = take_share(WHOLE_TENSOR, layout, Ranks(size=count, rank=index))
    return Part(tuple(share.shape), layout.dim, index, count, layout.segments), share


def _write(run: Path, layout: Layout, count: int) -> CheckpointReader:
    """A checkpoint of one tensor, each share of which is in two files, as ZeRO leaves it."""
    folder = str(run / "checkpoints")
    folders.begin(folder, TAG)
    files = {}
    for index in range(count):
        part, share = _part(layout, count, index)
        for half, values in enumerate(share.flatten().tensor_split(2)):
            path = run / "checkpoints" / f"{TAG}.partial" / f"shard-{index:02d}-{half:02d}.safetensors"
            entry = Piece(part, half * (share.numel() // 2), half).entry()
            save_file({"weights/x": values.clone()}, path, metadata={INDEX: json.dumps({"weights/x": entry})})
            files[path.name] = folders.sealed(str(path))
    folders.commit(folder, TAG, {"client_state": {}, "tensor_parallel": count, "files": files})
    return CheckpointReader(folder, TAG)


@pytest.mark.parametrize(("written", "asked"), list(itertools.product(CUTS, CUTS)))
def test_read_as_it_is_asked_for(tmp_path: Path, written: tuple[Layout, int], asked: tuple[Layout, int]) -> None:
    reader = _write(tmp_path, *written)
    assert reader.whole_shape("weights/x") == (24, 12)
    for index in range(asked[1]):
        part, share = _part(*asked, index)
        assert reader.read("weights/x", part).equal(share)
        assert reader.read("weights/x", part, 5, 20).equal(share.flatten()[5:25])


@pytest.mark.parametrize("segments", [[8, 8], [8, 8, 9], [9, 8, 7], [-8, 24, 8]])
def test_segments_that_are_not_those_of_the_tensor_are_refused(tmp_path: Path, segments: list[int]) -> None:
    part, _ = _part(Layout(0, (8, 8, 8)), 2, 0)
    with pytest.raises(ValueError, match="no piece"):
        Piece.from_entry({**Piece(part, 0, 0).entry(), "segments": segments})
