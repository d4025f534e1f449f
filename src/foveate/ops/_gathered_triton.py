# mypy: allow-untyped-defs
"""Triton kernels of `foveate.ops.gathered`.

A program holds some places and the channels of one group: those that share an offset, or, without offsets, those that
share a weight. What belongs to a place and a tap (its offset, the four pixels and their shares, the shared weight) is
read and worked out once and serves all of these channels, as in DCNv4 (Xiong et al. 2024, arXiv:2401.06197, section
3.2); sums are float32.

    forward     y
    to_places   gradients of weights and offsets; reads x
    to_x        gradient of x without offsets: each pixel gathers from the places that read it
    scatter     gradient of x with offsets: each place adds to the pixels that it read, atomically, in no fixed order

`foveate.ops.gathered` imports this module where it is given CUDA tensors.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveate.ops.gathered import Geometry
from foveate.ops.tile import launch

_LANES = 1024
"""Places times channels of a program, at most."""


def gathered_triton(x: Tensor, weight: Tensor, offset: Tensor | None, geometry: Geometry) -> Tensor:
    """`gathered_reference` for CUDA tensors.

    Shape: x [B, C, H, W], weight [B or 1, G, T, Ho or 1, Wo or 1] of one dtype, offset [B, G', T, 2, Ho, Wo] float32.
    """
    return _Gathered.apply(x, weight, offset, geometry)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offset: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, weight, offset)
        ctx.geometry = geometry
        form = torch.contiguous_format if offset is None else torch.channels_last
        x = x.contiguous(memory_format=form)
        out = x.new_empty(*x.shape[:2], *geometry.size).contiguous(memory_format=form)
        plan = _Plan(x, weight, offset, geometry)
        launch(_forward, (plan.blocks, plan.groups * plan.chunks, len(x)),
               x, weight, offset, out, *plan.arguments, *out.stride(), **plan.constants)  # fmt: skip
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offset = ctx.saved_tensors
        geometry, (need_x, need_weight, need_offset, _) = ctx.geometry, ctx.needs_input_grad
        form = torch.contiguous_format if offset is None else torch.channels_last
        x, dout = x.contiguous(memory_format=form), dout.contiguous(memory_format=form)
        plan = _Plan(x, weight, offset, geometry)
        dx = dweight = doffset = None
        if need_weight or need_offset:
            dweight = torch.zeros(weight.shape, dtype=torch.float32, device=x.device)
            doffset = None if offset is None else torch.zeros_like(offset)
            # Offsets may be a view of something wider, or of one picture's; their gradient has its own strides.
            strides = (0,) * 6 if doffset is None else doffset.stride()
            launch(_to_places, (plan.blocks, plan.groups, len(weight)),
                   x, weight, offset, dout, dweight, doffset, len(x) // len(weight), *plan.arguments, *dout.stride(),
                   *dweight.stride()[:3], int(not plan.fixed), *strides,
                   FIXED=plan.fixed, **plan.constants)  # fmt: skip
            dweight = dweight.to(weight.dtype)
        if need_x and offset is None:
            dx = torch.empty_like(x)
            pixels = triton.cdiv(x.shape[2] * x.shape[3], plan.constants["PLACES"])
            launch(_to_x, (pixels, plan.groups * plan.chunks, len(x)),
                   dx, weight, dout, *plan.arguments, *dout.stride(), **plan.constants)  # fmt: skip
        elif need_x:
            total = torch.zeros_like(x, dtype=torch.float32)
            launch(_scatter, (plan.blocks, plan.groups * plan.chunks, len(x)),
                   total, weight, offset, dout, *plan.arguments, *dout.stride(), **plan.constants)  # fmt: skip
            dx = total.to(x.dtype)
        return dx, dweight if need_weight else None, doffset if need_offset else None, None


class _Plan:
    """Which channels a program has, and what all kernels are told."""

    def __init__(self, x: Tensor, weight: Tensor, offset: Tensor | None, geometry: Geometry) -> None:
        channels, g = x.shape[1], weight.shape[1]
        self.groups = g if offset is None else offset.shape[1]
        each = channels // self.groups
        strided = offset is None and geometry.interleaved
        step, first = (g, 1) if strided else (1, each)
        shared = offset is None or g == 1 or (not geometry.interleaved and self.groups % g == 0)
        lanes = min(32, triton.next_power_of_2(each))
        self.chunks = triton.cdiv(each, lanes)
        places = min(_LANES // lanes, max(16, triton.next_power_of_2(geometry.size[0] * geometry.size[1])))
        self.blocks = triton.cdiv(geometry.size[0] * geometry.size[1], places)
        self.fixed = weight.shape[3:] != geometry.size
        w = weight.stride()
        of_weight = (w[0] if len(weight) > 1 else 0, w[1], w[2], *((0, 0) if self.fixed else w[3:]))
        taps = torch.tensor(geometry.taps, dtype=torch.float32, device=x.device)
        self.arguments = (
            taps, *x.shape[2:], *geometry.size, *geometry.stride, each, step, first, channels // g, g,
            *x.stride(), *of_weight, *((0,) * 6 if offset is None else offset.stride()),
        )  # fmt: skip
        self.constants = {
            "TAPS": weight.shape[2],
            "OFFSETS": offset is not None,
            "SHARED": shared,
            "INTERLEAVED": geometry.interleaved,
            "PLACES": places,
            "LANES": lanes,
        }


@triton.jit
def _channels(group, chunk, each, step, first, LANES: tl.constexpr):
    """Channels of a chunk of a group, and which lanes hold one."""
    k = chunk * LANES + tl.arange(0, LANES)
    return group * first + k * step, k < each


@triton.jit
def _weight_group(c, per, g, INTERLEAVED: tl.constexpr):
    return c % g if INTERLEAVED else c // per


@triton.jit
def _place(taps, offset, t, i, j, live, down, across, o_t, o_xy, OFFSETS: tl.constexpr):
    """Where a tap lies for each place, (x, y)."""
    px = (j * across).to(tl.float32) + tl.load(taps + 2 * t)
    py = (i * down).to(tl.float32) + tl.load(taps + 2 * t + 1)
    if OFFSETS:
        px += tl.load(offset + t * o_t, mask=live, other=0.0).to(tl.float32)
        py += tl.load(offset + t * o_t + o_xy, mask=live, other=0.0).to(tl.float32)
    return px, py


@triton.jit
def _pixel(x, y0, x0, there, lanes, height, width, x_y, x_x):
    """Values of one pixel for each place, zero outside, and which places have it. Shape: [PLACES, LANES]."""
    inside = there & (x0 >= 0) & (x0 < width) & (y0 >= 0) & (y0 < height)
    at = y0.to(tl.int64) * x_y + x0.to(tl.int64) * x_x
    return tl.load(x + at[:, None], mask=inside[:, None] & lanes[None, :], other=0.0).to(tl.float32), inside


@triton.jit
def _forward(
    x, weight, offset, out, taps, height, width, rows, columns, down, across, each, step, first, per, g,
    x_b, x_c, x_y, x_x, w_b, w_g, w_t, w_y, w_x, o_b, o_h, o_t, o_xy, o_y, o_x, y_b, y_c, y_y, y_x,
    TAPS: tl.constexpr, OFFSETS: tl.constexpr, SHARED: tl.constexpr, INTERLEAVED: tl.constexpr,
    PLACES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(each, LANES)
    group, b = tl.program_id(1) // chunks, tl.program_id(2).to(tl.int64)
    c, lanes = _channels(group, tl.program_id(1) % chunks, each, step, first, LANES)
    p = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    live = p < rows * columns
    i, j = p // columns, p % columns
    values = x + b * x_b + c[None, :].to(tl.int64) * x_c
    moved = offset
    if OFFSETS:
        moved = offset + b * o_b + group * o_h + i * o_y + j * o_x
    at = weight + b * w_b + (i * w_y + j * w_x)
    total = tl.zeros((PLACES, LANES), tl.float32)
    for t in range(TAPS):
        px, py = _place(taps, moved, t, i, j, live, down, across, o_t, o_xy, OFFSETS)
        if SHARED:
            w = tl.load(at + _weight_group(group * first, per, g, INTERLEAVED) * w_g + t * w_t, mask=live, other=0.0)
            w = w.to(tl.float32)[:, None]
        else:
            w = tl.load(at[:, None] + _weight_group(c, per, g, INTERLEAVED)[None, :] * w_g + t * w_t,
                        mask=live[:, None] & lanes[None, :], other=0.0).to(tl.float32)  # fmt: skip
        if OFFSETS:
            there = live & (px > -1) & (px < width) & (py > -1) & (py < height)
            px, py = tl.where(there, px, 0.0), tl.where(there, py, 0.0)
            x0, y0 = tl.floor(px).to(tl.int32), tl.floor(py).to(tl.int32)
            right, lower = px - x0, py - y0
            seen = tl.zeros((PLACES, LANES), tl.float32)
            for corner in tl.static_range(4):
                down_, right_ = corner // 2, corner % 2
                share = (lower if down_ else 1.0 - lower) * (right if right_ else 1.0 - right)
                value, _ = _pixel(values, y0 + down_, x0 + right_, there, lanes, height, width, x_y, x_x)
                seen += share[:, None] * value
        else:
            seen, _ = _pixel(values, py.to(tl.int32), px.to(tl.int32), live, lanes, height, width, x_y, x_x)
        total += w * seen
    target = out + b * y_b + c[None, :].to(tl.int64) * y_c + (i * y_y + j * y_x)[:, None]
    tl.store(target, total.to(out.dtype.element_ty), mask=live[:, None] & lanes[None, :])


@triton.jit
def _to_places(
    x, weight, offset, dout, dweight, doffset, pictures,
    taps, height, width, rows, columns, down, across, each, step, first, per, g,
    x_b, x_c, x_y, x_x, w_b, w_g, w_t, w_y, w_x, o_b, o_h, o_t, o_xy, o_y, o_x, y_b, y_c, y_y, y_x,
    d_b, d_g, d_t, d_p, n_b, n_h, n_t, n_xy, n_y, n_x, FIXED: tl.constexpr,
    TAPS: tl.constexpr, OFFSETS: tl.constexpr, SHARED: tl.constexpr, INTERLEAVED: tl.constexpr,
    PLACES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    group, owner = tl.program_id(1), tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    live = p < rows * columns
    i, j = p // columns, p % columns
    at = weight + owner * w_b + (i * w_y + j * w_x)
    dat = dweight + owner * d_b + p * d_p
    shared = _weight_group(group * first, per, g, INTERLEAVED)
    for t in range(TAPS):
        sums = tl.zeros((PLACES,), tl.float32)
        for k in range(pictures):
            b = owner * pictures + k
            moved = offset
            if OFFSETS:
                moved = offset + b * o_b + group * o_h + i * o_y + j * o_x
            px, py = _place(taps, moved, t, i, j, live, down, across, o_t, o_xy, OFFSETS)
            there = live & (px > -1) & (px < width) & (py > -1) & (py < height)
            px, py = tl.where(there, px, 0.0), tl.where(there, py, 0.0)
            x0, y0 = tl.floor(px).to(tl.int32), tl.floor(py).to(tl.int32)
            right, lower = px - x0, py - y0
            to_right, to_lower = tl.zeros((PLACES,), tl.float32), tl.zeros((PLACES,), tl.float32)
            for chunk in range(tl.cdiv(each, LANES)):
                c, lanes = _channels(group, chunk, each, step, first, LANES)
                channel = c[None, :].to(tl.int64)
                values = x + b * x_b + channel * x_c
                up = tl.load(dout + b * y_b + channel * y_c + (i * y_y + j * y_x)[:, None],
                             mask=there[:, None] & lanes[None, :], other=0.0).to(tl.float32)  # fmt: skip
                group_of = _weight_group(c, per, g, INTERLEAVED)[None, :]
                if OFFSETS:
                    if SHARED:
                        w = tl.load(at + shared * w_g + t * w_t, mask=there, other=0.0).to(tl.float32)[:, None]
                    else:
                        w = tl.load(at[:, None] + group_of * w_g + t * w_t,
                                    mask=there[:, None] & lanes[None, :], other=0.0).to(tl.float32)  # fmt: skip
                    seen = tl.zeros((PLACES, LANES), tl.float32)
                    for corner in tl.static_range(4):
                        down_, right_ = corner // 2, corner % 2
                        value, _ = _pixel(values, y0 + down_, x0 + right_, there, lanes, height, width, x_y, x_x)
                        share_y, share_x = lower if down_ else 1.0 - lower, right if right_ else 1.0 - right
                        seen += (share_y * share_x)[:, None] * value
                        flow = tl.sum(w * up * value, 1)
                        to_right += flow * share_y * (1.0 if right_ else -1.0)
                        to_lower += flow * share_x * (1.0 if down_ else -1.0)
                else:
                    seen, _ = _pixel(values, y0, x0, there, lanes, height, width, x_y, x_x)
                if SHARED:
                    sums += tl.sum(up * seen, 1)
                elif FIXED:
                    place = dweight + owner * d_b + _weight_group(c, per, g, INTERLEAVED) * d_g + t * d_t
                    tl.atomic_add(place, tl.sum(up * seen, 0), mask=lanes)
                else:
                    tl.atomic_add(dat[:, None] + group_of * d_g + t * d_t, up * seen,
                                  mask=there[:, None] & lanes[None, :])  # fmt: skip
            if OFFSETS:
                goal = doffset + b * n_b + group * n_h + i * n_y + j * n_x + t * n_t
                tl.store(goal, to_right.to(doffset.dtype.element_ty), mask=live)
                tl.store(goal + n_xy, to_lower.to(doffset.dtype.element_ty), mask=live)
        if SHARED:
            if FIXED:
                tl.atomic_add(dweight + owner * d_b + shared * d_g + t * d_t, tl.sum(sums, 0))
            else:
                tl.atomic_add(dat + shared * d_g + t * d_t, sums, mask=live)


@triton.jit
def _to_x(
    dx, weight, dout, taps, height, width, rows, columns, down, across, each, step, first, per, g,
    x_b, x_c, x_y, x_x, w_b, w_g, w_t, w_y, w_x, o_b, o_h, o_t, o_xy, o_y, o_x, y_b, y_c, y_y, y_x,
    TAPS: tl.constexpr, OFFSETS: tl.constexpr, SHARED: tl.constexpr, INTERLEAVED: tl.constexpr,
    PLACES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(each, LANES)
    group, b = tl.program_id(1) // chunks, tl.program_id(2).to(tl.int64)
    c, lanes = _channels(group, tl.program_id(1) % chunks, each, step, first, LANES)
    q = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    live = q < height * width
    qy, qx = q // width, q % width
    channel = c[None, :].to(tl.int64)
    up = dout + b * y_b + channel * y_c
    total = tl.zeros((PLACES, LANES), tl.float32)
    for t in range(TAPS):
        fy = qy - tl.load(taps + 2 * t + 1).to(tl.int32)
        fx = qx - tl.load(taps + 2 * t).to(tl.int32)
        i, j = fy // down, fx // across
        there = live & (fy >= 0) & (fx >= 0) & (i * down == fy) & (j * across == fx) & (i < rows) & (j < columns)
        i, j = tl.where(there, i, 0), tl.where(there, j, 0)
        own = weight + b * w_b + _weight_group(group * first, per, g, INTERLEAVED) * w_g + t * w_t
        w = tl.load(own + i * w_y + j * w_x, mask=there, other=0.0).to(tl.float32)
        flow = tl.load(up + (i * y_y + j * y_x)[:, None], mask=there[:, None] & lanes[None, :], other=0.0)
        total += w[:, None] * flow.to(tl.float32)
    target = dx + b * x_b + channel * x_c + (qy * x_y + qx * x_x)[:, None]
    tl.store(target, total.to(dx.dtype.element_ty), mask=live[:, None] & lanes[None, :])


@triton.jit
def _scatter(
    dx, weight, offset, dout, taps, height, width, rows, columns, down, across, each, step, first, per, g,
    x_b, x_c, x_y, x_x, w_b, w_g, w_t, w_y, w_x, o_b, o_h, o_t, o_xy, o_y, o_x, y_b, y_c, y_y, y_x,
    TAPS: tl.constexpr, OFFSETS: tl.constexpr, SHARED: tl.constexpr, INTERLEAVED: tl.constexpr,
    PLACES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(each, LANES)
    group, b = tl.program_id(1) // chunks, tl.program_id(2).to(tl.int64)
    c, lanes = _channels(group, tl.program_id(1) % chunks, each, step, first, LANES)
    p = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    live = p < rows * columns
    i, j = p // columns, p % columns
    channel = c[None, :].to(tl.int64)
    up = tl.load(dout + b * y_b + channel * y_c + (i * y_y + j * y_x)[:, None],
                 mask=live[:, None] & lanes[None, :], other=0.0).to(tl.float32)  # fmt: skip
    moved = offset + b * o_b + group * o_h + i * o_y + j * o_x
    at = weight + b * w_b + (i * w_y + j * w_x)
    for t in range(TAPS):
        px, py = _place(taps, moved, t, i, j, live, down, across, o_t, o_xy, OFFSETS)
        there = live & (px > -1) & (px < width) & (py > -1) & (py < height)
        px, py = tl.where(there, px, 0.0), tl.where(there, py, 0.0)
        x0, y0 = tl.floor(px).to(tl.int32), tl.floor(py).to(tl.int32)
        right, lower = px - x0, py - y0
        if SHARED:
            w = tl.load(at + _weight_group(group * first, per, g, INTERLEAVED) * w_g + t * w_t, mask=there, other=0.0)
            flow = w.to(tl.float32)[:, None] * up
        else:
            w = tl.load(at[:, None] + _weight_group(c, per, g, INTERLEAVED)[None, :] * w_g + t * w_t,
                        mask=there[:, None] & lanes[None, :], other=0.0)  # fmt: skip
            flow = w.to(tl.float32) * up
        for corner in tl.static_range(4):
            down_, right_ = corner // 2, corner % 2
            share = (lower if down_ else 1.0 - lower) * (right if right_ else 1.0 - right)
            y, x = y0 + down_, x0 + right_
            inside = there & (x >= 0) & (x < width) & (y >= 0) & (y < height)
            target = dx + b * x_b + channel * x_c + (y * x_y + x * x_x)[:, None]
            tl.atomic_add(target, share[:, None] * flow, mask=inside[:, None] & lanes[None, :])
