"""What a deformable convolution costs on hardware without a large cache, counted and simulated.

A layer of K output channels on H x W pixels spends

    multiply-accumulates   9 C K H W; depth-wise 9 K H W, and C K H W for the 1x1 before it
    interpolation          8 multiplications per sample and channel; none when offsets are whole
    offsets                18 H W numbers (free, bound), H W (square)
    memory                 the input, and where its pixels are read from (below), and the output
    on-chip reads          one after the other per output and channel: 9 row segments, or 3 where taps keep a square,
                           because three of a row are then read from three banks at once. A sample between pixels
                           touches two rows, so twice that.

Offsets bounded by N read rows r - 1 - N .. r + 1 + N for outputs of row r (one more between pixels), so a line buffer
of so many rows gets every pixel once, in order. Free offsets do not say where they read: each sample is an access of
its own, unless a cache of rows happens to hold it (`row_misses` simulates one).

Latency is that of the slowest unit, as they work side by side, plus the accesses out of order, for which all wait.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from foveate.engine.budget import Budget
from foveate.errors import BudgetError, InputError
from foveate.recognize.deformable_codesign import RUNGS, TAPS

_MULTIPLICATIONS = 8
"""Per bilinear sample: four weights, and four pixels by them."""


@dataclass(frozen=True)
class Layer:
    """A deformable 3x3 layer, as `DeformConv` is set.

    Attributes:
        height, width: of the map.
        inputs: C; None for a depth-wise kernel without the 1x1 convolution before it.
        outputs: K.
        rung, bound, rounded, depthwise: see `DeformConv`.
    """

    height: int
    width: int
    inputs: int | None
    outputs: int
    rung: str = "square"
    bound: int = 7
    rounded: bool = False
    depthwise: bool = True

    def __post_init__(self) -> None:
        if self.rung not in RUNGS:
            raise InputError(f"unknown rung {self.rung!r}; use one of {', '.join(map(repr, RUNGS))}.")
        if self.inputs is None and not self.depthwise:
            raise InputError("only a depth-wise layer is priced without its input channels; give inputs.")

    @property
    def whole(self) -> bool:
        """Whether samples lie on pixels."""
        return self.rounded or self.rung == "fixed"

    @property
    def lines(self) -> int | None:
        """Rows that a line buffer needs; None where no number is enough."""
        if self.rung == "free":
            return None
        return 3 + (0 if self.rung == "fixed" else 2 * self.bound) + (not self.whole)


@dataclass(frozen=True)
class Machine:
    """What the hardware does in a second. One value is one byte.

    The defaults are those of the published FPGA as three rows of its latencies (64 x 64, 256 channels) tell them:
    multiply-accumulates from the full convolution, bytes from the depth-wise one, on-chip reads from the bounded
    depth-wise one; the other rows are for the model to predict.
    """

    macs: float = 2.416e9 / 43.1e-3
    bytes: float = 2 * 256 * 64**2 / 1.9e-3
    reads: float = 18 * 256 * 64**2 / 3.0e-3


@dataclass(frozen=True)
class Cost:
    """What a layer spends on one picture.

    Attributes:
        macs: multiply-accumulates of the kernels.
        interpolation: multiplications of bilinear samples.
        offsets: predicted numbers, which are written and read.
        streamed: values that come from and go to memory in order.
        scattered: accesses to memory out of order.
        reads: row segments read on chip, one after the other.
    """

    macs: int
    interpolation: int
    offsets: int
    streamed: int
    scattered: int
    reads: int

    def seconds(self, machine: Machine | None = None) -> float:
        """Latency on a machine."""
        machine = machine or Machine()
        compute = (self.macs + self.interpolation) / machine.macs
        memory = (self.streamed + 2 * self.offsets) / machine.bytes
        return max(compute, memory, self.reads / machine.reads) + self.scattered / machine.bytes


def price(layer: Layer, misses: int | None = None) -> Cost:
    """Count what a layer spends.

    Args:
        layer: what to price. Bounded rungs are given the line buffer that they need.
        misses: rows that a cache fetches for free offsets, from `row_misses`; without, there is no cache and every
            sample is an access of its own.
    """
    pixels, channels = layer.height * layer.width, layer.outputs if layer.depthwise else layer.inputs or 0
    samples, segments = 9 * channels * pixels, 1 if layer.whole else 2
    macs = 9 * layer.outputs * pixels * (1 if layer.depthwise else channels)
    if layer.depthwise and layer.inputs is not None:
        macs += layer.inputs * layer.outputs * pixels
    free = layer.rung == "free"
    rows = layer.height if not free else misses or 0
    return Cost(
        macs=macs,
        interpolation=0 if layer.whole else _MULTIPLICATIONS * samples,
        offsets={"fixed": 0, "square": pixels}.get(layer.rung, 18 * pixels),
        streamed=layer.outputs * pixels + rows * layer.width * channels,
        scattered=samples * segments if free and misses is None else 0,
        reads=segments * samples // (3 if layer.rung in ("fixed", "square") else 1),
    )


def within(budget: Budget | float | str, layer: Layer, machine: Machine | None = None) -> Layer:
    """The layer on the freest rung that a budget allows.

    Args:
        budget: milliseconds ("2.5 ms"), or a share of what the free rung takes.
        layer: whose rung is chosen; the rest stays.
        machine: where it is to run.

    Raises: BudgetError when even a plain convolution takes longer.
    """
    rungs = [replace(layer, rung=rung) for rung in ("free", "bound", "square", "fixed")]
    seconds = [price(one).seconds(machine) for one in rungs]
    parsed = Budget.parse(budget)
    allowed = parsed.amount / 1e3 if parsed.unit == "ms" else parsed.share_of() * seconds[0]
    for one, needed in zip(rungs, seconds, strict=True):
        if needed <= allowed:
            return one
    raise BudgetError(
        f"a plain 3x3 layer takes {1e3 * seconds[-1]:.2f} ms on this machine, more than the {1e3 * allowed:.2f} ms "
        "allowed; give it more time or fewer channels."
    )


def rows_read(offset: Tensor) -> Tensor:
    """Rows that each sample of each output reads, in raster order, -1 for none.

    Args:
        offset: (x, y) per tap, as `DeformConv.offset` gives it for one picture.

    Shape: [9, 2, H, W] -> int64 [H, W, 9, 2]: the row above or at a sample, and the one below it where it reads that.
    Raises: InputError for another shape.
    """
    if offset.dim() != 4 or offset.shape[:2] != (9, 2):
        raise InputError(f"expected offsets [9, 2, H, W] of one picture, got {tuple(offset.shape)}.")
    height = offset.shape[2]
    taps = torch.tensor([down for _, down in TAPS], dtype=offset.dtype, device=offset.device)
    places = (
        torch.arange(height, dtype=offset.dtype, device=offset.device)[:, None] + taps[:, None, None] + offset[:, 1]
    )
    above = places.floor().long()
    below = torch.where(places > above, above + 1, -1)
    rows = torch.stack((above, below), -1)
    return torch.where((rows >= 0) & (rows < height), rows, -1).permute(1, 2, 0, 3)


def row_misses(offset: Tensor, lines: int) -> int:
    """Rows that a cache of whole rows fetches while outputs are made in raster order; the least recently used go.

    Args:
        offset: see `rows_read`.
        lines: rows that the cache holds.

    Raises: InputError for less than one line.
    """
    if lines < 1:
        raise InputError(f"a cache holds at least one row, got lines={lines}.")
    rows = rows_read(offset.detach().cpu())
    return int(_least_recently_used()(rows.reshape(-1).numpy(), rows.shape[0], lines))


@cache
def _least_recently_used() -> Any:
    import numba

    @numba.njit(cache=True)
    def count(rows, height, lines):  # type: ignore[no-untyped-def]
        used = [-1] * height  # when each row was last asked for; -1 while it is not held
        held, misses = 0, 0
        for time in range(len(rows)):
            row = rows[time]
            if row < 0:
                continue
            if used[row] < 0:
                misses += 1
                if held == lines:
                    oldest = -1
                    for other in range(height):
                        if used[other] >= 0 and (oldest < 0 or used[other] < used[oldest]):
                            oldest = other
                    used[oldest] = -1
                else:
                    held += 1
            used[row] = time
        return misses

    return count
