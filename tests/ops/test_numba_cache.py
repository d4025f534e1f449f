"""Loops that call other loops are compiled once, and found again by every later process."""

import subprocess
import sys

CALLS = """
import torch
from foveate.ops import subpixel

x = torch.ones(2, 2)
with torch.no_grad():
    subpixel.two_layers(x, x, x[:1], x[0, :1])
stats = subpixel._two(1).stats
print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""


def test_a_second_process_finds_what_the_first_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    first, second = (
        subprocess.run([sys.executable, "-c", CALLS], capture_output=True, text=True, check=True).stdout.strip()
        for _ in range(2)
    )
    assert (first, second) == ("0 1", "1 0")
