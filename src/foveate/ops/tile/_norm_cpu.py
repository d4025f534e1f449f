# mypy: allow-untyped-defs
"""The compiled residual, dropout and LayerNorm of rows [rows, C]; see `foveate.ops.tile.layer_norm`."""

from typing import Any

import numba
import numpy as np

compiled: Any = numba.njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"})
"""Sums may be taken in another order, so that loops become vector instructions."""

MIXING = tuple(np.uint32(word) for word in (0x7FEB352D, 0x846CA68B, 16, 15, 8))


@compiled
def scramble(x):
    first, second, sixteen, fifteen, _ = MIXING
    x = np.uint32((x ^ (x >> sixteen)) * first)
    x = np.uint32((x ^ (x >> fifteen)) * second)
    return np.uint32(x ^ (x >> sixteen))


@compiled
def drop(line, row, seed, threshold, gain):
    """Set dropped elements to zero, and scale the others up."""
    place = scramble(np.uint32(np.uint32(row) ^ scramble(np.uint32(seed))))
    least, scale = np.uint32(threshold), np.float32(gain)
    for i in range(len(line)):
        draw = scramble(np.uint32(np.uint32(i) ^ place)) >> MIXING[4]
        line[i] *= scale if draw >= least else np.float32(0)


@compiled
def forward(x, residual, weight, bias, seed, y, total, mean, rstd, eps, threshold, gain, start, stop):
    width = x.shape[1]
    for row in range(start, stop):
        line, out = total[row], y[row]
        line[:] = x[row]
        drop(line, row, seed[0], threshold, gain)
        middle, spread = np.float32(0), np.float32(0)
        for i in range(width):
            line[i] += residual[row, i]
            middle += line[i]
        middle /= np.float32(width)
        for i in range(width):
            spread += (line[i] - middle) * (line[i] - middle)
        inverse = np.float32(1) / np.sqrt(spread / np.float32(width) + np.float32(eps))
        mean[row], rstd[row] = middle, inverse
        for i in range(width):
            out[i] = (line[i] - middle) * inverse * weight[i] + bias[i]


@compiled
def backward(total, weight, mean, rstd, seed, dy, dtotal, dx, dresidual, dweight, dbias, threshold, gain, start, stop):
    (rows, width), parts = total.shape, len(dweight)
    for part in range(start, stop):
        dweight[part] = 0
        dbias[part] = 0
        for row in range(rows * part // parts, rows * (part + 1) // parts):
            line, out, middle, inverse = total[row], dresidual[row], mean[row], rstd[row]
            level, slope = np.float32(0), np.float32(0)
            for i in range(width):
                normal = (line[i] - middle) * inverse
                dweight[part, i] += dy[row, i] * normal
                dbias[part, i] += dy[row, i]
                level += dy[row, i] * weight[i]
                slope += dy[row, i] * weight[i] * normal
            level /= np.float32(width)
            slope /= np.float32(width)
            for i in range(width):
                normal = (line[i] - middle) * inverse
                out[i] = (dy[row, i] * weight[i] - level - normal * slope) * inverse + dtotal[row, i]
            dx[row] = out
            drop(dx[row], row, seed[0], threshold, gain)
