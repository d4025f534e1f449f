"""Convolutions that look towards one corner only, and their inverse in O(H + W) dependent steps.

A k x k convolution padded at top and left alone (order "tl") reads, for output pixel (i, j), only pixels above and to
the left of it, and the pixel itself through its last tap M = w[:, :, k-1, k-1]:

    y[:, i, j] = sum_{a, b} w[:, :, a, b] x[:, i - (k-1) + a, j - (k-1) + b].

Scanned from that corner it is a block-triangular matrix with M on the diagonal, so log |det| = H W log |det M|, and
the inverse is a forward substitution

    x[:, i, j] = M^-1 (y[:, i, j] - sum_{(a, b) not last} w[:, :, a, b] x[:, i - (k-1) + a, j - (k-1) + b]).

All pixels of an anti-diagonal i + j = d depend on earlier diagonals only: H + W - 1 dependent steps (the wavefront)
instead of H W (the raster scan). Orders "tr", "bl", "br" look towards the other corners; they are "tl" on the picture
mirrored along width, height, or both.

How it runs: pixels lie in one line, pixel (i, j) at origin + i * up + j * left, with zeros around the picture. For the
wavefront the picture is sheared, row i by i pixels, so that a diagonal is one contiguous run. Wavefront or raster, a
pixel's k x k neighbours lie at fixed distances behind it; a step reads a run and its neighbours, applies one matrix
[C, k k C], and writes x where y was.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from foveate.errors import InputError
from foveate.ops import fast_allowed
from foveate.ops.threads import in_parts

ORDERS: dict[str, tuple[int, ...]] = {"tl": (), "tr": (-1,), "bl": (-2,), "br": (-2, -1)}
"""Corner that an order looks towards -> axes along which it mirrors "tl"."""

_BATCH, _LANES, _TERMS = 8, 128, 4
"""The compiled loop solves so many pictures at once, finishes so many values of a channel before it goes on (with their
neighbours they stay in cache), and adds so many products at a time (the matrix is filled up with zeros)."""


def triangular_conv(x: Tensor, weight: Tensor, orders: Sequence[str] = ("tl",)) -> Tensor:
    """Convolve each group of channels towards its corner.

    Args:
        x: the groups one after the other.
        weight: kernels as for order "tl": the last tap multiplies the pixel itself.
        orders: the corner of each group, of "tl", "tr", "bl", "br".

    Shape: x [B, G*C, H, W], weight [G, C, C, k, k], G orders -> [B, G*C, H, W].
    Raises: InputError for shapes that do not fit together, or an unknown order.
    """
    check(x, weight, orders)
    edge = weight.shape[-1] - 1
    padded, kernels = [], []
    for part, kernel, order in zip(x.chunk(len(orders), 1), weight, orders, strict=True):
        horizontal = (0, edge) if -1 in ORDERS[order] else (edge, 0)
        vertical = (0, edge) if -2 in ORDERS[order] else (edge, 0)
        padded.append(F.pad(part, horizontal + vertical))
        kernels.append(kernel.flip(ORDERS[order]))
    return F.conv2d(torch.cat(padded, 1), torch.cat(kernels), groups=len(orders))


def triangular_solve(
    y: Tensor, weight: Tensor, orders: Sequence[str] = ("tl",), sweep: "SweepOf | None" = None
) -> Tensor:
    """Find x such that `triangular_conv(x, weight, orders)` is y.

    It is a linear recurrence: with large weights an error grows from pixel to pixel; use float64 where that matters.
    Half precision is computed in float32. Differentiable, any number of times.

    Args:
        y: the groups one after the other.
        weight, orders: as in `triangular_conv`.
        sweep: in what order pixels are found, `wavefront` (default) or `raster`.

    Shape: y [B, G*C, H, W], weight [G, C, C, k, k], G orders -> [B, G*C, H, W].
    Raises: InputError as `triangular_conv`, or where a last tap has no inverse.

    >>> x, weight = torch.rand(1, 4, 5, 6), 0.05 * torch.randn(2, 2, 2, 3, 3)
    >>> weight[..., -1, -1] = torch.eye(2)
    >>> y = triangular_conv(x, weight, ("tl", "br"))
    >>> torch.allclose(triangular_solve(y, weight, ("tl", "br")), x, atol=1e-5)
    True
    """
    check(y, weight, orders)
    exact = torch.promote_types(y.dtype, torch.float32)
    parts = [p.flip(ORDERS[o]) for p, o in zip(y.to(exact).chunk(len(orders), 1), orders, strict=True)]
    x = _Solve.apply(torch.stack(parts, 1), weight.to(exact), sweep or wavefront).unbind(1)
    return torch.cat([p.flip(ORDERS[o]) for p, o in zip(x, orders, strict=True)], 1).to(y.dtype)


def check(x: Tensor, weight: Tensor, orders: Sequence[str]) -> None:
    """Refuse what the two functions above cannot use. Raises: InputError."""
    unknown = [order for order in orders if order not in ORDERS]
    if unknown or not orders:
        raise InputError(f"got the orders {list(orders)}; give one of {', '.join(ORDERS)} for each group.")
    square = weight.dim() == 5 and weight.shape[1] == weight.shape[2] and weight.shape[3] == weight.shape[4]
    if not square or len(weight) != len(orders):
        raise InputError(
            f"expected kernels [G, C, C, k, k] with G = {len(orders)}, one per order, got {tuple(weight.shape)}."
        )
    if x.dim() != 4 or x.shape[1] != len(weight) * weight.shape[1]:
        raise InputError(
            f"expected [B, {len(weight) * weight.shape[1]}, H, W] for {len(weight)} groups of {weight.shape[1]} "
            f"channels, got {tuple(x.shape)}."
        )
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise InputError(f"the picture has no pixels: {tuple(x.shape)}. Pass one of at least 1 x 1.")


class _Solve(torch.autograd.Function):
    """x = A^-1 y for groups that all look towards "tl". Shape: [B, G, C, H, W], [G, C, C, k, k] -> [B, G, C, H, W].

    With g the gradient of x, that of y is v = A^-T g, where A^T is the mirrored convolution with transposed channels;
    that of w is -v times what each weight multiplies.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, sweep: "SweepOf") -> Tensor:
        fast = fast_allowed() and y.device.type == "cpu" and weight.device.type == "cpu"
        x = (solve_compiled if fast else solve_reference)(y, weight, sweep)
        ctx.save_for_backward(x, weight)
        ctx.sweep = sweep
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        (groups, c), edge = weight.shape[:2], weight.shape[-1] - 1
        v = _Solve.apply(grads[0].flip(-2, -1), weight.transpose(1, 2), ctx.sweep).flip(-2, -1)
        padded = F.pad(x.flatten(1, 2), (edge, 0, edge, 0))
        shape = (groups * c, c, edge + 1, edge + 1)
        products = conv2d_weight(padded, shape, v.flatten(1, 2), groups=groups)
        return v, -products.view_as(weight), None


