"""The compiled loop of `foveate.ops.subpixel.two_layers`, in a file of its own so that numba is imported when used."""

from functools import cache
from typing import Any

import numba
import numpy as np

_fast: Any = numba.njit(nogil=True, fastmath={"contract", "nsz", "arcp", "reassoc"}, cache=True)


# A global: a loop that calls one of an enclosing function would be new in every process, and nothing cached.
@_fast
def _dot(weight, o, h, v0, v1, v2, v3):  # type: ignore[no-untyped-def]
    return v0 * weight[o, h] + v1 * weight[o, h + 1] + v2 * weight[o, h + 2] + v3 * weight[o, h + 3]


@cache
def two_layers(outputs: int) -> Any:
    """The kernel for a number of outputs: features side by side in the vector unit, a block of them at a time.

    Four hidden values are added per pass over the block's sums, which halves the traffic of sums and spares the sums
    across a vector that a loop along H would end in.
    """
    zero = np.float32(0)

    @_fast
    def two(a, b, weight, bias, start, stop, out):  # type: ignore[no-untyped-def]
        width, whole = a.shape[0], a.shape[0] // 4 * 4
        sums = np.empty((outputs, 256), np.float32)
        for first in range(start, stop, 256):
            count = min(256, stop - first)
            for s in range(b.shape[0]):
                for o in range(outputs):
                    sums[o, :] = bias[o]
                for h in range(0, whole, 4):
                    a0, a1 = a[h, first : first + count], a[h + 1, first : first + count]
                    a2, a3 = a[h + 2, first : first + count], a[h + 3, first : first + count]
                    b0, b1, b2, b3 = b[s, h], b[s, h + 1], b[s, h + 2], b[s, h + 3]
                    for i in range(count):
                        v0, v1 = max(a0[i] + b0, zero), max(a1[i] + b1, zero)
                        v2, v3 = max(a2[i] + b2, zero), max(a3[i] + b3, zero)
                        sums[0, i] += _dot(weight, 0, h, v0, v1, v2, v3)
                        if outputs > 1:
                            sums[1, i] += _dot(weight, 1, h, v0, v1, v2, v3)
                        if outputs > 2:
                            sums[2, i] += _dot(weight, 2, h, v0, v1, v2, v3)
                        if outputs > 3:
                            sums[3, i] += _dot(weight, 3, h, v0, v1, v2, v3)
                for h in range(whole, width):
                    for i in range(count):
                        v = max(a[h, first + i] + b[s, h], zero)
                        for o in range(outputs):
                            sums[o, i] += v * weight[o, h]
                for i in range(count):
                    for o in range(outputs):
                        out[first + i, s, o] = sums[o, i]

    return two
