"""The compiled loops of `foveation`, in a file of their own so that numba is imported where they are used only.

Everything is float32, [B, C, rows, columns]; start and stop count rows of all maps, or maps.
"""

import math

import numba
import numpy as np

compiled = numba.njit(nogil=True, cache=True, fastmath={"contract", "nsz"})


@compiled
def reduce(x, out, start, stop):  # type: ignore[no-untyped-def]
    channels, height, width = x.shape[1], x.shape[2], x.shape[3]
    rows, columns = out.shape[2], out.shape[3]
    a, b = np.float32(1 / 8), np.float32(3 / 8)
    line = np.empty(2 * columns + 2, np.float32)
    for unit in range(start, stop):
        n, i = unit // rows, unit % rows
        plane, target = x[n // channels, n % channels], out[n // channels, n % channels, i]
        r0, r1 = plane[max(2 * i - 1, 0)], plane[2 * i]
        r2, r3 = plane[min(2 * i + 1, height - 1)], plane[min(2 * i + 2, height - 1)]
        for j in range(width):
            line[j + 1] = a * (r0[j] + r3[j]) + b * (r1[j] + r2[j])
        line[0] = line[1]
        for j in range(width + 1, 2 * columns + 2):
            line[j] = line[width]
        for j in range(columns):
            target[j] = a * (line[2 * j] + line[2 * j + 3]) + b * (line[2 * j + 1] + line[2 * j + 2])


@compiled
def add_expanded(x, small, out, sign, start, stop):  # type: ignore[no-untyped-def]
    channels, height, width = x.shape[1], x.shape[2], x.shape[3]
    rows, columns = small.shape[2], small.shape[3]
    far, near = np.float32(sign * 0.25), np.float32(sign * 0.75)
    a, b = np.float32(0.25), np.float32(0.75)
    line = np.empty(columns + 2, np.float32)
    for unit in range(start, stop):
        n, i = unit // height, unit % height
        plane = small[n // channels, n % channels]
        source, target = x[n // channels, n % channels, i], out[n // channels, n % channels, i]
        r0 = plane[i // 2]
        r1 = plane[min(i // 2 + 1, rows - 1)] if i % 2 else plane[max(i // 2 - 1, 0)]
        for j in range(columns):
            line[j + 1] = near * r0[j] + far * r1[j]
        line[0], line[columns + 1] = line[1], line[columns]
        for j in range(width // 2):
            target[2 * j] = source[2 * j] + (a * line[j] + b * line[j + 1])
            target[2 * j + 1] = source[2 * j + 1] + (b * line[j + 1] + a * line[j + 2])
        if width % 2:
            j = width // 2
            target[2 * j] = source[2 * j] + (a * line[j] + b * line[j + 1])


@compiled
def mix(f, z, out, ring, sector, alpha, sectors, eps, start, stop):  # type: ignore[no-untyped-def]
    channels, height, width = f.shape[1], f.shape[2], f.shape[3]
    rings = len(alpha)
    table = np.empty((rings + 2, sectors + 1, 6), np.float64)
    for unit in range(start, stop):
        picture, c = unit // channels, unit % channels
        table[:] = 0
        for i in range(height):
            for j in range(width):
                at, turn = ring[picture, i, j], sector[picture, i, j]
                if at <= -1:
                    continue
                r, s = math.floor(at), int(turn)
                down, across = at - r, turn - s
                a, b = f[picture, c, i, j], z[picture, c, i, j]
                for k in range(4):
                    w = (down if k // 2 else 1 - down) * (across if k % 2 else 1 - across)
                    cell = table[r + 1 + k // 2, s + k % 2]
                    cell[0] += w
                    cell[1] += w * w
                    cell[2] += w * a
                    cell[3] += w * a * a
                    cell[4] += w * b
                    cell[5] += w * b * b
        # The last sector's next one is the first.
        table[:, 0] += table[:, sectors]
        for r in range(rings + 2):
            for s in range(sectors):
                cell = table[r, s]
                mass = cell[0]
                if r == 0 or r > rings or mass <= 0 or mass * mass < 2 * cell[1]:
                    cell[0], cell[1], cell[2] = 0, 0, 0
                    continue
                mean, other = cell[2] / mass, cell[4] / mass
                spread = math.sqrt(max(cell[3] / mass - mean * mean, 0.0) + eps)
                gain = spread / math.sqrt(max(cell[5] / mass - other * other, 0.0) + eps)
                share = alpha[r - 1]
                cell[0], cell[1], cell[2] = share, share * gain, share * (mean - gain * other)
        table[:, sectors] = table[:, 0]
        for i in range(height):
            for j in range(width):
                at, turn = ring[picture, i, j], sector[picture, i, j]
                own = f[picture, c, i, j]
                if at <= -1:
                    out[picture, c, i, j] = own
                    continue
                r, s = math.floor(at), int(turn)
                down, across = at - r, turn - s
                share, gain, shift = 0.0, 0.0, 0.0
                for k in range(4):
                    w = (down if k // 2 else 1 - down) * (across if k % 2 else 1 - across)
                    cell = table[r + 1 + k // 2, s + k % 2]
                    share += w * cell[0]
                    gain += w * cell[1]
                    shift += w * cell[2]
                out[picture, c, i, j] = own * (1 - share) + z[picture, c, i, j] * gain + shift