class Sweep(NamedTuple):
    """Where pixels lie in a line, and the order in which they are visited.

    Attributes:
        runs: (position, pixels) of each; a run depends on earlier ones only.
        length: positions in all.
        origin: position of pixel (0, 0).
        up, left: distance to the neighbour above and to the left.
    """

    runs: list[tuple[int, int]]
    length: int
    origin: int
    up: int
    left: int


SweepOf = Callable[[int, int, int], Sweep]
"""(height, width, k) -> Sweep: `wavefront` or `raster`."""


def wavefront(height: int, width: int, k: int) -> Sweep:
    """Anti-diagonals of the sheared picture, height + width - 1 runs.

    >>> len(wavefront(5, 8, 3).runs)
    12
    """
    edge, row = k - 1, height + k - 1
    origin, steps = 2 * edge * row + edge, height + width - 1
    firsts = [max(0, d - width + 1) for d in range(steps)]
    runs = [(origin + d * row + first, min(height - 1, d) - first + 1) for d, first in enumerate(firsts)]
    return Sweep(runs, (steps + 2 * edge) * row, origin, row + 1, row)


def raster(height: int, width: int, k: int) -> Sweep:
    """Pixel by pixel, height * width runs: what the wavefront saves.

    >>> len(raster(5, 8, 3).runs)
    40
    """
    edge, row = k - 1, width + k - 1
    origin = edge * row + edge
    runs = [(origin + i * row + j, 1) for i in range(height) for j in range(width)]
    return Sweep(runs, (height + edge) * row, origin, row, 1)


def solve_reference(y: Tensor, weight: Tensor, sweep: SweepOf = wavefront) -> Tensor:
    """`triangular_solve` for "tl" in plain PyTorch, with a batched matrix product per run.

    Shape: y [B, G, C, H, W], weight [G, C, C, k, k] -> [B, G, C, H, W].
    """
    b, g, c, height, width = y.shape
    k = weight.shape[-1]
    way = sweep(height, width, k)
    rows = torch.arange(height, device=y.device)[:, None] * way.up
    places = (way.origin + rows + torch.arange(width, device=y.device) * way.left).flatten()
    line = y.new_zeros(g, c, way.length, b)  # pictures innermost, so that a run is contiguous in each channel
    line[:, :, places] = y.flatten(3).permute(1, 2, 3, 0)
    matrix = _matrix(weight).flatten(2)  # [G, C, k*k*C]
    flat = line.flatten(2)
    strides = (flat.stride(0), way.up * b, way.left * b, flat.stride(1), 1)
    for position, count in way.runs:
        first = (position - (k - 1) * (way.up + way.left)) * b
        seen = flat.as_strided((g, k, k, c, count * b), strides, first)
        x = torch.bmm(matrix, seen.reshape(g, k * k * c, count * b))
        flat[:, :, position * b : (position + count) * b] = x
    return line[:, :, places].permute(3, 0, 1, 2).reshape(y.shape)


