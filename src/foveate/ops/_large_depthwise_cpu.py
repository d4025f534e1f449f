"""The compiled loops of `large_depthwise`, in a file of their own so that numba is imported where they are used only.

Everything is float32 and in blocks of LANES channels, [blocks, rows, columns, LANES].
"""

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from foveate.ops.large_depthwise import LANES, TILE

EDGE = TILE - 1
"""Columns of zeros beside a map, into which the last outputs of a tile may look."""

PIXEL = 4 * LANES
"""Bytes of a position."""


# A global of the loops below: a variable of an enclosing function would be new in every process, and nothing cached.
@intrinsic
def correlate(typing, out, a, a_row, b, b_row, rows, columns):  # type: ignore[no-untyped-def]
    """out[t] = sum over i < rows, j < columns of a[i, j] b[i, j + t], for t < TILE.

    Addresses and distances between rows are in bytes; a position is `LANES` floats. These are vector instructions,
    since loops over arrays would be compiled to keep their sums in memory.
    """

    def generate(context, builder, _, arguments):  # type: ignore[no-untyped-def]
        out, a, a_row, b, b_row, rows, columns = arguments
        vector, word, nothing = ir.VectorType(ir.FloatType(), 8), a.type, ir.FunctionType(ir.VoidType(), [])
        kind = ir.FunctionType(vector, [vector] * 3)
        multiply_add = cgutils.get_or_insert_function(builder.module, kind, "llvm.fmuladd.v8f32")

        def at(address, offset):  # type: ignore[no-untyped-def]
            return builder.inttoptr(builder.add(address, word(offset)), vector.as_pointer())

        halves = range(0, PIXEL, 32)
        places = [t * PIXEL + half for t in range(TILE) for half in halves]
        totals = {n: cgutils.alloca_once_value(builder, ir.Constant(vector, None)) for n in places}
        with cgutils.for_range(builder, rows) as row:
            a_start = builder.add(a, builder.mul(row.index, a_row))
            b_start = builder.add(b, builder.mul(row.index, b_row))
            with cgutils.for_range(builder, columns) as column:
                step = builder.mul(column.index, word(PIXEL))
                a_here, b_here = builder.add(a_start, step), builder.add(b_start, step)
                # An empty instruction that may have changed memory: without it several columns are taken at once,
                # what they share is kept, and the sums no longer fit the registers (half the speed).
                builder.asm(nothing, "", "~{memory}", [], True)
                left = [builder.load(at(a_here, half), align=4) for half in halves]
                for n, total in totals.items():
                    right, before = builder.load(at(b_here, n), align=4), builder.load(total)
                    after = builder.call(multiply_add, [left[n % PIXEL // 32], right, before])
                    builder.store(after, total)
        for n, total in totals.items():
            builder.store(builder.load(total), at(out, n), align=4)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 7), generate


compiled = numba.njit(nogil=True, cache=True)


@compiled
def convolve(x, weight, out, width, start, stop):  # type: ignore[no-untyped-def]
    height, across = x.shape[1], x.shape[2] * PIXEL
    kernels, k, l = weight.shape[0], weight.shape[1], weight.shape[2]
    for unit in range(start, stop):
        n, i = unit // height, unit % height
        top, bottom = max(0, k // 2 - i), min(k, height - i + k // 2)  # taps whose row is on the map
        row = x.ctypes.data + (n * height + i + top - k // 2) * across
        kernel = weight.ctypes.data + (n % kernels * k + top) * l * PIXEL
        for j in range(0, width, TILE):
            left, right = max(0, l // 2 - j - EDGE), min(l, width - j + l // 2)
            source, target = row + (EDGE + j + left - l // 2) * PIXEL, (unit * out.shape[2] + j) * PIXEL
            taps = kernel + left * PIXEL
            correlate(out.ctypes.data + target, taps, l * PIXEL, source, across, bottom - top, right - left)  # type: ignore[call-arg]


@compiled
def weigh(x, gradient, out, width, start, stop):  # type: ignore[no-untyped-def]
    height, w, across = x.shape[1], gradient.shape[2], x.shape[2] * PIXEL
    kernels, k = out.shape[0], out.shape[1]
    found = np.empty((TILE, LANES), np.float32)
    for unit in range(start, stop):
        c, u = unit // k, unit % k
        top, bottom = max(0, k // 2 - u), min(height, height + k // 2 - u)  # outputs whose tap u is on the map
        for v in range(0, width, TILE):
            left, right = max(0, width // 2 - v - EDGE), min(w, w + width // 2 - v)
            for n in range(c, x.shape[0], kernels):
                row = x.ctypes.data + (n * height + top + u - k // 2) * across
                source = row + (EDGE + left + v - width // 2) * PIXEL
                towards = gradient.ctypes.data + ((n * height + top) * w + left) * PIXEL
                correlate(found.ctypes.data, towards, w * PIXEL, source, across, bottom - top, right - left)  # type: ignore[call-arg]
                out[c, u, v : v + TILE] += found
