"""Two ways to do the same thing, measured against each other.

A machine's speed drifts: clocks step down, caches warm, neighbours wake. So baseline and method run in turn, who goes
first alternates, and each pair gives one ratio t_baseline / t_method. The speed-up is the median of these ratios. With

    flop_reduction = FLOPs_baseline / FLOPs_method        efficiency = speedup / flop_reduction

an efficiency of 1 says that every FLOP saved was time saved; the rest went into deciding, gathering and scattering.
"""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from foveate.errors import InputError
from foveate.meter.cost import check_runs, peak_memory, time_call
from foveate.meter.flops import count_flops


@dataclass(frozen=True)
class Comparison:
    """The outcome of `compare`. Every ratio is baseline over method: above 1, the method needs less.

    Attributes:
        names: what the two are called.
        seconds: wall times of baseline and method, one per pair.
        flops: FLOPs of each, or None when they were not counted.
        peak_bytes: peak memory of each, None where the system does not tell.
    """

    names: tuple[str, str]
    seconds: tuple[tuple[float, ...], tuple[float, ...]]
    flops: tuple[float, float] | None
    peak_bytes: tuple[int | None, int | None]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Time of the baseline over time of the method, pair by pair."""
        return tuple(a / b for a, b in zip(*self.seconds, strict=True))

    @property
    def speedup(self) -> float:
        """Median of the pairwise time ratios."""
        return statistics.median(self.ratios)

    @property
    def speedup_range(self) -> tuple[float, float]:
        """Interquartile range of the pairwise time ratios."""
        low, high = np.quantile(self.ratios, (0.25, 0.75))
        return float(low), float(high)

    @property
    def flop_reduction(self) -> float | None:
        """FLOPs of the baseline over FLOPs of the method; None when not counted, or when the method has none."""
        return _ratio(self.flops)

    @property
    def efficiency(self) -> float | None:
        """Speed-up per FLOP reduction: 1 when every FLOP saved is time saved; None without FLOPs."""
        reduction = self.flop_reduction
        return self.speedup / reduction if reduction else None

    @property
    def memory_ratio(self) -> float | None:
        """Peak memory of the baseline over that of the method; None when unknown, or when the method needed none."""
        return _ratio(self.peak_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Return everything measured and derived, ready for JSON."""
        return {
            "names": list(self.names),
            "seconds": [statistics.median(times) for times in self.seconds],
            "pairs": len(self.ratios),
            "speedup": self.speedup,
            "speedup_range": list(self.speedup_range),
            "flops": None if self.flops is None else list(self.flops),
            "flop_reduction": self.flop_reduction,
            "efficiency": self.efficiency,
            "peak_bytes": list(self.peak_bytes),
            "memory_ratio": self.memory_ratio,
        }

    def table(self) -> str:
        """Return the comparison as lines of text.

        >>> print(Comparison(("dense", "half"), ((0.02, 0.022), (0.01, 0.011)), (4e9, 2e9), (64 << 20, None)).table())
                     dense     half      ratio
        time         21.0 ms   10.5 ms   2.00x (2.00 to 2.00)
        FLOPs        4.00 G    2.00 G    2.00x
        peak memory  67.1 MB   -         -
        efficiency                       1.00
        """
        low, high = self.speedup_range
        times = [_quantity(statistics.median(t), "s") for t in self.seconds]
        rows = [["", *self.names, "ratio"], ["time", *times, f"{self.speedup:.2f}x ({low:.2f} to {high:.2f})"]]
        if self.flops is not None:
            rows.append(["FLOPs", *(_quantity(f, "") for f in self.flops), _times(self.flop_reduction)])
        rows.append(["peak memory", *(_quantity(p, "B") for p in self.peak_bytes), _times(self.memory_ratio)])
        if self.efficiency is not None:
            rows.append(["efficiency", "", "", f"{self.efficiency:.2f}"])
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        gaps = (2, 3, 3, 0)
        lines = ("".join(c.ljust(w + g) for c, w, g in zip(row, widths, gaps, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)


def compare(
    baseline: Callable[[], Any],
    method: Callable[[], Any],
    pairs: int = 7,
    warmup: int = 1,
    names: tuple[str, str] = ("baseline", "method"),
    flops: bool | tuple[float, float] = True,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Run two calls in turn and report the ratios of what they cost.

    Args:
        baseline: called without arguments; likewise `method`.
        pairs: how often each is timed; who goes first alternates.
        warmup: untimed runs of each before anything is measured.
        names: what the two are called in reports.
        flops: True counts them in one more run of each, False leaves them out, a pair gives them.
        progress: called with (pairs done, pairs in all) after each pair.

    Raises: InputError when a call cannot be called, or the numbers of runs or FLOPs make no sense.

    >>> import time
    >>> outcome = compare(lambda: time.sleep(0.004), lambda: time.sleep(0.001), pairs=3, flops=(4.0, 1.0))
    >>> outcome.flop_reduction
    4.0
    """
    check_runs("compare", pairs, warmup, baseline, method)
    calls = (baseline, method)
    counted: tuple[float, float] | None = None
    if not isinstance(flops, bool):
        if len(flops) != 2 or not all(f >= 0 for f in flops):
            raise InputError(f"compare got flops={flops!r}. Pass two numbers, for baseline and method, or True.")
        counted = (float(flops[0]), float(flops[1]))
    elif flops:
        counted = (count_flops(baseline), count_flops(method))
    for _ in range(warmup):
        for call in calls:
            call()
    peaks = (peak_memory(baseline), peak_memory(method))
    seconds: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        for side in (0, 1) if pair % 2 == 0 else (1, 0):
            seconds[side].append(time_call(calls[side]))
        if progress is not None:
            progress(pair + 1, pairs)
    return Comparison(names, (tuple(seconds[0]), tuple(seconds[1])), counted, peaks)


def slope(costs: Mapping[int, float]) -> float:
    """Exponent p of costs ~ n^p: the least-squares slope of log cost over log n.

    >>> round(slope({n: 3.0 * n * n for n in (4, 8, 32)}), 6)
    2.0
    """
    points = [(math.log(n), math.log(cost)) for n, cost in costs.items()]
    x, y = (statistics.fmean(axis) for axis in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def _ratio(pair: tuple[float | None, float | None] | None) -> float | None:
    if pair is None or pair[0] is None or not pair[1]:
        return None
    return pair[0] / pair[1]


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _quantity(value: float | None, unit: str) -> str:
    """Write a quantity with three digits and an SI prefix: 0.021 s -> 21.0 ms."""
    if value is None:
        return "-"
    prefixes = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"))
    scale, prefix = next(((s, p) for s, p in prefixes if abs(value) >= s), (1.0, ""))
    number = value / scale
    digits = 2 if number < 10 else 1 if number < 100 else 0
    return f"{number:.{digits}f} {prefix}{unit}".rstrip()
