"""Memory that was freed stays with the process where that is asked for, and only there."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from tlgc_mp import initialize
from tlgc_mp.host import keep_freed_memory, return_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(48 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""
MAKE_AGAIN = f"""{FAULTS}
faults()
handed_back = min(faults() for _ in range(10))
keep_freed_memory()
[faults() for _ in range(20)]  # until there is a hole that fits
print(handed_back, max(faults() for _ in range(20)))
"""
# Processes of their own: a hole that fits, left from before, would be used again under every setting.
RETURN = f"""{FAULTS}
keep_freed_memory()
return_freed_memory()
print(min(faults() for _ in range(10)))
"""
IN_A_LIBRARY_CALL = f"""{FAULTS}
config = {{"train_batch_size": 1, "zero_optimization": {{"stage": 1}}, "zero_allow_untested_optimizer": True}}
initialize(model=torch.nn.Linear(2, 2), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), config=config)
print(min(faults() for _ in range(10)))
"""


pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")


def _last_line_of(program: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    return [int(word) for word in done.stdout.splitlines()[-1].split()]


def test_a_large_tensor_made_again_faults_no_pages() -> None:
    handed_back, kept = _last_line_of(MAKE_AGAIN)
    assert handed_back > 20, "freed memory was kept anyway: the test shows nothing"
    assert kept <= 5


@pytest.mark.parametrize("program", [RETURN, IN_A_LIBRARY_CALL], ids=["undone", "initialize"])
def test_elsewhere_it_is_handed_back(program: str) -> None:
    (faults,) = _last_line_of(program)
    assert faults > 20
