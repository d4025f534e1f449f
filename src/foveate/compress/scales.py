"""Gaussian tables for learned codecs: one for each of a grid of scales, from whole numbers alone.

A learned codec predicts mean and scale of every rounded value. The mean is taken off first; the scale picks a table:

    p(k) = Phi((k + 1/2) / s) - Phi((k - 1/2) / s)      s = SCALES[i] / 4096, eight steps to an octave, 0.11 to 256

Phi comes from the recursion d(x + h) = d(x) exp(-x h - h^2 / 2) of the density, in whole numbers of 2^-96, so that the
tables are the same everywhere; library functions such as erf differ in the last bit between machines. For the same
reason `scale_index` takes scales in whole units of 1/4096: a network's scales are to be made whole where they are
computed the same everywhere, by whole-number arithmetic.
"""

from functools import lru_cache
from itertools import pairwise
from math import isqrt

import numpy as np
import numpy.typing as npt

from foveate.compress.entropy import Ints, Table, quantise
from foveate.errors import InputError

UNIT = 4096
_STEP = 256  # grid points of Phi in an interval of 1
_REACH = 8  # Phi is 1 beyond, to 2^-48
_BITS = 96


def _scales() -> Ints:
    """451/4096 = 0.11 times powers of 2^(1/8), which is the square root of 2 taken thrice, in 2^-60."""
    root = 2 << 60
    for _ in range(3):
        root = isqrt(root << 60)
    grid, power = [], 1 << 60
    for _ in range(91):
        grid.append(451 * power >> 60)
        power = power * root >> 60
    return np.array(grid, np.int64)


SCALES = _scales()


def scale_index(scales: npt.ArrayLike) -> Ints:
    """The table for each scale: the first that is at least as wide, or the widest.

    Args:
        scales: in whole units of 1/4096.

    Raises: InputError for floating point.
    """
    given = np.asarray(scales)
    if given.dtype.kind not in "iu":
        raise InputError(f"scales are whole units of 1/{UNIT}, got {given.dtype}; make them whole before they differ.")
    return np.minimum(np.searchsorted(SCALES, given), SCALES.size - 1).astype(np.int64)


@lru_cache(maxsize=1)
def gaussian_tables() -> tuple[Table, ...]:
    """A table with an escape for every scale of the grid."""
    return tuple(_table(int(scale)) for scale in SCALES)


def _table(scale: int) -> Table:
    reach = 1 + 5 * scale // UNIT
    edges = np.arange(reach + 1, dtype=np.int64) * 2 + 1  # twice the edges 1/2, 3/2, ... of k = 0, 1, ...
    place, rest = np.divmod(edges * UNIT * _STEP, 2 * scale)
    phi = _phi()
    place = np.minimum(place, phi.size - 2)
    upper = phi[place] + (phi[place + 1] - phi[place]) * rest // (2 * scale)
    half = np.diff(upper)  # k = 1, 2, ...
    middle = 2 * upper[0] - (1 << 32)
    tail = 2 * ((1 << 32) - upper[-1])
    masses = np.concatenate([half[::-1], [middle], half, [tail]])
    return Table(quantise(masses), lowest=-reach, escape=True)


@lru_cache(maxsize=1)
def _phi() -> Ints:
    """Phi at 0, h, 2h, ... in 2^-32, by the trapezium rule."""
    one = 1 << _BITS
    density, values, total = one, [one], 0
    half_square = one // (2 * _STEP * _STEP)
    ratio, shrink = _exp_minus(half_square), _exp_minus(2 * half_square)
    for _ in range(_REACH * _STEP):
        density = density * ratio >> _BITS
        ratio = ratio * shrink >> _BITS
        values.append(density)
    sums = [0]
    for a, b in pairwise(values):
        total += a + b
        sums.append(total)
    return np.array([(1 << 31) + (s << 31) // total for s in sums], np.int64)


def _exp_minus(x: int) -> int:
    """exp(-x) by its series, all in 2^-96."""
    term = total = 1 << _BITS
    for n in range(1, 40):
        term = -(term * x >> _BITS) // n
        total += term
    return total