def solve_compiled(y: Tensor, weight: Tensor, sweep: SweepOf = wavefront) -> Tensor:
    """`solve_reference` as a compiled loop on the CPU; pixels of a run and pictures of the batch are vector lanes."""
    b, g, c, height, width = y.shape
    k = weight.shape[-1]
    x = torch.empty_like(y, memory_format=torch.contiguous_format)
    if y.numel():
        way = sweep(height, width, k)
        matrix = _matrix(weight).flatten(2)  # [G, C, k*k*C]
        back = torch.arange(k - 1, -1, -1)
        behind = (back[:, None] * way.up + back * way.left).flatten().repeat_interleave(c)
        channel = torch.arange(c).repeat(k * k)
        fill = (0, -len(channel) % _TERMS)
        terms = [F.pad(t, fill).contiguous().numpy() for t in (matrix.detach(), behind, channel)]
        runs, place = torch.tensor(way.runs).numpy(), way[1:]
        source, target = y.detach().contiguous().numpy(), x.numpy()
        chunks = -(-b // _BATCH)
        in_parts(lambda i, j: _kernel()(source, *terms, runs, place, _BATCH, _LANES, i, j, target), g * chunks, 1)
    return x


def _matrix(weight: Tensor) -> Tensor:
    """What multiplies [neighbours' x, own y] to give x: M^-1 [-w, 1]. Shape: [G, C, C, k, k] -> [G, C, k, k, C]."""
    corner = weight[..., -1, -1]
    try:
        inverse = torch.linalg.inv(corner)
    except torch.linalg.LinAlgError as error:
        raise InputError(f"the last tap w[:, :, -1, -1] of a kernel has no inverse: {error}") from error
    taps = -weight.permute(0, 1, 3, 4, 2)
    taps[:, :, -1, -1] = torch.eye(len(corner[0]), dtype=weight.dtype, device=weight.device)
    return torch.einsum("gij,gjabc->giabc", inverse, taps)


@cache
def _kernel() -> Any:
    import numba
    import numpy as np

    @numba.njit(nogil=True, fastmath={"contract", "nsz", "arcp", "reassoc"}, cache=True)
    def solve(y, matrix, behind, channel, runs, place, batch, lanes, start, stop, x):  # type: ignore[no-untyped-def]
        pictures, groups, channels, height, width = y.shape
        length, origin, up, left = place
        lines = np.zeros((channels, length * min(batch, pictures)), y.dtype)
        found = np.empty((channels, lanes), y.dtype)
        for unit in range(start, stop):
            g, b0 = unit % groups, unit // groups * batch
            size = min(batch, pictures - b0)
            line = lines if size * length == lines.shape[1] else np.zeros((channels, length * size), y.dtype)
            for c in range(channels):
                for i in range(height):
                    for b in range(size):
                        row, at = y[b0 + b, g, c, i], (origin + i * up) * size + b
                        for j in range(width):
                            line[c, at + j * left * size] = row[j]
            for r in range(runs.shape[0]):
                end = (runs[r, 0] + runs[r, 1]) * size
                for first in range(runs[r, 0] * size, end, lanes):
                    n = min(lanes, end - first)
                    for c in range(channels):
                        total = found[c, :n]
                        total[:] = 0
                        for t in range(0, behind.shape[0], 4):
                            w0, w1 = matrix[g, c, t], matrix[g, c, t + 1]
                            w2, w3 = matrix[g, c, t + 2], matrix[g, c, t + 3]
                            a0, a1 = first - behind[t] * size, first - behind[t + 1] * size
                            a2, a3 = first - behind[t + 2] * size, first - behind[t + 3] * size
                            s0, s1 = line[channel[t], a0 : a0 + n], line[channel[t + 1], a1 : a1 + n]
                            s2, s3 = line[channel[t + 2], a2 : a2 + n], line[channel[t + 3], a3 : a3 + n]
                            for q in range(n):
                                total[q] += w0 * s0[q] + w1 * s1[q] + w2 * s2[q] + w3 * s3[q]
                    for c in range(channels):
                        line[c, first : first + n] = found[c, :n]
            for c in range(channels):
                for i in range(height):
                    for b in range(size):
                        row, at = x[b0 + b, g, c, i], (origin + i * up) * size + b
                        for j in range(width):
                            row[j] = line[c, at + j * left * size]

    return solve
