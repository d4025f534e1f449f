"""Pixels to residuals and back: many simple predictors, each trusted as it did nearby.

A pixel is predicted from those above and to the left of it by ten linear rules, such as W, N, W + N - NW, 2N - NN. The
prediction is their mean with weights  1 / (sum of squared errors at W, N, NW, NE, WW, NN),  so that rules that follow
the texture at hand take over. Colour is predicted as G, R - G, B - (R + G) / 2, with four more rules that let a change
of G show in part.

What is kept is  symbol = pixel - prediction + 128 modulo 256:  a byte for a byte, whatever the pixel was. All is whole
numbers (predictions in quarters, weights rounded down), so that encoder and decoder agree on every machine.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
RULES, CROSS = 10, 4


def to_symbols(pixels: Bytes) -> Bytes:
    """Residuals of a picture. Shape: [1 or 3, H, W] -> the same; colour as R, G, B -> G, R, B."""
    symbols = np.empty_like(pixels, order="C")
    _kernel()(np.array(pixels, order="C"), symbols, False)
    return symbols


def to_pixels(symbols: Bytes) -> Bytes:
    """The picture that `to_symbols` took."""
    pixels = np.empty_like(symbols, order="C")
    _kernel()(pixels, np.array(symbols, order="C"), True)
    return pixels


@lru_cache(maxsize=1)
def _kernel() -> Any:
    """The pass over a picture, compiled when first used."""
    from numba import njit

    @njit(nogil=True, cache=True, error_model="numpy")
    def run(pixels: Any, symbols: Any, decode: bool) -> None:
        channels, height, width = pixels.shape
        rules = RULES + CROSS
        # Two rows above and two columns to the left of the picture, one to its right.
        seen = np.zeros((channels, 3, width + 3), np.int64)
        errors = np.zeros((channels, 3, width + 3, rules), np.int64)
        guess = np.zeros(rules, np.int64)
        seen[0] = 128
        for y in range(height):
            now, above, top = y % 3, (y - 1) % 3, (y - 2) % 3
            for c in range(channels):
                seen[c, now, 0] = seen[c, now, 1] = seen[c, above, 2]
                for r in range(rules):
                    errors[c, now, 0, r] = errors[c, now, 1, r] = errors[c, above, 2, r]
            for x in range(2, width + 2):
                base = 0
                for c in range(channels):
                    p, e = seen[c], errors[c]
                    w, n, nw, ne = p[now, x - 1], p[above, x], p[above, x - 1], p[above, x + 1]
                    guess[0], guess[1] = 4 * w, 4 * n
                    guess[2], guess[3] = 4 * (w + n - nw), 4 * (w + ne - n)
                    guess[4], guess[5] = 2 * (w + n) + ne - nw, 4 * (2 * n - p[top, x])
                    guess[6], guess[7] = 4 * (2 * w - p[now, x - 2]), 4 * (n + ne - p[top, x + 1])
                    guess[8], guess[9] = 2 * (w + ne), 4 * (w + nw - p[above, x - 2])
                    used = RULES
                    if c > 0:
                        used = rules
                        across, down = seen[0, now, x] - seen[0, now, x - 1], seen[0, now, x] - seen[0, above, x]
                        guess[10], guess[11] = 4 * w - across, 4 * w + across
                        guess[12], guess[13] = 4 * n - down, 4 * n + down
                    weights, mean = np.int64(0), np.int64(0)
                    for r in range(used):
                        error = 2 * (e[now, x - 1, r] + e[above, x, r]) + e[now, x - 2, r] + e[top, x, r]
                        error += e[above, x - 1, r] + e[above, x + 1, r]
                        weight = np.uint64(1 << 28) // np.uint64(error + 16) + np.uint64(1)
                        weights += np.int64(weight)
                        mean += np.int64(weight) * guess[r]
                    predicted = (mean + 2 * weights) // (4 * weights)
                    plane = c if channels == 1 else (1, 0, 2)[c]
                    if decode:
                        value = (base + predicted + symbols[c, y, x - 2] - 128) & 255
                        pixels[plane, y, x - 2] = value
                    else:
                        value = np.int64(pixels[plane, y, x - 2])
                        symbols[c, y, x - 2] = (value - base - predicted + 128) & 255
                    p[now, x] = value - base
                    for r in range(used):
                        e[now, x, r] = (4 * p[now, x] - guess[r]) ** 2
                    base = value if c == 0 else (base + value) >> 1
                    if y == 0:  # nothing is above: what was just seen stands for it
                        begin = 0 if x == 2 else x
                        for row in range(3):
                            for column in range(begin, min(x, width) + 3):
                                p[row, column] = p[now, x]
            for c in range(channels):
                seen[c, now, width + 2] = seen[c, now, width + 1]
                for r in range(rules):
                    errors[c, now, width + 2, r] = errors[c, now, width + 1, r]

    return run
