# mypy: allow-untyped-defs
"""Gaussians to pixels on the CPU, compiled: tiles of 8 columns by 64 rows, see `foveate.ops.gaussians`.

A pair is a Gaussian and a tile that it touches, with the run of the tile's pixels from its first row to its last. Pairs
are ordered by tile, then by Gaussian. Tiles are drawn by as many threads as PyTorch uses; each writes pixels, or pairs,
of its own, so that nothing depends on who came first.

exp(-s) = (exp(-s / 32))^32 for s <= 18, the inner one by five terms of its series: plain products, which make vectors.
Signs of floats that are not negative order as those of whole numbers do, and v ^ o ^ max(v, o) is min(v, o).
"""

from math import ceil, floor, sqrt
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from foveate.ops.threads import in_parts

if TYPE_CHECKING:
    from foveate.ops.gaussians import Grid, Way

_WIDE, _HIGH = 8, 64
_CELLS = _WIDE * _HIGH
_plain: Any = numba.njit(nogil=True, cache=True)
_vector: Any = numba.njit(nogil=True, cache=True, fastmath={"contract", "nsz", "arcp", "reassoc"})

Array = npt.NDArray[Any]


def draw(centres: Tensor, conics: Tensor, colours: Tensor, way: "Way") -> tuple[Tensor, Tensor, Tensor]:
    """The picture [C, H, W], and for "topk" the sums of weights and the thresholds, [H, W] each."""
    places = _Places(centres, conics, way)
    height, width = way.grid.height, way.grid.width
    topk = way.mode == "topk"
    out = torch.empty(colours.shape[1], height, width)
    sums, thresholds = torch.empty(2, height, width) if topk else torch.empty(2, 1, 1)
    rest = (colours.detach().contiguous().numpy(), topk, way.k, way.eps)
    targets = (out.numpy(), sums.numpy(), thresholds.numpy())
    in_parts(lambda a, b: _draw(*places.arrays, *rest, a, b, *targets), places.tiles, 2)
    return out, sums, thresholds


def gather(
    centres: Tensor,
    conics: Tensor,
    colours: Tensor,
    way: "Way",
    upstream: Tensor,
    offset: Tensor | None,
    thresholds: Tensor | None,
) -> Tensor:
    """Sums over pixels of a r and of e d_x, e d_y, e d_x d_x, e d_x d_y, e d_y d_y for each Gaussian.

    Args:
        upstream: r, see `foveate.ops.gaussians._Rendered`.
        offset, thresholds: t and what `draw` gave, for "topk".

    Shape: upstream [C, H, W], offset and thresholds [H, W] -> [N, C + 5].
    """
    places = _Places(centres, conics, way)
    none = torch.empty(1, 1)
    given = (colours, upstream, none if offset is None else offset, none if thresholds is None else thresholds)
    sources = [t.detach().contiguous().numpy() for t in given]
    shares = np.empty((len(places.pairs), colours.shape[1] + 5), np.float32)
    topk = offset is not None
    in_parts(lambda a, b: _gather(*places.arrays, *sources, topk, a, b, shares), places.tiles, 2)
    total = np.zeros((len(centres), shares.shape[1]), np.float32)
    _add(places.pairs, shares, total)
    return torch.from_numpy(total)


class _Places:
    """Where Gaussians touch the tiles of a grid."""

    def __init__(self, centres: Tensor, conics: Tensor, way: "Way") -> None:
        grid = way.grid
        shapes = np.empty((len(centres), 5), np.float32)  # x, y, Qxx / 2, Qxy, Qyy / 2
        shapes[:, :2], shapes[:, 2:] = centres.detach().numpy(), conics.detach().numpy()
        cut = way.reach**2 / 2
        origin = (grid.column + grid.centre, grid.row + grid.centre)
        first, self.pairs = _pairs(shapes, cut, origin, (grid.dx, grid.dy), grid.height, grid.width)
        self.tiles = len(first) - 1
        shapes[:, 2] /= 2
        shapes[:, 4] /= 2
        self.arrays = (shapes, first, self.pairs, *_coordinates(grid), np.float32(cut))


def _coordinates(grid: "Grid") -> tuple[Array, Array]:
    """Places of columns and rows, filled up to whole tiles by repeating the last."""
    xs, ys = grid.xs().float().numpy(), grid.ys().float().numpy()
    wide, high = (np.pad(t, (0, -len(t) % n), mode="edge") for t, n in ((xs, _WIDE), (ys, _HIGH)))
    return wide, high


