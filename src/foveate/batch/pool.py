"""Processes that take tasks one by one, outlive a crash, and leave with their parent.

Each process gets its share of the cores. A process that dies (out of memory, a crash in a decoder) breaks the whole
pool without saying on which task; the tasks that were in hand are then tried alone, one after the other, so that only
the guilty one fails.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.errors import FoveateError

Worker = Callable[[Path, Path], dict[str, Any]]
Task = tuple[Path, Path]
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(frozen=True)
class Outcome:
    """What became of a task: the worker's report, or the reason why there is none."""

    report: dict[str, Any] | None = None
    message: str | None = None


def in_processes(tasks: Sequence[Task], worker: Worker, jobs: int) -> Generator[tuple[int, Outcome], None, None]:
    """Run worker(source, target) for every task; yield (index of the task, outcome) as they end.

    Args:
        tasks: pairs of source and target.
        worker: a function that spawned processes can import.
        jobs: processes; with 1 everything happens in this one.
    """
    if jobs == 1:
        for index, task in enumerate(tasks):
            yield index, _attempt(worker, *task)
        return
    threads = max(1, _cores() // jobs)
    queue, suspects = deque(range(len(tasks))), deque[int]()
    while queue or suspects:
        if not suspects:
            suspects.extend((yield from _pool(tasks, queue, worker, jobs, threads)))
            continue
        lost = yield from _pool(tasks, deque([suspects.popleft()]), worker, 1, threads)
        for index in lost:
            yield index, Outcome(message="its process died, most likely for lack of memory; try it with fewer jobs.")


def _pool(
    tasks: Sequence[Task], queue: deque[int], worker: Worker, width: int, threads: int
) -> Generator[tuple[int, Outcome], None, list[int]]:
    """Work the queue off, and return the tasks in hand when the pool broke."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(width, mp_context=context, initializer=_settle, initargs=(threads,))
    running: dict[Future[Outcome], int] = {}
    try:
        while queue or running:
            while queue and len(running) < width:
                running[pool.submit(_interruptible, worker, *tasks[queue[0]])] = queue[0]
                queue.popleft()
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                outcome = _outcome(future)
                yield running.pop(future), outcome
    except BrokenProcessPool:
        return list(running.values())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return []


def _outcome(future: Future[Outcome]) -> Outcome:
    try:
        return future.result()
    except BrokenProcessPool:
        raise
    except Exception as error:  # a worker or a report that does not travel between processes
        return Outcome(message=f"{type(error).__name__}: {error}")


def _attempt(worker: Worker, source: Path, target: Path) -> Outcome:
    try:
        return Outcome(report=worker(source, target))
    except FoveateError as error:
        return Outcome(message=str(error))
    except MemoryError:
        return Outcome(message="not enough memory; try it with fewer jobs.")
    except Exception as error:  # one bad file never stops the rest
        return Outcome(message=f"{type(error).__name__}: {error}")


def _interruptible(worker: Worker, source: Path, target: Path) -> Outcome:
    # Ctrl-C reaches every process: it must end a task that is running, and leave an idle process in peace.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return _attempt(worker, source, target)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _settle(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in _THREADS:
        os.environ.setdefault(name, str(threads))
    if "torch" in sys.modules:  # loaded with the main module, before the variables above could be seen
        sys.modules["torch"].set_num_threads(threads)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    # A parent that is killed closes no queue, and its processes would wait for work for ever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
