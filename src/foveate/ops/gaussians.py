"""Two-dimensional Gaussians to pixels, and gradients back: order-free, at any resolution, any window by itself.

Gaussian n has a centre mu_n = (x, y), a conic Q_n (the inverse of its covariance) and a colour c_n of any number of
channels. At a place p of the plane

    s_n = (p - mu_n)^T Q_n (p - mu_n) / 2        a_n = exp(-s_n)

and there are three ways to make a picture of it:

    sum    out(p) = sum_n a_n c_n
    cut    the same, where a_n < 1/255 counts as 0 (Zhang et al. 2024, arXiv:2403.08551, but for its boxes of 3 sigma)
    topk   out(p) = sum_{n in T} a_n c_n / (eps + sum_{n in T} a_n), T the k largest a_n at p that are at least eps
           (Zhang et al. 2025, arXiv:2407.01866); which those are is not differentiated

The plane is continuous. A picture of H x W pixels is [0, W] x [0, H] of it, a pixel the value at its middle, and a
`Grid` says which places to look at: the same Gaussians make a picture of any size, or a window of one.

Fast paths bin Gaussians into tiles. On the CPU a tile is 8 pixels wide, so that whatever a Gaussian touches of it, rows
r0 to r1, is one run of 8 (r1 - r0) numbers, a vector loop without a remainder. A pixel adds its Gaussians in their
order in every tile, on every number of threads, in every window: the bits of the result do not depend on them. Instead
of lists of the k best, a pass finds the value between the k-th and the next at every pixel; what lies above it counts.
The fast paths leave out of "sum" what is farther than 6 standard deviations, 1.5e-8 of the colour.
"""

from dataclasses import dataclass, replace
from math import inf, isfinite, log, sqrt
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveate.errors import InputError
from foveate.ops import fast_allowed

MODES = ("sum", "cut", "topk")
_FAR = 6.0
_CELLS = 1 << 20
"""Weights that the reference holds at a time."""


@dataclass(frozen=True)
class Grid:
    """Places of the plane that pixels look at: pixel (i, j) at ((column + j + centre) dx, (row + i + centre) dy).

    Args:
        height, width: pixels.
        row, column: pixels above and to the left of the first.
        dy, dx: distance of neighbours in the plane.
        centre: of a pixel; 0.5 is its middle, 0 the convention of the official code of both systems above.

    Raises: InputError when there is no pixel or no distance.

    >>> Grid.over(4, 6).window(2, 1, 3, 2).xs().tolist()
    [2.5, 3.5, 4.5]
    >>> Grid.over(4, 6, size=(8, 12)).xs()[:3].tolist()
    [0.25, 0.75, 1.25]
    """

    height: int
    width: int
    row: int = 0
    column: int = 0
    dy: float = 1.0
    dx: float = 1.0
    centre: float = 0.5

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise InputError(f"A grid has pixels, got {self.width}x{self.height}; pass at least 1x1.")
        if not (0 < self.dy < inf and 0 < self.dx < inf):
            raise InputError(f"Neighbours of a grid are a finite distance above 0 apart, got {self.dx} and {self.dy}.")

    @classmethod
    def over(cls, height: float, width: float, size: tuple[int, int] | None = None) -> Self:
        """The grid of a whole picture that is [0, width] x [0, height] in the plane.

        Args:
            size: (rows, columns) to look at it with; one for each unit of the plane when None.
        """
        rows, columns = size or (round(height), round(width))
        return cls(rows, columns, dy=height / max(rows, 1), dx=width / max(columns, 1))

    def window(self, x: int, y: int, width: int, height: int) -> Self:
        """The part of width x height pixels from column x and row y on."""
        return replace(self, height=height, width=width, row=self.row + y, column=self.column + x)

    def xs(self) -> Tensor:
        """x of every column. Shape: [width] float64."""
        return (torch.arange(self.column, self.column + self.width, dtype=torch.float64) + self.centre) * self.dx

    def ys(self) -> Tensor:
        """y of every row. Shape: [height] float64."""
        return (torch.arange(self.row, self.row + self.height, dtype=torch.float64) + self.centre) * self.dy


class Way(NamedTuple):
    """How Gaussians become a picture: places, mode, and how far a Gaussian reaches in standard deviations."""

    grid: Grid
    mode: str
    k: int
    eps: float
    reach: float


