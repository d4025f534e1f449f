"""Loops that call other loops are compiled once, and found again by every later process."""

import subprocess
import sys

CALLS = """
import torch
from foveate.ops import _gathered_cpu_sampled, gathered, subpixel

x, weight = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 2, 2)
gathered.gathered(x, weight, torch.zeros(1, 1, 1, 2, 2, 2), kernel_size=1)
with torch.no_grad():
    subpixel.two_layers(x[0, 0], x[0, 0], x[0, 0, :1], x[0, 0, 0, :1])
loops = (_gathered_cpu_sampled._kernel("forward", torch.float32, False, True), subpixel._two(1))
print([(sum(loop.stats.cache_hits.values()), sum(loop.stats.cache_misses.values())) for loop in loops])
"""


def test_a_second_process_finds_what_the_first_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    first, second = (
        subprocess.run([sys.executable, "-c", CALLS], capture_output=True, text=True, check=True).stdout.strip()
        for _ in range(2)
    )
    assert (first, second) == ("[(0, 1), (0, 1)]", "[(1, 0), (1, 0)]")
