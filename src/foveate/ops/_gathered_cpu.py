"""Compiled loops of `foveate.ops.gathered` where weights vary over the picture and taps lie on whole pixels.

One channel of one picture at a time is copied into a small plane with the zeros around it, columns sorted by their
remainder modulo the stride, so that at any stride the samples of a tap for a row of outputs are one run in memory,
`base[t]` further than those of the first. What is left are products of runs:

    forward     y[row] += weight[t, row] plane[base[t] + row]
    backward    dplane[base[t] + row] += weight[t, row] dy[row]        dweight[t, row] += dy[row] plane[base[t] + row]

Nothing of T times the size of x exists but the weights themselves. Planes that share weights follow each other, so
that the weights stay in cache.
"""

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from foveate.ops.gathered import Geometry, channel_groups
from foveate.ops.threads import in_parts

_compiled: Any = numba.njit(nogil=True, fastmath={"contract", "nsz", "reassoc"}, cache=True, error_model="numpy")


def shifted_cpu(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """`gathered_reference` without offsets.

    Shape: x [B, C, H, W], weight [B or 1, G, T, Ho, Wo], both float32 or float64.
    """
    return _Shifted.apply(x, weight, geometry)


class _Plan:
    """Planes in the order of their weights, and where the runs of each tap lie in a padded plane."""

    def __init__(self, x: Tensor, weight: Tensor, geometry: Geometry) -> None:
        b, c = x.shape[:2]
        taps = np.array(geometry.taps, np.int64)
        left, top = taps.min(0)
        (down, across), (rows, columns) = geometry.stride, geometry.size
        shift_x, shift_y = taps[:, 0] - left, taps[:, 1] - top
        line = columns + int(shift_x.max()) // across  # columns of one remainder
        count = (rows - 1) * down + int(shift_y.max()) + 1
        self.base = (shift_x % across * count + shift_y) * line + shift_x // across
        self.shape = np.array([across, count, line, -top, -left, down * line])
        group = channel_groups(c, weight.shape[1], geometry.interleaved)
        channels = group.argsort(stable=True)
        if len(weight) == 1:
            order = (torch.arange(b).repeat(c), channels.repeat_interleave(b))
        else:
            order = (torch.arange(b).repeat_interleave(c), channels.repeat(b))
        owner = order[0] * (len(weight) > 1)
        self.planes = torch.stack((*order, owner, group[order[1]]), 1).numpy()  # picture, channel, and of the weights
        self.owners, self.shared = len(weight) * weight.shape[1], len(self.planes) // (len(weight) * weight.shape[1])


class _Shifted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.plan = plan = _Plan(x, weight, geometry)
        out = x.new_empty(*x.shape[:2], *geometry.size)
        arrays = _arrays(x, weight, out)
        form = (plan.base, plan.shape, plan.planes)
        in_parts(lambda i, j: _forward(*arrays, *form, i, j), len(plan.planes), 1)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        plan, dout, dx, dweight = ctx.plan, dout.contiguous(), None, None
        form = (plan.base, plan.shape, plan.planes)
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            of_x = _arrays(dx, weight, dout)
            in_parts(lambda i, j: _to_x(*of_x, *form, i, j), len(plan.planes), 1)
        if ctx.needs_input_grad[1]:
            dweight = torch.zeros_like(weight)
            of_weight = _arrays(x, dweight, dout)
            # Rows of one owner's weights are shared out only where there are too few owners for the threads.
            parts = min(weight.shape[3], -(-torch.get_num_threads() // plan.owners))
            units = plan.owners * parts
            in_parts(lambda i, j: _to_weight(*of_weight, *form, plan.shared, parts, i, j), units, 1)
        return dx, dweight, None


def _arrays(*tensors: Tensor) -> tuple[Any, ...]:
    return tuple(t.detach().numpy() for t in tensors)


# Globals: a loop that calls one of an enclosing function would be new in every process, and nothing cached.
@_compiled
def _fill(x, shape, plane):  # type: ignore[no-untyped-def]
    across, count, line, top, left = shape[0], shape[1], shape[2], shape[3], shape[4]
    for phase in range(across):
        first = (phase - left) % across  # the first column of x with this remainder
        at = (first + left) // across
        for i in range(max(0, -top), min(x.shape[0], count - top)):
            start = (phase * count + i + top) * line
            row = x[i]
            skip = max(0, -at)
            for j in range(skip, min(line - at, (x.shape[1] - first + across - 1) // across)):
                plane[start + at + j] = row[first + j * across]


@_compiled
def _forward(x, weight, out, base, shape, planes, start, stop):  # type: ignore[no-untyped-def]
    plane = np.zeros(shape[0] * shape[1] * shape[2], x.dtype)
    taps, rows, n = weight.shape[2], out.shape[2], out.shape[3]
    for unit in range(start, stop):
        b, c, owner, g = planes[unit]
        _fill(x[b, c], shape, plane)
        for i in range(rows):
            total, at = out[b, c, i], i * shape[5]
            total[:] = 0
            t = 0
            while t + 4 <= taps:
                w0, w1 = weight[owner, g, t, i], weight[owner, g, t + 1, i]
                w2, w3 = weight[owner, g, t + 2, i], weight[owner, g, t + 3, i]
                a0, a1, a2, a3 = at + base[t], at + base[t + 1], at + base[t + 2], at + base[t + 3]
                x0, x1, x2, x3 = plane[a0 : a0 + n], plane[a1 : a1 + n], plane[a2 : a2 + n], plane[a3 : a3 + n]
                for j in range(n):
                    total[j] += w0[j] * x0[j] + w1[j] * x1[j] + w2[j] * x2[j] + w3[j] * x3[j]
                t += 4
            while t < taps:
                w0, x0 = weight[owner, g, t, i], plane[at + base[t] : at + base[t] + n]
                for j in range(n):
                    total[j] += w0[j] * x0[j]
                t += 1


@_compiled
def _to_x(dx, weight, dout, base, shape, planes, start, stop):  # type: ignore[no-untyped-def]
    plane = np.empty(shape[0] * shape[1] * shape[2], dx.dtype)
    across, count, line, top, left = shape[0], shape[1], shape[2], shape[3], shape[4]
    taps, rows, n = weight.shape[2], dout.shape[2], dout.shape[3]
    for unit in range(start, stop):
        b, c, owner, g = planes[unit]
        plane[:] = 0
        for i in range(rows):
            up, at = dout[b, c, i], i * shape[5]
            for t in range(taps):
                w, target = weight[owner, g, t, i], plane[at + base[t] : at + base[t] + n]
                for j in range(n):
                    target[j] += w[j] * up[j]
        for i in range(dx.shape[2]):
            row = dx[b, c, i]
            row[:] = 0
            if 0 <= i + top < count:
                for j in range(max(0, -left), dx.shape[3]):
                    place = (j + left) // across
                    if place < line:
                        row[j] = plane[((j + left) % across * count + i + top) * line + place]


@_compiled
def _to_weight(x, dweight, dout, base, shape, planes, shared, parts, start, stop):  # type: ignore[no-untyped-def]
    plane = np.zeros(shape[0] * shape[1] * shape[2], x.dtype)
    taps, rows, n = dweight.shape[2], dout.shape[2], dout.shape[3]
    for unit in range(start, stop):
        first, part = unit // parts * shared, unit % parts
        for k in range(first, first + shared):
            b, c, owner, g = planes[k]
            _fill(x[b, c], shape, plane)
            for t in range(taps):
                for i in range(part * rows // parts, (part + 1) * rows // parts):
                    target, up = dweight[owner, g, t, i], dout[b, c, i]
                    seen = plane[i * shape[5] + base[t] : i * shape[5] + base[t] + n]
                    for j in range(n):
                        target[j] += up[j] * seen[j]
