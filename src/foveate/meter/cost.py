"""What a call costs: seconds, FLOPs, peak memory, and energy where the machine has a counter for it.

Time is wall time with the accelerator's queue drained on both sides. Peak memory is what a call needed on top of what
was there before it: from the allocator's own watermark on CUDA, and from the resident size of the process otherwise.
Energy is read from the counters of the processor package (Linux RAPL) and of the GPU (NVML). They cover the whole
package and board, whoever used them meanwhile, and a machine without such counters gets None, not an estimate.
"""

import ctypes
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.errors import InputError
from foveate.meter.flops import count_flops

_SAMPLING_SECONDS = 0.001


@dataclass(frozen=True)
class Measurement:
    """What one call cost.

    Attributes:
        seconds: median wall time.
        flops: two per multiply-accumulate, see `foveate.meter.flops`.
        peak_bytes: memory needed beyond what was held before; None where the system does not tell.
        energy_joules: mean energy of a call as far as `energy_from` covers it; None without a counter that moved.
        energy_from: the counters that were read, such as "package-0" or "gpu-0".
    """

    seconds: float
    flops: int
    peak_bytes: int | None
    energy_joules: float | None
    energy_from: tuple[str, ...] = ()


@dataclass(frozen=True)
class EnergyCounter:
    """A running total of joules that starts over after `wraps_at`."""

    name: str
    read: Callable[[], float]
    wraps_at: float = math.inf


def count_parameters(module: nn.Module, trainable: bool | None = None) -> int:
    """Count a module's parameters, shared ones once.

    Args:
        trainable: True counts those that require gradients, False the frozen ones, None (default) all.

    >>> count_parameters(nn.Linear(3, 2))
    8
    """
    if not isinstance(module, nn.Module):
        raise InputError(f"count_parameters got {type(module).__name__}, expected an nn.Module. Pass the model itself.")
    return sum(p.numel() for p in module.parameters() if trainable is None or p.requires_grad == trainable)


def measure(fn: Callable[..., Any], *args: Any, repeats: int = 5, warmup: int = 1, **kwargs: Any) -> Measurement:
    """Measure what `fn(*args, **kwargs)` costs.

    The call runs `repeats + warmup + 2` times: once to count FLOPs, `warmup` times for nothing, once to watch memory,
    and `repeats` times against the clock. To judge one method against another, use `compare`, which alternates them.

    Raises: InputError when `fn` cannot be called, `repeats` is below 1 or `warmup` below 0.
    """
    check_runs("measure", repeats, warmup, fn)

    def call() -> Any:
        return fn(*args, **kwargs)

    flops = count_flops(call)
    for _ in range(warmup):
        call()
    peak = peak_memory(call)
    counters = energy_counters()
    before = [counter.read() for counter in counters]
    seconds = [time_call(call) for _ in range(repeats)]
    spent = [(c.read() - start) % c.wraps_at for c, start in zip(counters, before, strict=True)]
    # A counter that stood still is too coarse for a call this short.
    moved = [(counter.name, joules) for counter, joules in zip(counters, spent, strict=True) if joules > 0]
    energy = sum(joules for _, joules in moved) / repeats if moved else None
    return Measurement(statistics.median(seconds), flops, peak, energy, tuple(name for name, _ in moved))


def time_call(fn: Callable[[], Any]) -> float:
    """Return the wall time of `fn()` in seconds, work queued on an accelerator included."""
    _synchronize()
    start = time.perf_counter()
    fn()
    _synchronize()
    return time.perf_counter() - start


def peak_memory(fn: Callable[[], Any]) -> int | None:
    """Run `fn()` and return the bytes it needed at its peak beyond those held before, its result included.

    When it allocated on the current CUDA device, those bytes; otherwise the growth of this process's resident memory
    (of the process, not of its children), sampled every millisecond and, when the call set a new record, read from
    the kernel's own watermark. Without /proc the watermark's growth is a lower bound; without either, None.
    """
    cuda = _cuda_in_use()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    resident = _peak_resident(fn)
    if cuda:
        torch.cuda.synchronize()
        on_device = torch.cuda.max_memory_allocated() - held
        return on_device if on_device > 0 else resident
    return resident


def stored_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass in training keeps for the backward pass: storages, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t  # holding it, so that its address is not used again
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = module.train()(x.clone().requires_grad_())
    del y
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)


def energy_counters(powercap: Path = Path("/sys/class/powercap")) -> list[EnergyCounter]:
    """List the energy counters that can be read here: processor packages, and the current GPU once CUDA is in use."""
    counters = []
    for zone in sorted(powercap.glob("intel-rapl:*")):
        if zone.name.count(":") > 1:  # a part of a package, already inside its total
            continue
        try:
            name = (zone / "name").read_text().strip()
            limit = int((zone / "max_energy_range_uj").read_text()) * 1e-6
            counter = EnergyCounter(name, partial(_read_joules, zone / "energy_uj"), limit)
            counter.read()
        except (OSError, ValueError):  # most systems let only root read it
            continue
        counters.append(counter)
    return counters + _gpu_counters()


def check_runs(who: str, runs: int, warmup: int, *calls: Any) -> None:
    """Raise InputError unless the calls can be called and the numbers of runs make sense."""
    for fn in calls:
        if not callable(fn):
            raise InputError(f"{who} got {fn!r}, expected something to call. Pass a function, or wrap it in a lambda.")
    if runs < 1 or warmup < 0:
        raise InputError(f"{who} got {runs} runs and {warmup} warm-ups. Ask for at least 1 run and 0 warm-ups.")


def _cuda_in_use() -> bool:
    # Before CUDA is initialised there is nothing to wait for, and asking would start it.
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def _synchronize() -> None:
    if _cuda_in_use():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


def _read_joules(file: Path) -> float:
    return int(file.read_text()) * 1e-6


def _gpu_counters() -> list[EnergyCounter]:
    if not _cuda_in_use():
        return []
    try:
        nvml = import_module("pynvml")
        nvml.nvmlInit()
        index = torch.cuda.current_device()
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
        counter = EnergyCounter(f"gpu-{index}", lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) * 1e-3)
        counter.read()
    except Exception:  # not installed, no permission, a slice of a GPU, or a board without the counter
        return []
    return [counter]


def _peak_resident(fn: Callable[[], Any]) -> int | None:
    _return_free_memory()
    record_before, start = _record_resident(), _resident()
    if start is None:
        fn()
        record = _record_resident()
        return None if record is None or record_before is None else record - record_before

    peak, done = start, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(_SAMPLING_SECONDS):
            peak = max(peak, _resident() or 0)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        result = fn()
        at_end = _resident() or 0
        del result
    finally:
        done.set()
        watcher.join()
    record = _record_resident()
    broken = record is not None and record_before is not None and record > record_before
    return max(peak, at_end, record if broken and record is not None else 0) - start


def _resident() -> int | None:
    """Bytes of this process now in memory, or None where there is no /proc."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, AttributeError, ValueError):
        return None


def _record_resident() -> int | None:
    """The most bytes this process ever had in memory, or None where there is no getrusage."""
    try:
        resource = import_module("resource")
    except ImportError:
        return None
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def _return_free_memory() -> None:
    # glibc keeps freed blocks; a call that reuses them would seem to need no memory.
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
