"""Compiled loops of `foveate.ops.neighbourhood_attention`: a row of queries at a time, columns innermost.

For a row of queries the scores of one neighbour (u, v) are products of runs: its key lies as far to the side of every
query alike, but for those within k // 2 of the left or right border, whose neighbourhood is that of the first or last
query that has room: there one key serves all. Three products of that kind are all there is, of maps a, b [d, H, W] and
what belongs to a row, p [k * k, W]:

    pair      p[t, j] = sum_c a[c, i, j] b[c, s_i + u, s_j + v]          scores from q and k, their gradients from dy, v
    gather    a[c, i, j] = sum_t p[t, j] b[c, s_i + u, s_j + v]          y from A and v, dq from dS and k
    scatter   b[c, s_i + u, s_j + v] += p[t, j] a[c, i, j]               dk from dS and q, dv from A and dy

The attention of a row is forgotten after it and made again for the gradients, so nothing but a row of it is ever held.
Threads share rows forward, and heads backward, whose keys' gradients each row adds to.
"""

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from foveate.ops.threads import in_parts

_compiled: Any = numba.njit(nogil=True, fastmath={"contract", "nsz", "reassoc"}, cache=True, error_model="numpy")
_LOG2_E, _HALF, _LEAST, _ONE = np.float32(1.4426950408889634), np.float32(0.5), np.float32(-126), np.float32(1)
# exp(x) = 2^n 2^f, n whole and |f| <= 1/2: six terms of a series and shifted bits make vectors, a call does not.
_C1, _C2, _C3, _C4, _C5, _C6 = (np.float32(np.log(2) ** i / f) for i, f in enumerate((1, 2, 6, 24, 120, 720), 1))


def neighbourhood_cpu(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kernel_size: int) -> Tensor:
    """`neighbourhood_reference` for float32.

    Shape: q (scaled), k, v [B, h, d, H, W], bias [h, 2k - 1, 2k - 1] or None -> [B, h, d, H, W].
    """
    table = q.new_zeros(q.shape[1], 2 * kernel_size - 1, 2 * kernel_size - 1) if bias is None else bias
    return _Neighbourhood.apply(q, k, v, table, kernel_size)


class _Neighbourhood(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, kernel_size: int) -> Tensor:
        q, k, v, bias = (x.contiguous() for x in (q, k, v, bias))
        ctx.save_for_backward(q, k, v, bias)
        ctx.kernel_size = kernel_size
        out = torch.empty_like(q)
        arrays = (*_planes(q, k, v), bias.detach().numpy(), *_planes(out))
        rows = q.shape[0] * q.shape[1] * q.shape[3]
        in_parts(lambda i, j: _forward(*arrays, kernel_size, i, j), rows, 1)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        q, k, v, bias = ctx.saved_tensors
        dq, (dk, dv) = torch.empty_like(q), (torch.zeros_like(x) for x in (k, v))
        dbias = bias.new_zeros(len(q), *bias.shape)
        arrays = (*_planes(q, k, v), bias.detach().numpy(), *_planes(dout.contiguous(), dq, dk, dv))
        sums = dbias.flatten(0, 1).numpy()
        units = q.shape[0] * q.shape[1]
        in_parts(lambda i, j: _backward(*arrays, sums, ctx.kernel_size, i, j), units, 1)
        return dq, dk, dv, dbias.sum(0), None


def _planes(*tensors: Tensor) -> tuple[Any, ...]:
    """One stack of channels for each head of each picture. Shape: [B, h, d, H, W] -> [B * h, d, H, W]."""
    return tuple(t.detach().flatten(0, 1).numpy() for t in tensors)


@_compiled
def _pair(a, i, b, first, side, p):  # type: ignore[no-untyped-def]
    r, width = side // 2, a.shape[2]
    last, n = width - r, width - 2 * r
    for u in range(side):
        for v in range(side):
            total, row, right, c = p[u * side + v], first + u, width - side + v, 0
            while c + 4 <= a.shape[0]:
                a0, a1, a2, a3 = a[c, i], a[c + 1, i], a[c + 2, i], a[c + 3, i]
                b0, b1, b2, b3 = b[c, row], b[c + 1, row], b[c + 2, row], b[c + 3, row]
                l0, l1, l2, l3 = b0[v], b1[v], b2[v], b3[v]
                for j in range(r):
                    total[j] += a0[j] * l0 + a1[j] * l1 + a2[j] * l2 + a3[j] * l3
                for j in range(n):
                    k = j + r
                    total[k] += a0[k] * b0[j + v] + a1[k] * b1[j + v] + a2[k] * b2[j + v] + a3[k] * b3[j + v]
                l0, l1, l2, l3 = b0[right], b1[right], b2[right], b3[right]
                for j in range(last, width):
                    total[j] += a0[j] * l0 + a1[j] * l1 + a2[j] * l2 + a3[j] * l3
                c += 4
            while c < a.shape[0]:
                a0, b0 = a[c, i], b[c, row]
                for j in range(r):
                    total[j] += a0[j] * b0[v]
                for j in range(n):
                    total[j + r] += a0[j + r] * b0[j + v]
                for j in range(last, width):
                    total[j] += a0[j] * b0[right]
                c += 1


