"""Compiled loops, and chains of small operations, on as many threads as PyTorch uses.

The loops release the interpreter's lock, so plain threads serve; numba's own thread pool would ask for the cores that
PyTorch's holds, and must not be entered by two callers at once.

A chain of small operations on a chunk (gather, a narrow layer, scatter) loses much of two cores when each operation is
cut in two and waited for. `each` gives whole chunks to threads, on which an operation keeps to its one core and its
cache.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch

from foveate.ops import fast_allowed

T = TypeVar("T")


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="foveate-ops")


@cache
def _single(threads: int) -> ThreadPoolExecutor:
    """Threads on which PyTorch's operations stay on one core."""

    def begin() -> None:
        torch.get_num_threads()  # a thread's first call takes over the process's number; what is set later stays
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(threads, thread_name_prefix="foveate-chunks", initializer=begin)
    barrier = Barrier(threads)
    list(pool.map(lambda _: barrier.wait(), range(threads)))  # start all of them now, and not in the midst of work
    torch.set_num_threads(threads)
    return pool


def each(fn: Callable[[T], object], chunks: Iterable[T]) -> None:
    """Call fn on every chunk, as many at once as PyTorch uses threads, each on a single core.

    One after the other in the calling thread where gradients may be asked for, or fast paths are switched off (what
    counts operations sees those of its own thread only).
    """
    chunks, threads = list(chunks), torch.get_num_threads()
    if threads == 1 or len(chunks) == 1 or torch.is_grad_enabled() or not fast_allowed():
        for chunk in chunks:
            fn(chunk)
        return
    inference = torch.is_inference_mode_enabled()

    def run(chunk: T) -> None:
        with torch.inference_mode() if inference else torch.no_grad():
            fn(chunk)

    list(_single(threads).map(run, chunks))


def in_parts(fn: Callable[[int, int], object], length: int, least: int = 1024) -> None:
    """Call fn(start, stop) on nearly equal parts of 0..length, at once, each of at least `least` items."""
    threads = max(1, min(torch.get_num_threads(), length // least))
    if threads == 1:
        fn(0, length)
        return
    edges = [length * i // threads for i in range(threads + 1)]
    list(_pool(threads).map(fn, edges[:-1], edges[1:]))
