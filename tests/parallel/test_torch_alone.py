"""Splitting needs torch alone: without DeepSpeed a model is split, trained, gathered, copied and saved."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import copy, importlib.abc, io, sys

class WithoutDeepSpeed(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "deepspeed":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, WithoutDeepSpeed())
import torch
import torch.distributed as dist
import tlgc_mp
from tlgc_mp.parallel import clip_grad_norm_, gather_state_dict, layout_report

def network():
    torch.manual_seed(1)
    return tlgc_mp.create_model("wrn-10-1", groups=2, coarse_init="he").double()

def step(model, clip):
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
    clip(model, 0.5)
    torch.optim.SGD(model.parameters(), lr=0.1).step()

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
alone, split = network(), tlgc_mp.shard(network())
step(alone, lambda model, norm: torch.nn.utils.clip_grad_norm_(model.parameters(), norm))
step(split, clip_grad_norm_)
layout_report(split, torch.empty(4, 3, 16, 16, dtype=torch.float64))
torch.save(copy.deepcopy(split), io.BytesIO())
whole = gather_state_dict(split)
assert whole.keys() == alone.state_dict().keys()
off = max((value - whole[name]).abs().max().item() for name, value in alone.state_dict().items())
assert off < 1e-9, off
assert not [name for name in sys.modules if name.startswith("deepspeed")]
dist.barrier()
"""


def test_a_model_is_split_and_trained(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)[-3000:]