@_plain
def _pairs(shapes, cut, origin, step, height, width):
    """Count pairs of each tile, then write them: (Gaussian, start, stop) with start, stop within the tile's pixels."""
    down, across = (height + _HIGH - 1) // _HIGH, (width + _WIDE - 1) // _WIDE
    first = np.zeros(down * across + 1, np.int64)
    pairs = np.empty((0, 3), np.int32)
    at = first
    for writing in (False, True):
        if writing:
            for t in range(down * across):
                first[t + 1] += first[t]
            pairs = np.empty((first[-1], 3), np.int32)
            at = first.copy()
        for n in range(shapes.shape[0]):
            x, y = float(shapes[n, 0]), float(shapes[n, 1])
            a, b, c = float(shapes[n, 2]), float(shapes[n, 3]), float(shapes[n, 4])
            det = a * c - b * b
            if not (a > 0 and c > 0 and 0 < det < np.inf and abs(x) < np.inf and abs(y) < np.inf):
                continue
            ex, ey = sqrt(2 * cut * c / det), sqrt(2 * cut * a / det)
            if not (ex < 1e9 and ey < 1e9):
                ex, ey = min(ex, 1e9), min(ey, 1e9)
            top = -b / a * ey  # x of the lowest point of the ellipse, relative to its centre; the highest is at -top
            left, right = (x - ex) / step[0] - origin[0], (x + ex) / step[0] - origin[0]
            if right < 0 or left > width - 1:
                continue
            for q in range(max(0, floor(left) // _WIDE), min(across - 1, ceil(right) // _WIDE) + 1):
                # A sliver more on both sides: whether a pixel is inside is decided where it is drawn, in float32.
                xa = max((q * _WIDE - 0.01 + origin[0]) * step[0] - x, -ex)
                xb = min((q * _WIDE + _WIDE - 0.99 + origin[0]) * step[0] - x, ex)
                if xa > xb:
                    continue
                ra, rb = sqrt(max(0.0, 2 * cut * c - xa * xa * det)), sqrt(max(0.0, 2 * cut * c - xb * xb * det))
                high = ey if xa <= top <= xb else max((ra - b * xa) / c, (rb - b * xb) / c)
                low = -ey if xa <= -top <= xb else min((-ra - b * xa) / c, (-rb - b * xb) / c)
                above, below = (y + low) / step[1] - origin[1] - 0.01, (y + high) / step[1] - origin[1] + 0.01
                if below < 0 or above > height - 1:
                    continue
                r0, r1 = max(0, ceil(above)), min(height - 1, floor(below))
                for band in range(r0 // _HIGH, r1 // _HIGH + 1 if r1 >= r0 else 0):
                    t = q * down + band
                    if writing:
                        pairs[at[t], 0] = n
                        pairs[at[t], 1] = max(r0 - band * _HIGH, 0) * _WIDE
                        pairs[at[t], 2] = (min(r1 - band * _HIGH, _HIGH - 1) + 1) * _WIDE
                        at[t] += 1
                    else:
                        first[t + 1] += 1
    return first, pairs


@_vector
def _weigh(shape, xs, ys, cut, weights):
    """The Gaussian at each pixel of a run, 0 beyond the cut."""
    x, y, a, b, c = shape[0], shape[1], shape[2], shape[3], shape[4]
    zero, shrink = np.float32(0), np.float32(-1 / 32)
    p5, p4, p3 = np.float32(1 / 120), np.float32(1 / 24), np.float32(1 / 6)
    p2, p1 = np.float32(1 / 2), np.float32(1)
    for i in range(weights.shape[0]):
        u, v = xs[i] - x, ys[i] - y
        s = a * u * u + b * u * v + c * v * v
        t = s * shrink
        e = ((((p5 * t + p4) * t + p3) * t + p2) * t + p1) * t + p1
        e *= e
        e *= e
        e *= e
        e *= e
        e *= e
        weights[i] = e if s <= cut else zero


@_vector
def _accumulate(weights, value, row):
    for i in range(row.shape[0]):
        row[i] += value * weights[i]


@_plain
def _insert(new, best, rows, a, b):
    """Sort the values of `new` into columns a to b of `best`, where rows fall; the least are dropped."""
    for j in range(min(rows, best.shape[0])):
        row = best[j, a:b]
        left = np.int32(0)
        for i in range(new.shape[0]):
            v, o = new[i], row[i]
            high = max(v, o)
            low = v ^ o ^ high
            row[i] = high
            new[i] = low
            left |= low
        if left == 0:
            break


@_plain
def _above(weights, threshold):
    zero = np.float32(0)
    for i in range(weights.shape[0]):
        w = weights[i]
        weights[i] = w if w > threshold[i] else zero


@_plain
def _tile(t, xs, ys, height, width, tx, ty):
    """Fill in the places of a tile's pixels. Returns its rows and columns within the picture."""
    down = ys.shape[0] // _HIGH
    y0, x0 = t % down * _HIGH, t // down * _WIDE
    for r in range(_HIGH):
        for l in range(_WIDE):
            tx[r * _WIDE + l] = xs[x0 + l]
            ty[r * _WIDE + l] = ys[y0 + r]
    return y0, min(height, y0 + _HIGH), x0, min(width, x0 + _WIDE)


@_plain
def _put(values, picture, y0, y1, x0, x1):
    for y in range(y0, y1):
        for x in range(x0, x1):
            picture[y, x] = values[(y - y0) * _WIDE + x - x0]


@_plain
def _take(values, picture, y0, y1, x0, x1):
    for y in range(y0, y1):
        for x in range(x0, x1):
            values[(y - y0) * _WIDE + x - x0] = picture[y, x]


@_vector
def _draw(shapes, first, pairs, xs, ys, cut, colours, topk, k, eps, start, stop, out, sums, thresholds):
    channels, height, width = out.shape
    tx, ty, weights = np.empty(_CELLS, np.float32), np.empty(_CELLS, np.float32), np.empty(_CELLS, np.float32)
    total, threshold = np.empty((channels + 1, _CELLS), np.float32), np.empty(_CELLS, np.float32)
    best = np.zeros((k + 1 if topk else 0, _CELLS), np.float32)
    bits, best_bits = weights.view(np.int32), best.view(np.int32)
    half, one = np.float32(0.5), np.float32(1)
    for t in range(start, stop):
        y0, y1, x0, x1 = _tile(t, xs, ys, height, width, tx, ty)
        if topk:
            best[:] = 0
            for p in range(first[t], first[t + 1]):
                n, a, b = pairs[p, 0], pairs[p, 1], pairs[p, 2]
                _weigh(shapes[n], tx[a:b], ty[a:b], cut, weights[a:b])
                _insert(bits[a:b], best_bits, p - first[t] + 1, a, b)
            for i in range(_CELLS):
                threshold[i] = half * (best[k - 1, i] + best[k, i])
            _put(threshold, thresholds, y0, y1, x0, x1)
        total[:] = 0
        for p in range(first[t], first[t + 1]):
            n, a, b = pairs[p, 0], pairs[p, 1], pairs[p, 2]
            _weigh(shapes[n], tx[a:b], ty[a:b], cut, weights[a:b])
            if topk:
                _above(weights[a:b], threshold[a:b])
                _accumulate(weights[a:b], one, total[channels, a:b])
            for c in range(channels):
                _accumulate(weights[a:b], colours[n, c], total[c, a:b])
        if topk:
            _put(total[channels], sums, y0, y1, x0, x1)
            for c in range(channels):
                for i in range(_CELLS):
                    total[c, i] /= np.float32(eps) + total[channels, i]
        for c in range(channels):
            _put(total[c], out[c], y0, y1, x0, x1)


@_vector
def _moments(shape, xs, ys, weights, pull, share):
    """Sums of s u, s v, s u u, s u v, s v v over a run, where s = weight * pull and (u, v) leads from the centre."""
    x, y = shape[0], shape[1]
    su, sv, suu, suv, svv = np.float32(0), np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for i in range(weights.shape[0]):
        u, v, s = xs[i] - x, ys[i] - y, weights[i] * pull[i]
        p, q = s * u, s * v
        su += p
        sv += q
        suu += p * u
        suv += p * v
        svv += q * v
    share[0], share[1], share[2], share[3], share[4] = su, sv, suu, suv, svv


@_vector
def _dot(a, b):
    total = np.float32(0)
    for i in range(a.shape[0]):
        total += a[i] * b[i]
    return total


@_vector
def _gather(shapes, first, pairs, xs, ys, cut, colours, grad, offset, thresholds, topk, start, stop, shares):
    """What each pair adds to the gradients: of its Gaussian's colour, and the moments."""
    channels, height, width = grad.shape
    tx, ty, weights = np.empty(_CELLS, np.float32), np.empty(_CELLS, np.float32), np.empty(_CELLS, np.float32)
    own, pull = np.zeros((channels + 2, _CELLS), np.float32), np.empty(_CELLS, np.float32)
    for t in range(start, stop):
        y0, y1, x0, x1 = _tile(t, xs, ys, height, width, tx, ty)
        if y1 - y0 < _HIGH or x1 - x0 < _WIDE:
            own[:] = 0
        for c in range(channels):
            _take(own[c], grad[c], y0, y1, x0, x1)
        if topk:
            _take(own[channels], offset, y0, y1, x0, x1)
            _take(own[channels + 1], thresholds, y0, y1, x0, x1)
        for p in range(first[t], first[t + 1]):
            n, a, b = pairs[p, 0], pairs[p, 1], pairs[p, 2]
            w, force = weights[a:b], pull[a:b]
            _weigh(shapes[n], tx[a:b], ty[a:b], cut, w)
            force[:] = 0
            if topk:
                _above(w, own[channels + 1, a:b])
                _accumulate(own[channels, a:b], np.float32(-1), force)
            for c in range(channels):
                shares[p, c] = _dot(w, own[c, a:b])
                _accumulate(own[c, a:b], colours[n, c], force)
            _moments(shapes[n], tx[a:b], ty[a:b], w, force, shares[p, channels:])


@_plain
def _add(pairs, shares, total):
    for p in range(pairs.shape[0]):
        n = pairs[p, 0]
        for c in range(shares.shape[1]):
            total[n, c] += shares[p, c]
