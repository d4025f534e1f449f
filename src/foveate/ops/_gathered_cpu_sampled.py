"""Compiled loops of `foveate.ops.gathered` where offsets move the taps, with channels innermost.

Place and shares of the four pixels around it are worked out once per place, tap and offset group, and serve all of the
group's channels, whose values lie in one run. Where these also share the weight, it is folded into the shares; else
each channel multiplies by its own.

Backward goes over the places twice: once with a thread per rows of places, which own their weights and offsets and
only read x, and once with a thread per run of channels, which owns its gradient of x. So there are no races, and no
intermediate results but, for weights that all places share, their sums per row.
"""

from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from foveate.ops.gathered import Geometry, channel_groups
from foveate.ops.threads import in_parts


def sampled_cpu(x: Tensor, weight: Tensor, offset: Tensor, geometry: Geometry) -> Tensor:
    """`gathered_reference` with offsets.

    Shape: x [B, C, H, W], weight [B or 1, G, T, Ho or 1, Wo or 1], offset [B, G', T, 2, Ho, Wo], all float32 or all
        float64.
    """
    return _Sampled.apply(x, weight, offset, geometry)


class _Sampled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offset: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, weight, offset)
        ctx.geometry = geometry
        pixels = x.permute(0, 2, 3, 1).contiguous()
        out = x.new_empty(len(x), *geometry.size, x.shape[1])
        arrays = _arrays(pixels, weight, offset, out)
        plan, kind = _plan(x, weight, offset, geometry)
        loop = _kernel("forward", x.dtype, *kind)
        in_parts(lambda i, j: loop(*arrays, *plan, i, j), len(x) * geometry.size[0], 1)
        return out.permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offset = ctx.saved_tensors
        geometry, (need_x, need_weight, need_offset, _) = ctx.geometry, ctx.needs_input_grad
        plan, kind = _plan(x, weight, offset, geometry)
        up = dout.permute(0, 2, 3, 1).contiguous()
        dx = dweight = doffset = None
        if need_weight or need_offset:
            pixels = x.permute(0, 2, 3, 1).contiguous()
            rows, fixed = geometry.size[0] * len(weight), kind[0]
            sums = x.new_zeros(rows if fixed else 0, weight.shape[2], x.shape[1])
            dweight = torch.zeros_like(weight)
            doffset = torch.zeros_like(offset)
            of_places = _arrays(pixels, weight, offset, up, dweight, doffset, sums)
            to_places = _kernel("to_places", x.dtype, *kind)
            in_parts(lambda i, j: to_places(*of_places, *plan, i, j), rows, 1)
            if fixed:
                group = channel_groups(x.shape[1], weight.shape[1], geometry.interleaved)
                per_channel = sums.view(len(weight), -1, *sums.shape[1:]).sum(1).mT
                dweight[..., 0, 0] = torch.zeros_like(weight[..., 0, 0]).index_add_(1, group, per_channel)
        if need_x:
            target = x.new_zeros(len(x), *x.shape[2:], x.shape[1])
            units = len(x) * offset.shape[1]
            parts = min(x.shape[1] // offset.shape[1], -(-torch.get_num_threads() // units))
            of_x = _arrays(target, weight, offset, up)
            to_x = _kernel("to_x", x.dtype, *kind)
            in_parts(lambda i, j: to_x(*of_x, *plan, parts, i, j), units * parts, 1)
            dx = target.permute(0, 3, 1, 2)
        return dx, dweight if need_weight else None, doffset if need_offset else None, None


def _plan(x: Tensor, weight: Tensor, offset: Tensor, geometry: Geometry) -> tuple[tuple[Any, ...], tuple[bool, bool]]:
    """What the loops are told, and of what kind the weights are, see `_kernel`.

    Returns: (taps, strides, the weight group of each channel, weights [B or 1, T, C] where all places share them),
        (fixed, folded).
    """
    group = channel_groups(x.shape[1], weight.shape[1], geometry.interleaved)
    runs, fixed = group.view(offset.shape[1], -1), weight.shape[3:] != geometry.size
    table = weight.detach()[:, group, :, 0, 0].mT if fixed else weight.new_empty(0, 0, 0)
    taps = torch.tensor(geometry.taps, dtype=x.dtype).numpy()
    plan = (taps, np.array(geometry.stride), group.numpy(), table.contiguous().numpy())
    return plan, (fixed, bool((runs == runs[:, :1]).all()))


def _arrays(*tensors: Tensor) -> tuple[Any, ...]:
    return tuple(t.detach().numpy() for t in tensors)


# A global: a loop that calls one of an enclosing function would be new in every process, and nothing cached.
@numba.njit(inline="always")
def _sides(place, size):  # type: ignore[no-untyped-def]
    """Pixels before and after, their shares, and the changes of those; zero for a pixel outside."""
    whole = np.floor(place)
    first, share = np.int64(np.int32(whole)), place - whole
    one, zero = type(place)(1), type(place)(0)
    before, after = first >= 0, first + 1 < size
    return (
        max(first, 0),
        min(first + 1, size - 1),
        one - share if before else zero,
        share if after else zero,
        -one if before else zero,
        one if after else zero,
    )


@cache
def _kernel(name: str, dtype: torch.dtype, fixed: bool, folded: bool) -> Any:
    """One of the loops, for one kind of weights: a loop with the branches of the others in it is half as fast.

    Weights and offsets, often views of something wider, may have any strides.

    Args:
        fixed: all places share the weights, which `table` holds.
        folded: the channels that share an offset share the weight.
    """
    flags = {"contract", "nsz", "reassoc"}

    def forward(x, weight, offset, out, taps, stride, group, table, start, stop):  # type: ignore[no-untyped-def]
        height, width, channels = x.shape[1], x.shape[2], x.shape[3]
        runs, columns = offset.shape[1], out.shape[2]
        d, many = channels // runs, weight.shape[0] > 1
        for unit in range(start, stop):
            b, i = unit // out.shape[1], unit % out.shape[1]
            owner = b if many else 0
            for j in range(columns):
                for h in range(runs):
                    first, last = h * d, (h + 1) * d
                    total = out[b, i, j, first:last]
                    total[:] = 0
                    for t in range(taps.shape[0]):
                        px = x.dtype.type(j * stride[1]) + taps[t, 0] + offset[b, h, t, 0, i, j]
                        py = x.dtype.type(i * stride[0]) + taps[t, 1] + offset[b, h, t, 1, i, j]
                        if not (px > -1 and px < width and py > -1 and py < height):
                            continue
                        x0, x1, left, right, _, _ = _sides(px, width)
                        y0, y1, upper, lower, _, _ = _sides(py, height)
                        a00, a01, a10, a11 = upper * left, upper * right, lower * left, lower * right
                        p00, p01 = x[b, y0, x0, first:last], x[b, y0, x1, first:last]
                        p10, p11 = x[b, y1, x0, first:last], x[b, y1, x1, first:last]
                        if fixed:
                            own = table[owner, t, first:last]
                            for c in range(d):
                                total[c] += own[c] * (a00 * p00[c] + a01 * p01[c] + a10 * p10[c] + a11 * p11[c])
                        elif folded:
                            w = weight[owner, group[first], t, i, j]
                            a00, a01, a10, a11 = w * a00, w * a01, w * a10, w * a11
                            for c in range(d):
                                total[c] += a00 * p00[c] + a01 * p01[c] + a10 * p10[c] + a11 * p11[c]
                        else:
                            for c in range(d):
                                w = weight[owner, group[first + c], t, i, j]
                                total[c] += w * (a00 * p00[c] + a01 * p01[c] + a10 * p10[c] + a11 * p11[c])

    def to_places(  # type: ignore[no-untyped-def]
        x, weight, offset, up, dweight, doffset, sums, taps, stride, group, table, start, stop
    ):
        height, width, channels = x.shape[1], x.shape[2], x.shape[3]
        runs, columns = offset.shape[1], up.shape[2]
        d = channels // runs
        for unit in range(start, stop):
            owner, i = unit // up.shape[1], unit % up.shape[1]
            begin, end = (owner, owner + 1) if weight.shape[0] > 1 else (0, x.shape[0])
            for b in range(begin, end):
                for j in range(columns):
                    for h in range(runs):
                        first, last = h * d, (h + 1) * d
                        dy = up[b, i, j, first:last]
                        for t in range(taps.shape[0]):
                            px = x.dtype.type(j * stride[1]) + taps[t, 0] + offset[b, h, t, 0, i, j]
                            py = x.dtype.type(i * stride[0]) + taps[t, 1] + offset[b, h, t, 1, i, j]
                            if not (px > -1 and px < width and py > -1 and py < height):
                                continue
                            x0, x1, left, right, sl, sr = _sides(px, width)
                            y0, y1, upper, lower, su, sd = _sides(py, height)
                            a00, a01, a10, a11 = upper * left, upper * right, lower * left, lower * right
                            p00, p01 = x[b, y0, x0, first:last], x[b, y0, x1, first:last]
                            p10, p11 = x[b, y1, x0, first:last], x[b, y1, x1, first:last]
                            s00 = s01 = s10 = s11 = dy[0] * 0
                            if fixed:
                                own, found = table[owner, t, first:last], sums[unit, t, first:last]
                                for c in range(d):
                                    seen = a00 * p00[c] + a01 * p01[c] + a10 * p10[c] + a11 * p11[c]
                                    found[c] += dy[c] * seen
                                    v = own[c] * dy[c]
                                    s00 += v * p00[c]
                                    s01 += v * p01[c]
                                    s10 += v * p10[c]
                                    s11 += v * p11[c]
                            elif folded:
                                for c in range(d):
                                    s00 += dy[c] * p00[c]
                                    s01 += dy[c] * p01[c]
                                    s10 += dy[c] * p10[c]
                                    s11 += dy[c] * p11[c]
                                w = weight[owner, group[first], t, i, j]
                                dweight[owner, group[first], t, i, j] += a00 * s00 + a01 * s01 + a10 * s10 + a11 * s11
                                s00, s01, s10, s11 = w * s00, w * s01, w * s10, w * s11
                            else:
                                for c in range(d):
                                    g = group[first + c]
                                    seen = a00 * p00[c] + a01 * p01[c] + a10 * p10[c] + a11 * p11[c]
                                    dweight[owner, g, t, i, j] += dy[c] * seen
                                    v = weight[owner, g, t, i, j] * dy[c]
                                    s00 += v * p00[c]
                                    s01 += v * p01[c]
                                    s10 += v * p10[c]
                                    s11 += v * p11[c]
                            doffset[b, h, t, 0, i, j] = upper * (sl * s00 + sr * s01) + lower * (sl * s10 + sr * s11)
                            doffset[b, h, t, 1, i, j] = left * (su * s00 + sd * s10) + right * (su * s01 + sd * s11)

    def to_x(  # type: ignore[no-untyped-def]
        dx, weight, offset, up, taps, stride, group, table, parts, start, stop
    ):
        height, width, channels = dx.shape[1], dx.shape[2], dx.shape[3]
        runs, rows, columns = offset.shape[1], up.shape[1], up.shape[2]
        d, many = channels // runs, weight.shape[0] > 1
        for unit in range(start, stop):
            b, h, part = unit // parts // runs, unit // parts % runs, unit % parts
            owner = b if many else 0
            first, last = h * d + part * d // parts, h * d + (part + 1) * d // parts
            for i in range(rows):
                for j in range(columns):
                    dy = up[b, i, j, first:last]
                    for t in range(taps.shape[0]):
                        px = dx.dtype.type(j * stride[1]) + taps[t, 0] + offset[b, h, t, 0, i, j]
                        py = dx.dtype.type(i * stride[0]) + taps[t, 1] + offset[b, h, t, 1, i, j]
                        if not (px > -1 and px < width and py > -1 and py < height):
                            continue
                        x0, x1, left, right, _, _ = _sides(px, width)
                        y0, y1, upper, lower, _, _ = _sides(py, height)
                        corners = (
                            (upper * left, y0, x0),
                            (upper * right, y0, x1),
                            (lower * left, y1, x0),
                            (lower * right, y1, x1),
                        )
                        for share, y, x in corners:
                            target = dx[b, y, x, first:last]
                            if fixed:
                                own = table[owner, t, first:last]
                                for c in range(last - first):
                                    target[c] += share * own[c] * dy[c]
                            elif folded:
                                a = share * weight[owner, group[first], t, i, j]
                                for c in range(last - first):
                                    target[c] += a * dy[c]
                            else:
                                for c in range(last - first):
                                    target[c] += share * weight[owner, group[first + c], t, i, j] * dy[c]

    f, n = numba.float32 if dtype == torch.float32 else numba.float64, numba.int64
    pixels, weights, offsets, table = f[:, :, :, ::1], f[:, :, :, :, :], f[:, :, :, :, :, :], f[:, :, ::1]
    plan = (f[:, ::1], n[::1], n[::1], table)
    signatures = {
        "forward": (pixels, weights, offsets, pixels, *plan, n, n),
        "to_places": (pixels, weights, offsets, pixels, weights, offsets, table, *plan, n, n),
        "to_x": (pixels, weights, offsets, pixels, *plan, n, n, n),
    }
    loop = {"forward": forward, "to_places": to_places, "to_x": to_x}[name]
    return numba.njit(numba.void(*signatures[name]), nogil=True, fastmath=flags, cache=True, error_model="numpy")(loop)