def render(
    centres: Tensor,
    conics: Tensor,
    colours: Tensor,
    grid: Grid,
    mode: str = "sum",
    *,
    k: int = 10,
    eps: float = 1e-4,
    reach: float | None = None,
) -> Tensor:
    """Draw Gaussians.

    Differentiable in all three tensors; once on the fast paths (float32 on the CPU, Triton on CUDA), any number of
    times on the reference. A conic that is not positive definite draws nothing and gets no gradient.

    Args:
        centres: (x, y) in the plane.
        conics: (Qxx, Qxy, Qyy); see `conic_of_cholesky` and `conic_of_scale`.
        colours: of any range.
        grid: the places to look at.
        mode: "sum", "cut" or "topk"; see above.
        k, eps: of "topk".
        reach: standard deviations beyond which a Gaussian counts as 0; by default none for "sum", 3.33 for "cut"
            (a = 1/255) and 4.29 for "topk" (a = eps; a nearer cut makes edges that a fit cannot see).

    Shape: centres [N, 2], conics [N, 3], colours [N, C] -> [C, height, width].
    Raises: InputError for shapes, types or options that make no sense.

    >>> centres, conics = torch.tensor([[1.5, 0.5]]), torch.tensor([[1.0, 0.0, 1.0]])
    >>> render(centres, conics, torch.tensor([[2.0]]), Grid(1, 3))
    tensor([[[1.2131, 2.0000, 1.2131]]])
    """
    _check(centres, conics, colours, mode, k, eps, reach)
    usual = {"sum": 0.0, "cut": 1 / 255, "topk": min(eps, 0.5)}[mode]
    way = Way(grid, mode, k, eps, reach_of(usual) if reach is None else reach)
    engine = _engine(centres, conics, colours)
    if engine is None:
        return render_reference(centres, conics, colours, way)
    near = way._replace(reach=min(way.reach, _FAR))
    out: Tensor = _Rendered.apply(centres, conics, colours, near, engine)
    return out


