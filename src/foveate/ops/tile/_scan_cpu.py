# mypy: allow-untyped-defs
"""The compiled selective scan: blocks of channels `start` to `stop`, counted over all pictures, states in cache."""

from typing import Any

import numba
import numpy as np

compiled: Any = numba.njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"})
"""Sums may be taken in another order, so that loops become vector instructions."""


@compiled
def powers(step, rates, kept, bits):
    """kept = e^(step rates), a polynomial that the compiler turns into vector instructions (error 2e-7)."""
    scale = kept.view(np.int32)
    for n in range(len(rates)):
        x = min(max(step * rates[n] * np.float32(1.4426950408889634), np.float32(-126)), np.float32(126))
        whole = np.floor(x + np.float32(0.5))
        f = x - whole
        p = np.float32(1.5403530e-4)
        p = p * f + np.float32(1.3333558e-3)
        p = p * f + np.float32(9.6181291e-3)
        p = p * f + np.float32(5.5504109e-2)
        p = p * f + np.float32(2.4022651e-1)
        p = p * f + np.float32(6.9314718e-1)
        bits[n] = p * f + np.float32(1)
        scale[n] = (np.int32(whole) + np.int32(127)) << np.int32(23)
    for n in range(len(rates)):
        kept[n] *= bits[n]


@compiled
def forward(u, delta, a, b, c, y, starts, chunk, block, start, stop):
    length, width, states = u.shape[1], u.shape[2], a.shape[1]
    blocks = (width + block - 1) // block
    h = np.zeros((block, states), np.float32)
    kept, bits = np.empty(states, np.float32), np.empty(states, np.float32)
    for item in range(start, stop):
        i, d0 = item // blocks, item % blocks * block
        d1 = min(width, d0 + block)
        h[:] = 0
        for t in range(length):
            if t % chunk == 0:
                starts[i, t // chunk, d0:d1] = h[: d1 - d0]
            into, out_of = b[i, t], c[i, t]
            for d in range(d0, d1):
                step, line = delta[i, t, d], h[d - d0]
                powers(step, a[d], kept, bits)
                x, total = step * u[i, t, d], np.float32(0)
                for n in range(states):
                    line[n] = kept[n] * line[n] + x * into[n]
                    total += out_of[n] * line[n]
                y[i, t, d] = total


@compiled
def backward(u, delta, a, b, c, dy, starts, du, ddelta, da, db, dc, chunk, block, start, stop):
    length, width, states = u.shape[1], u.shape[2], a.shape[1]
    blocks = (width + block - 1) // block
    h = np.empty((chunk + 1, block, states), np.float32)
    keeps = np.empty((chunk, block, states), np.float32)
    g, bits = np.empty((block, states), np.float32), np.empty(states, np.float32)
    for item in range(start, stop):
        i, d0 = item // blocks, item % blocks * block
        d1 = min(width, d0 + block)
        g[:] = 0
        da[i, d0:d1] = 0
        for part in range((length + chunk - 1) // chunk - 1, -1, -1):
            first = part * chunk
            last = min(length, first + chunk)
            h[0, : d1 - d0] = starts[i, part, d0:d1]
            for t in range(first, last):
                into = b[i, t]
                for d in range(d0, d1):
                    step, kept = delta[i, t, d], keeps[t - first, d - d0]
                    powers(step, a[d], kept, bits)
                    x, old, new = step * u[i, t, d], h[t - first, d - d0], h[t - first + 1, d - d0]
                    for n in range(states):
                        new[n] = kept[n] * old[n] + x * into[n]
            for t in range(last - 1, first - 1, -1):
                into, out_of = b[i, t], c[i, t]
                into_sum, out_sum = db[i, item % blocks, t], dc[i, item % blocks, t]
                into_sum[:] = 0
                out_sum[:] = 0
                for d in range(d0, d1):
                    step, content, upstream = delta[i, t, d], u[i, t, d], dy[i, t, d]
                    kept, old, new = keeps[t - first, d - d0], h[t - first, d - d0], h[t - first + 1, d - d0]
                    rates, change, carried = a[d], da[i, d], g[d - d0]
                    x, dx, rate_sum = step * content, np.float32(0), np.float32(0)
                    for n in range(states):
                        grad = carried[n] + upstream * out_of[n]
                        out_sum[n] += new[n] * upstream
                        into_sum[n] += grad * x
                        dx += grad * into[n]
                        back = grad * kept[n]
                        dlog = back * old[n]
                        change[n] += dlog * step
                        rate_sum += dlog * rates[n]
                        carried[n] = back
                    du[i, t, d] = dx * step
                    ddelta[i, t, d] = dx * content + rate_sum
