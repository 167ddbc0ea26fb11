"""Freed memory stays with the process, so that steps do not wait for pages."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

COUNT = """
import resource
import torch
from prune_lab.training.allocator import keep_freed_memory

def num_faults():
    # Page faults of ten steps that allocate 80 MiB in two tensors and free them, after thirty in which the heap grows.
    for index in range(41):
        del [torch.ones(10 * 2**20) for _ in range(2)][:]
        if index == 30:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(num_faults())
keep_freed_memory()
print(num_faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_steps_find_the_memory_that_the_step_before_freed() -> None:
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    by_default, kept = map(int, done.stdout.split())
    assert by_default > 1000, "nothing to gain on this system"
    assert kept < by_default / 1000
