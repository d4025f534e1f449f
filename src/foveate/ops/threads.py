"""Compiled loops on as many threads as PyTorch uses.

The loops release the interpreter's lock, so plain threads serve; numba's own thread pool would ask for the cores that
PyTorch's holds, and must not be entered by two callers at once.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="foveate-ops")


def in_parts(fn: Callable[[int, int], object], length: int, least: int = 1024) -> None:
    """Call fn(start, stop) on nearly equal parts of 0..length, at once, each of at least `least` items."""
    threads = max(1, min(torch.get_num_threads(), length // least))
    if threads == 1:
        fn(0, length)
        return
    edges = [length * i // threads for i in range(threads + 1)]
    list(_pool(threads).map(fn, edges[:-1], edges[1:]))
