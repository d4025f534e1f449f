# mypy: allow-untyped-defs
"""Gaussians to pixels in Triton: a program draws a tile of 16 x 16 pixels, see `foveate.ops.gaussians`.

Gaussians are binned by the box around their ellipse, pairs sorted by tile, then by Gaussian. For "topk" a program keeps
the k + 1 largest weights of its pixels, replacing the least; the threshold lies between the last two. Backward writes
what each pair adds and sums it per Gaussian afterwards.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveate.ops.gaussians import drawn
from foveate.ops.tile import launch, power_of_two

if TYPE_CHECKING:
    from foveate.ops.gaussians import Way

_SIDE = 16


def draw(centres: Tensor, conics: Tensor, colours: Tensor, way: "Way") -> tuple[Tensor, Tensor, Tensor]:
    """The picture [C, H, W], and for "topk" the sums of weights and the thresholds, [H, W] each."""
    height, width, channels = way.grid.height, way.grid.width, colours.shape[1]
    out = centres.new_empty(channels, height, width)
    sums, thresholds = centres.new_empty(2, height, width)
    shapes, members, first = _bins(centres, conics, way)
    launch(
        _draw, (len(first) - 1,), shapes, members, first, colours.contiguous(), out, sums, thresholds,
        *_places(way, centres.device), height, width, way.reach**2 / 2, way.eps,
        C=channels, K=way.k if way.mode == "topk" else 0, SLOTS=power_of_two(way.k + 1, 2),
        CP=power_of_two(channels, 1), SIDE=_SIDE,
    )  # fmt: skip
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
    """What `foveate.ops._gaussians_cpu.gather` gives. Shape: upstream [C, H, W] -> [N, C + 5]."""
    channels = colours.shape[1]
    shapes, members, first = _bins(centres, conics, way)
    shares = centres.new_empty(len(members), channels + 5)
    launch(
        _gather, (len(first) - 1,), shapes, members, first, colours.contiguous(), upstream.contiguous(),
        upstream if offset is None else offset, upstream if thresholds is None else thresholds, shares,
        *_places(way, centres.device), way.grid.height, way.grid.width, way.reach**2 / 2,
        C=channels, TOPK=offset is not None, CP=power_of_two(channels, 1), SIDE=_SIDE,
    )  # fmt: skip
    return centres.new_zeros(len(centres), channels + 5).index_add_(0, members.long(), shares)


def _places(way: "Way", device: torch.device) -> tuple[Tensor, Tensor]:
    return way.grid.xs().to(device, torch.float32), way.grid.ys().to(device, torch.float32)


def _bins(centres: Tensor, conics: Tensor, way: "Way") -> tuple[Tensor, Tensor, Tensor]:
    """Shapes [N, 5], the Gaussian of each pair in order of tiles, and where each tile's pairs begin."""
    grid = way.grid
    shapes = torch.cat([centres, conics], 1).detach()
    a, b, c = shapes[:, 2:].double().unbind(1)
    reach = way.reach / (a * c - b * b).sqrt()
    lows, counts = [], []
    for place, extent, origin, step, length in (
        (shapes[:, 0], reach * c.sqrt(), grid.column + grid.centre, grid.dx, grid.width),
        (shapes[:, 1], reach * a.sqrt(), grid.row + grid.centre, grid.dy, grid.height),
    ):
        low = ((place - extent) / step - origin - 0.01).ceil().nan_to_num().clamp(0, length)
        high = ((place + extent) / step - origin + 0.01).floor().nan_to_num().clamp(-1, length - 1)
        tile = low.long() // _SIDE
        lows.append(tile)
        counts.append(torch.where((high >= low) & drawn(conics), high.long() // _SIDE - tile + 1, 0))
    across = -(-grid.width // _SIDE)
    per = counts[0] * counts[1]
    member = torch.arange(len(shapes), device=per.device).repeat_interleave(per)
    within = torch.arange(len(member), device=per.device) - (per.cumsum(0) - per)[member]
    wide = counts[0][member].clamp(min=1)
    tile = (lows[1][member] + within // wide) * across + lows[0][member] + within % wide
    tile, order = tile.sort(stable=True)
    edges = torch.arange(across * -(-grid.height // _SIDE) + 1, device=tile.device)
    return shapes.contiguous(), member[order].int(), torch.searchsorted(tile, edges).int()


@triton.jit
def _weigh(shapes, n, x, y, cut):
    """(weights, places relative to the centre) of Gaussian n at the pixels of a tile."""
    u, v = x - tl.load(shapes + n * 5), y - tl.load(shapes + n * 5 + 1)
    a, b, c = tl.load(shapes + n * 5 + 2), tl.load(shapes + n * 5 + 3), tl.load(shapes + n * 5 + 4)
    s = 0.5 * a * u * u + b * u * v + 0.5 * c * v * v
    return tl.where(s <= cut, tl.exp(-s), 0.0), u, v


@triton.jit
def _pixels(xs, ys, height, width, SIDE: tl.constexpr):
    """(x, y, where in the picture, whether it is in the picture) of a tile's pixels."""
    across = (width + SIDE - 1) // SIDE
    t = tl.program_id(0)
    i = tl.arange(0, SIDE * SIDE)
    row, column = t // across * SIDE + i // SIDE, t % across * SIDE + i % SIDE
    inside = (row < height) & (column < width)
    x, y = tl.load(xs + column, inside, other=0.0), tl.load(ys + row, inside, other=0.0)
    return x, y, row * width + column, inside


@triton.jit
def _draw(
    shapes, members, first, colours, out, sums, thresholds, xs, ys, height, width, cut, eps,
    C: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr, CP: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    x, y, place, inside = _pixels(xs, ys, height, width, SIDE)
    start, stop = tl.load(first + tl.program_id(0)), tl.load(first + tl.program_id(0) + 1)
    threshold = tl.zeros([SIDE * SIDE], tl.float32)
    if K > 0:
        slot = tl.arange(0, SLOTS)[None, :]
        best = tl.where(slot <= K, 0.0, float("inf")) + tl.zeros([SIDE * SIDE, SLOTS], tl.float32)
        for p in range(start, stop):
            w, _u, _v = _weigh(shapes, tl.load(members + p), x, y, cut)
            least = tl.min(best, 1)
            change = (slot == tl.argmin(best, 1)[:, None]) & (w > least)[:, None]
            best = tl.where(change, w[:, None], best)
        least = tl.min(best, 1)
        others = tl.where(slot == tl.argmin(best, 1)[:, None], float("inf"), best)
        threshold = 0.5 * (least + tl.min(others, 1))
        tl.store(thresholds + place, threshold, inside)
    channel = tl.arange(0, CP)
    total = tl.zeros([SIDE * SIDE, CP], tl.float32)
    weight = tl.zeros([SIDE * SIDE], tl.float32)
    for p in range(start, stop):
        n = tl.load(members + p)
        w, _u, _v = _weigh(shapes, n, x, y, cut)
        if K > 0:
            w = tl.where(w > threshold, w, 0.0)
            weight += w
        total += w[:, None] * tl.load(colours + n * C + channel, channel < C, other=0.0)[None, :]
    if K > 0:
        total = total / (eps + weight)[:, None]
        tl.store(sums + place, weight, inside)
    target = out + channel[None, :] * height * width + place[:, None]
    tl.store(target, total, inside[:, None] & (channel < C)[None, :])


@triton.jit
def _gather(
    shapes, members, first, colours, grad, offset, thresholds, shares, xs, ys, height, width, cut,
    C: tl.constexpr, TOPK: tl.constexpr, CP: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    x, y, place, inside = _pixels(xs, ys, height, width, SIDE)
    start, stop = tl.load(first + tl.program_id(0)), tl.load(first + tl.program_id(0) + 1)
    channel = tl.arange(0, CP)
    seen = inside[:, None] & (channel < C)[None, :]
    own = tl.load(grad + channel[None, :] * height * width + place[:, None], seen, other=0.0)
    base = tl.zeros([SIDE * SIDE], tl.float32)
    threshold = base
    if TOPK:
        base = tl.load(offset + place, inside, other=0.0)
        threshold = tl.load(thresholds + place, inside, other=0.0)
    for p in range(start, stop):
        n = tl.load(members + p)
        w, u, v = _weigh(shapes, n, x, y, cut)
        if TOPK:
            w = tl.where(w > threshold, w, 0.0)
        colour = tl.load(colours + n * C + channel, channel < C, other=0.0)
        s = w * (tl.sum(own * colour[None, :], 1) - base)
        row = shares + p * (C + 5)
        tl.store(row + channel, tl.sum(w[:, None] * own, 0), channel < C)
        tl.store(row + C, tl.sum(s * u, 0))
        tl.store(row + C + 1, tl.sum(s * v, 0))
        tl.store(row + C + 2, tl.sum(s * u * u, 0))
        tl.store(row + C + 3, tl.sum(s * u * v, 0))
        tl.store(row + C + 4, tl.sum(s * v * v, 0))
