"""ThunderKittens: kernels from a few tile operations, and a plan of tile shape, depth and order for each problem.

Spector, Arora, Singhal, Parthasarathy, Fu, Ré 2024, arXiv:2410.20399.

The operations are `foveate.ops.tile`. Here is what surrounds them: in which order a grid of output tiles is taken, how
deep loads run ahead of the arithmetic, how tiles lie in shared memory, and what all that costs by

    T = max(T_HBM, T_L2, T_shared, T_tensor) + T_setup + T_sync,

each term the bytes or operations over the machine's rate, T_HBM with the unique bytes of a wave, the tiles that are
computed at the same time. (The arithmetic between products, T_alu and T_special in the paper, is nothing for a GEMM.)

Order ("super-M"): with g rows per group, task t of R x C takes row  g floor(t / gC) + t mod g  and column
(t mod gC) / g, and the R mod g rows left over likewise. g = 1 is row by row. A wave then covers a block rather than a
strip, so it needs fewer rows of one matrix and columns of the other; where the grid is small it needs more.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import numpy as np

from foveate.errors import InputError

GROUPS = (1, 2, 4, 6, 8, 12, 16, 24, 32)
"""Rows per group that a plan chooses from."""

SHAPES = ((128, 256, 64), (256, 128, 64), (128, 128, 64), (128, 64, 64), (64, 128, 64), (64, 64, 64), (32, 32, 64))
"""Rows, columns and depth of tiles that a plan chooses from, in the order preferred where costs are equal."""

STAGES = (1, 2, 3, 4)


@dataclass(frozen=True)
class Machine:
    """Peak rates per second of a whole accelerator; the defaults are an H100 SXM's in bfloat16.

    Args:
        processors: tiles computed at the same time.
        hbm, l2, shared: bytes per second.
        tensor: operations per second of the matrix units, two per multiply-accumulate.
        latency: seconds from asking for a tile to having it in shared memory.
        launch: seconds to start a kernel.
        shared_bytes: shared memory of one processor.
    """

    processors: int = 132
    hbm: float = 3.35e12
    l2: float = 5.5e12
    shared: float = 3.0e13
    tensor: float = 9.9e14
    latency: float = 8e-7
    launch: float = 4e-6
    shared_bytes: int = 227 * 1024


@dataclass(frozen=True)
class GemmPlan:
    """How to multiply [M, K] by [K, N]: the cheapest by the cost model of ThunderKittens (arXiv:2410.20399).

    Attributes:
        tile: rows, columns and depth of a tile.
        stages: loads that are under way at the same time, the computed one included.
        group: rows per group of the order of tiles; 1 is row by row.
        seconds: predicted time.
        limit: what it is limited by, "hbm", "l2", "shared" or "tensor".

    >>> GemmPlan.best(4096, 4096, 4096).tile
    (128, 256, 64)
    """

    tile: tuple[int, int, int]
    stages: int
    group: int
    seconds: float
    limit: str

    @classmethod
    def best(cls, m: int, n: int, k: int, itemsize: int = 2, machine: Machine | None = None) -> "GemmPlan":
        """The cheapest plan of `SHAPES`, `STAGES` and `GROUPS`.

        Args:
            itemsize: bytes of a number.

        Raises: InputError for an empty product.
        """
        return _best_plan(m, n, k, itemsize, machine or Machine())

    @classmethod
    def of(
        cls, m: int, n: int, k: int, tile: tuple[int, int, int], stages: int, group: int, itemsize: int,
        machine: Machine,
    ) -> "GemmPlan":  # fmt: skip
        """What a given choice costs."""
        if min(m, n, k) < 1:
            raise InputError(f"a product needs at least one row, column and term, got {m} x {k} times {k} x {n}.")
        rows, cols, depth = tile
        height, width, steps = (-(-a // b) for a, b in zip((m, n, k), tile, strict=True))
        tiles = height * width
        waves = -(-tiles // machine.processors)
        in_rows, in_cols = wave_loads(height, width, machine.processors, group)
        written = m * n * itemsize
        unique = (in_rows * rows + in_cols * cols) * k * itemsize
        asked = tiles * (rows + cols) * k * itemsize
        step = 2 * rows * cols * depth * machine.processors / machine.tensor
        terms = {
            "hbm": (unique + written) / machine.hbm,
            "l2": (asked + written) / machine.l2,
            "shared": 2 * asked / machine.shared,
            "tensor": waves * steps * step,
        }
        limit = max(terms, key=terms.__getitem__)
        waiting = waves * (pipeline_seconds(steps, machine.latency, step, stages) - steps * step)
        return cls(tile, stages, group, terms[limit] + machine.launch + waiting, limit)


@cache
def _best_plan(m: int, n: int, k: int, itemsize: int, machine: Machine) -> GemmPlan:
    plans = []
    for tile, stages in product(SHAPES, STAGES):
        if stages * (tile[0] + tile[1]) * tile[2] * itemsize <= machine.shared_bytes:
            group = best_group(-(-m // tile[0]), -(-n // tile[1]), machine.processors)
            plans.append(GemmPlan.of(m, n, k, tile, stages, group, itemsize, machine))
    return min(plans, key=lambda plan: plan.seconds)


# ------------------------------------------------------------------ the order of tiles


def super_m(task: Any, height: int, width: int, group: int) -> tuple[Any, Any]:
    """Row and column of the tile that is task number `task` of height x width, taken `group` rows at a time.

    Args:
        task: an integer, or an array of them.

    >>> [super_m(t, 3, 2, 2) for t in range(6)]
    [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (2, 1)]
    """
    block = task // (group * width)
    left = height - block * group
    rows = np.minimum(group, left) if isinstance(task, np.ndarray) else min(group, left)
    within = task - block * group * width
    return block * group + within % rows, within // rows


def wave_loads(height: int, width: int, concurrent: int, group: int) -> tuple[int, int]:
    """Rows and columns of tiles that must be loaded, each counted once per wave of `concurrent` tasks.

    >>> sum(wave_loads(64, 64, 132, 1)), sum(wave_loads(64, 64, 132, 12))
    (2082, 804)
    """
    task = np.arange(height * width)
    row, col = super_m(task, height, width, group)
    wave = task // concurrent
    return len(np.unique(wave * height + row)), len(np.unique(wave * width + col))


@cache
def best_group(height: int, width: int, concurrent: int) -> int:
    """The rows per group that load the fewest tiles; 1, row by row, where nothing is better.

    >>> best_group(32, 16, 132) in GROUPS
    True
    """
    return min((g for g in GROUPS if g <= max(1, height)), key=lambda g: sum(wave_loads(height, width, concurrent, g)))


# ------------------------------------------------------------------ loads ahead of arithmetic


def pipeline_seconds(steps: int, load: float, compute: float, stages: int) -> float:
    """Time of a loop that loads and computes, with a ring of `stages` buffers.

    A load starts when its buffer is free, which is when step i - stages has been computed, and loads overlap; a step is
    computed when it is loaded and the one before is done.

    >>> [round(100 / pipeline_seconds(100, 3, 1, s), 2) for s in (1, 2, 3, 4)]
    [0.25, 0.5, 0.74, 0.97]
    """
    if min(steps, stages) < 1:
        raise InputError(f"a pipeline has at least one step and one stage, got {steps} and {stages}.")
    done = [0.0] * stages
    last = 0.0
    for i in range(steps):
        last = done[i % stages] = max(done[i % stages] + load, last) + compute
    return last


# ------------------------------------------------------------------ tiles in shared memory


def swizzle_width(cols: int, itemsize: int = 2) -> int:
    """Bytes per row of a panel, 128, 64 or 32: the widest that divides a row of `cols` numbers.

    Raises: InputError where a row is not a multiple of 32 bytes.
    """
    row = cols * itemsize
    if row < 32 or row % 32:
        raise InputError(f"rows of shared tiles are multiples of 32 bytes, got {cols} numbers of {itemsize} bytes.")
    return next(width for width in (128, 64, 32) if row % width == 0)


def swizzle(address: Any, width: int) -> Any:
    """Where byte `address` of a panel with rows of `width` bytes is stored: a xor (((a mod 8 width) >> 7) << 4).

    Any 8 rows of a column of 16 bytes then lie in different groups of banks.

    >>> swizzle(128, 128)
    144
    """
    return address ^ (((address % (8 * width)) >> 7) << 4)


def conflicts(width: int, swizzled: bool = True) -> int:
    """The most accesses to one group of banks (16 of 128 bytes) when 8 rows of a 16-byte column are read at once."""
    rows = np.arange(8)[:, None] * width
    worst = 0
    for column in range(0, width, 16):
        address = rows + column
        group = (swizzle(address, width) if swizzled else address) % 128 // 16
        worst = max(worst, int(np.bincount(group.ravel(), minlength=8).max()))
    return worst


def conformance_example() -> tuple[Any, tuple[Any, ...]]:
    """A kernel of the library, linear attention, with doubles for the check of its gradients."""
    import torch

    from foveate.ops.tile.linear_attention import linear_attention

    inputs = (torch.randn(1, 2, 7, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    return linear_attention, tuple(inputs)