def render_reference(centres: Tensor, conics: Tensor, colours: Tensor, way: Way) -> Tensor:
    """`render` in plain PyTorch: every Gaussian at every pixel, as many rows at a time as memory allows."""
    ys, xs = (t.to(centres) for t in (way.grid.ys(), way.grid.xs()))
    rows = max(1, _CELLS // (len(xs) * max(1, len(centres))))
    return torch.cat([_rows(centres, conics, colours, xs, part, way) for part in ys.split(rows)], 1)


def _rows(centres: Tensor, conics: Tensor, colours: Tensor, xs: Tensor, ys: Tensor, way: Way) -> Tensor:
    dx = xs[:, None] - centres[:, 0]  # [w, N]
    dy = (ys[:, None] - centres[:, 1])[:, None]  # [h, 1, N]
    half = (conics[:, 0] * dx * dx + conics[:, 2] * dy * dy) / 2 + conics[:, 1] * dx * dy
    seen = drawn(conics) & (half <= way.reach**2 / 2)
    weights = torch.where(seen, torch.exp(-torch.where(seen, half, half.new_zeros(()))), half.new_zeros(()))
    if way.mode != "topk":
        return (weights @ colours).permute(2, 0, 1)
    top, index = weights.topk(min(way.k, len(centres)), -1)
    total = (top[..., None] * colours[index]).sum(-2)
    return (total / (way.eps + top.sum(-1, keepdim=True))).permute(2, 0, 1)


def drawn(conics: Tensor) -> Tensor:
    """Which conics are positive definite and finite. Shape: [N, 3] -> [N] bool."""
    a, b, c = conics.unbind(-1)
    det = a * c - b * b
    return (a > 0) & (c > 0) & (det > 0) & torch.isfinite(det)


def reach_of(weight: float) -> float:
    """Standard deviations from the centre at which a Gaussian has fallen to a weight.

    >>> round(reach_of(1 / 255), 2), reach_of(0)
    (3.33, inf)
    """
    return sqrt(-2 * log(weight)) if weight else inf


def conic_of_cholesky(factors: Tensor) -> Tensor:
    """Conics of covariances L L^T, L = [[l11, 0], [l21, l22]].

    Shape: (l11, l21, l22) [N, 3] -> [N, 3].
    """
    l11, l21, l22 = factors.unbind(-1)
    scale = 1 / (l11 * l22).square()
    return torch.stack([(l21.square() + l22.square()) * scale, -l11 * l21 * scale, l11.square() * scale], -1)


def conic_of_scale(inverse: Tensor, angle: Tensor) -> Tensor:
    """Conics of standard deviations along two axes, the first at an angle from x towards y.

    Args:
        inverse: 1 / standard deviation along each axis.
        angle: radians.

    Shape: inverse [N, 2], angle [N] -> [N, 3].
    """
    first, second = inverse.square().unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack(
        [first * cos**2 + second * sin**2, (first - second) * cos * sin, first * sin**2 + second * cos**2], -1
    )


class _Rendered(torch.autograd.Function):
    """A fast path. Its engine draws, and gathers for each Gaussian what the gradients are made of.

    With the upstream gradient G and r = G, or for "topk" G / (eps + sum a) and its product with the picture in t,

        dc_n = sum_p a_n r      e_n = a_n (r . c_n - t)      dmu_n = Q_n sum_p e_n d      dQ_n = -sum_p e_n d d^T / 2

    where d = p - mu_n, and t = 0 in the other modes.
    """

    @staticmethod
    def forward(ctx: Any, centres: Tensor, conics: Tensor, colours: Tensor, way: Way, engine: Any) -> Tensor:
        out, sums, thresholds = engine.draw(centres, conics, colours, way)
        ctx.save_for_backward(centres, conics, colours, *((out, sums, thresholds) if way.mode == "topk" else ()))
        ctx.way, ctx.engine = way, engine
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        centres, conics, colours, *kept = ctx.saved_tensors
        upstream, offset, thresholds = grads[0], None, None
        if kept:
            out, sums, thresholds = kept
            upstream = upstream / (ctx.way.eps + sums)
            offset = (upstream * out).sum(0)
        found = ctx.engine.gather(centres, conics, colours, ctx.way, upstream, offset, thresholds)
        channels = colours.shape[1]
        x, y, xx, xy, yy = found[:, channels:].unbind(1)
        a, b, c = conics.unbind(1)
        moved = torch.stack([a * x + b * y, b * x + c * y], 1)
        return moved, torch.stack([-xx / 2, -xy, -yy / 2], 1), found[:, :channels].contiguous(), None, None


def _engine(centres: Tensor, conics: Tensor, colours: Tensor) -> Any:
    """The module with the fast `draw` and `gather` for these tensors, or None."""
    if not fast_allowed() or any(t.dtype != torch.float32 for t in (centres, conics, colours)):
        return None
    if centres.device.type == "cpu":
        from foveate.ops import _gaussians_cpu

        return _gaussians_cpu
    if centres.device.type == "cuda":
        return _triton()
    return None


def _triton() -> Any:
    try:
        from foveate.ops import _gaussians_triton
    except ImportError:
        return None
    return _gaussians_triton


def _check(
    centres: Tensor, conics: Tensor, colours: Tensor, mode: str, k: int, eps: float, reach: float | None
) -> None:
    shapes = f"centres {tuple(centres.shape)}, conics {tuple(conics.shape)}, colours {tuple(colours.shape)}"
    count = len(centres) if centres.dim() else -1
    fits = centres.shape == (count, 2) and conics.shape == (count, 3)
    if not fits or colours.dim() != 2 or len(colours) != count or colours.shape[1] < 1:
        raise InputError(f"Gaussians are centres [N, 2], conics [N, 3] and colours [N, C], got {shapes}.")
    if not centres.is_floating_point() or len({(t.dtype, t.device) for t in (centres, conics, colours)}) > 1:
        found = ", ".join(f"{t.dtype} on {t.device}" for t in (centres, conics, colours))
        raise InputError(f"Centres, conics and colours share one floating-point type and device, got {found}.")
    if mode not in MODES:
        raise InputError(f"There is no mode {mode!r}; use one of {', '.join(map(repr, MODES))}.")
    if k < 1 or not eps > 0:
        raise InputError(f"topk needs k of at least 1 and eps above 0, got k={k} and eps={eps}.")
    if reach is not None and not (isfinite(reach) and reach > 0):
        raise InputError(f"A Gaussian reaches a finite number of standard deviations above 0, got {reach!r}.")