@_compiled
def _gather(p, b, first, side, a, i):  # type: ignore[no-untyped-def]
    r, width = side // 2, a.shape[2]
    last, n, e = width - r, width - 2 * r, width - side
    for c in range(a.shape[0]):
        a[c, i, :] = 0
    for u in range(side):
        v = 0
        while v < side:
            # Neighbours by threes; _ONE or two left over are joined by rows that count nothing.
            m1, m2 = min(v + 1, side - 1), min(v + 2, side - 1)
            w1, w2 = np.float32(v + 1 < side), np.float32(v + 2 < side)
            p0, p1, p2 = p[u * side + v], p[u * side + m1], p[u * side + m2]
            for c in range(a.shape[0]):
                total, row = a[c, i], b[c, first + u]
                b0, b1, b2 = row[v : v + n], row[m1 : m1 + n], row[m2 : m2 + n]
                l0, l1, l2 = row[v], w1 * row[m1], w2 * row[m2]
                for j in range(r):
                    total[j] += p0[j] * l0 + p1[j] * l1 + p2[j] * l2
                for j in range(n):
                    k = j + r
                    total[k] += p0[k] * b0[j] + w1 * (p1[k] * b1[j]) + w2 * (p2[k] * b2[j])
                l0, l1, l2 = row[e + v], w1 * row[e + m1], w2 * row[e + m2]
                for j in range(last, width):
                    total[j] += p0[j] * l0 + p1[j] * l1 + p2[j] * l2
            v += 3


@_compiled
def _scatter(p, a, i, b, first, side):  # type: ignore[no-untyped-def]
    r, width = side // 2, a.shape[2]
    last, n = width - r, width - 2 * r
    for c in range(a.shape[0]):
        flow = a[c, i]
        for u in range(side):
            row = b[c, first + u]
            for v in range(side):
                share, at_left, at_right = p[u * side + v], np.float32(0), np.float32(0)
                for j in range(r):
                    at_left += share[j] * flow[j]
                for j in range(n):
                    row[j + v] += share[j + r] * flow[j + r]
                for j in range(last, width):
                    at_right += share[j] * flow[j]
                row[v] += at_left
                row[width - side + v] += at_right


@_compiled
def _attend(q, k, bias, i, first, side, p, whole, power, top):  # type: ignore[no-untyped-def]
    r, width = side // 2, q.shape[2]
    for u in range(side):
        relative = bias[first + u - i + side - 1]
        for v in range(side):
            row = p[u * side + v]
            row[:] = relative[v - r + side - 1]
            for j in range(r):
                row[j] = relative[v - j + side - 1]
                row[width - 1 - j] = relative[v + j]
    _pair(q, i, k, first, side, p)
    top[:] = p[0]
    for t in range(1, len(p)):
        row = p[t]
        for j in range(width):
            top[j] = max(top[j], row[j])
    total = power[1]
    total[:] = 0
    for t in range(len(p)):
        row, scales = p[t], power[0]
        for j in range(width):
            x = max((row[j] - top[j]) * _LOG2_E, _LEAST)
            nearest = np.floor(x + _HALF)
            f = x - nearest
            row[j] = _ONE + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * _C6)))))
            whole[j] = (np.int32(nearest) + 127) << 23
        for j in range(width):
            row[j] *= scales[j]
            total[j] += row[j]
    for j in range(width):
        total[j] = _ONE / total[j]
    for t in range(len(p)):
        row = p[t]
        for j in range(width):
            row[j] *= total[j]


@_compiled
def _forward(q, k, v, bias, out, side, start, stop):  # type: ignore[no-untyped-def]
    height, width = q.shape[2:]
    p, power, top = np.empty((side * side, width), q.dtype), np.empty((2, width), q.dtype), np.empty(width, q.dtype)
    whole = power[0].view(np.int32)
    for number in range(start, stop):
        unit, i = number // height, number % height
        first = min(max(i - side // 2, 0), height - side)
        _attend(q[unit], k[unit], bias[unit % len(bias)], i, first, side, p, whole, power, top)
        _gather(p, v[unit], first, side, out[unit], i)


@_compiled
def _backward(q, k, v, bias, dout, dq, dk, dv, dbias, side, start, stop):  # type: ignore[no-untyped-def]
    height, width, r = q.shape[2], q.shape[3], side // 2
    p, power, top = np.empty((side * side, width), q.dtype), np.empty((2, width), q.dtype), np.empty(width, q.dtype)
    whole, ds = power[0].view(np.int32), np.empty_like(p)
    for unit in range(start, stop):
        for i in range(height):
            first = min(max(i - r, 0), height - side)
            _attend(q[unit], k[unit], bias[unit % len(bias)], i, first, side, p, whole, power, top)
            _scatter(p, dout[unit], i, dv[unit], first, side)
            ds[:] = 0
            _pair(dout[unit], i, v[unit], first, side, ds)
            mean = top
            mean[:] = 0
            for t in range(len(p)):
                share, slope = p[t], ds[t]
                for j in range(width):
                    mean[j] += share[j] * slope[j]
            for u in range(side):
                relative = dbias[unit, first + u - i + side - 1]
                for w in range(side):
                    share, slope = p[u * side + w], ds[u * side + w]
                    for j in range(width):
                        slope[j] = share[j] * (slope[j] - mean[j])
                    inside = np.float32(0)
                    for j in range(r, width - r):
                        inside += slope[j]
                    relative[w - r + side - 1] += inside
                    for j in range(r):
                        relative[w - j + side - 1] += slope[j]
                        relative[w + j] += slope[width - 1 - j]
            _gather(ds, k[unit], first, side, dq[unit], i)
            _scatter(ds, q[unit], i, dk[unit], first, side)
