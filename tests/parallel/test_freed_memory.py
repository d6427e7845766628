"""Memory that was freed stays with the process: a large tensor made again costs no page faults."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

MAKE_AGAIN = """
import resource
import torch
from tlgc_mp.parallel.engine import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(48 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
handed_back = min(faults() for _ in range(10))
keep_freed_memory()
[faults() for _ in range(20)]  # until there is a hole that fits
print(handed_back, max(faults() for _ in range(20)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_large_tensor_made_again_faults_no_pages() -> None:
    done = subprocess.run([sys.executable, "-c", MAKE_AGAIN], capture_output=True, text=True, timeout=120, check=True)
    handed_back, kept = map(int, done.stdout.split())
    assert handed_back > 20, "freed memory was kept anyway: the test shows nothing"
    assert kept <= 5
