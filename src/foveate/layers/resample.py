"""Resampling to any size by separable kernels, of a whole picture or of a part of it as it is in the whole.

    y = R x C^T,   R[i, j] = k(j - u_i) / sum_j k(j - u_i),   u_i = (i + 1/2) r - 1/2,   r = source / target pixels

for the rows and, with a ratio of its own, for the columns. When a picture shrinks (r > 1) the kernels widen with r:

    bicubic   Keys' cubic with a = -1/2 of d / max(1, r), as in `foveate.data.degrade`
    lanczos   sinc(t) sinc(t / 3) for |t| < 3, t = d / max(1, r)
    area      the share of a source pixel that the target pixel covers: clamp((1 + r)/2 - |d|, 0, 1)

An `Axis` says which target pixels are wanted and which source pixels are at hand, so windows of a picture are
resampled on the whole picture's grid, whatever the ratio.
"""

from dataclasses import dataclass
from math import ceil, floor
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import InputError

Span = tuple[int, int]
"""(first, end), the end excluded."""

Region = tuple[Span, Span]
"""Rows and columns of a picture."""

Size = tuple[int, int]
"""(rows, columns) in pixels."""

KERNELS = ("bicubic", "lanczos", "area")


@dataclass(frozen=True)
class Axis:
    """One side of a picture, before and after resampling.

    Args:
        source, target: pixels of the whole side.
        want: target pixels that are wanted.
        have: source pixels that are at hand.
    """

    source: int
    target: int
    want: Span
    have: Span

    @classmethod
    def whole(cls, source: int, target: int) -> Self:
        """The whole side."""
        return cls(source, target, (0, target), (0, source))

    @classmethod
    def part(cls, source: int, target: int, want: Span, kernel: str = "bicubic", margin: int = 0) -> Self:
        """Some target pixels, with the source pixels that the kernel reads for them and a margin.

        >>> Axis.part(100, 50, (10, 12))
        Axis(source=100, target=50, want=(10, 12), have=(16, 28))
        """
        ratio = source / target
        reach = support(kernel, ratio) + margin
        low, high = ((i + 0.5) * ratio - 0.5 for i in (want[0], want[1] - 1))
        return cls(source, target, want, grown((floor(low), ceil(high) + 1), ceil(reach - 1e-9), source))

    @property
    def ratio(self) -> float:
        """Source pixels per target pixel."""
        return self.source / self.target

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole side."""
        return self.want == (0, self.target) and self.have == (0, self.source)

    def centres(self, device: torch.device | None = None) -> Tensor:
        """Where the wanted pixels lie, in pixels of what is at hand; float64 [want]."""
        return (torch.arange(*self.want, dtype=torch.float64, device=device) + 0.5) * self.ratio - 0.5 - self.have[0]

    def matrix(self, kernel: str, device: torch.device | None = None) -> Tensor:
        """R, float64 [want, have]."""
        distance = torch.arange(self.have[1] - self.have[0], device=device) - self.centres(device)[:, None]
        weights = _weights(distance.abs(), kernel, self.ratio)
        return weights / weights.sum(1, keepdim=True)


Axes = tuple[Axis, Axis]
"""Of rows and columns."""


def wholes(source: Size, size: Size) -> Axes:
    """Both sides of a whole picture."""
    return Axis.whole(source[0], size[0]), Axis.whole(source[1], size[1])


def parts(source: Size, size: Size, want: Region, kernel: str = "bicubic", margin: int = 0) -> Axes:
    """Both sides of a part of a picture, as `Axis.part`."""
    return (
        Axis.part(source[0], size[0], want[0], kernel, margin),
        Axis.part(source[1], size[1], want[1], kernel, margin),
    )


def had(axes: Axes) -> Region:
    """The source pixels at hand."""
    return axes[0].have, axes[1].have


def cropped(x: Tensor, have: Region, want: Region) -> Tensor:
    """Cut what is wanted out of what is at hand."""
    (top, left), (rows, columns) = (have[0][0], have[1][0]), want
    return x[..., rows[0] - top : rows[1] - top, columns[0] - left : columns[1] - left]


def grown(span: Span, by: int, length: int) -> Span:
    """A span with so many pixels more at both ends, cut at the ends of the picture."""
    return max(0, span[0] - by), min(length, span[1] + by)


def grown_region(region: Region, by: int, size: Size) -> Region:
    """A region with so many pixels more on all sides, cut at the border of the picture."""
    return grown(region[0], by, size[0]), grown(region[1], by, size[1])


def support(kernel: str, ratio: float) -> float:
    """How far, in source pixels, a kernel reaches. Raises: InputError for an unknown kernel."""
    if kernel not in KERNELS:
        raise InputError(f"unknown kernel {kernel!r}; use one of {', '.join(KERNELS)}.")
    return (1 + ratio) / 2 if kernel == "area" else (2 if kernel == "bicubic" else 3) * max(1.0, ratio)


def resize(x: Tensor, axes: Axes, kernel: str = "bicubic") -> Tensor:
    """Resample the part of a picture that is at hand to the part that is wanted.

    Args:
        axes: of rows and columns.

    Shape: x [B, C, rows.have, columns.have] -> [B, C, rows.want, columns.want].
    Raises: InputError for an unknown kernel or a tensor of another shape.

    >>> x = torch.rand(1, 3, 20, 30)
    >>> part = resize(x[..., 3:17, 6:24], parts((20, 30), (8, 20), ((3, 5), (6, 14))))
    >>> whole = resize(x, wholes((20, 30), (8, 20)))
    >>> torch.allclose(part, whole[..., 3:5, 6:14], atol=1e-6)
    True
    """
    support(kernel, 1)
    rows, columns = axes
    size = (rows.have[1] - rows.have[0], columns.have[1] - columns.have[0])
    if x.dim() != 4 or tuple(x.shape[2:]) != size:
        raise InputError(f"expected a picture [B, C, {size[0]}, {size[1]}], got {tuple(x.shape)}.")
    if kernel == "bicubic" and rows.is_whole and columns.is_whole:
        # antialias also selects a = -1/2, and sums only over the kernel's taps.
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        size = (rows.target, columns.target)
        return F.interpolate(wide, size, mode="bicubic", antialias=True, align_corners=False).to(x.dtype)
    return rows.matrix(kernel, x.device).to(x.dtype) @ x @ columns.matrix(kernel, x.device).to(x.dtype).T


def _weights(distance: Tensor, kernel: str, ratio: float) -> Tensor:
    if kernel == "area":
        return ((1 + ratio) / 2 - distance).clamp(0, 1)
    t = distance / max(1.0, ratio)
    if kernel == "lanczos":
        return torch.where(t < 3, torch.sinc(t) * torch.sinc(t / 3), 0)
    near, far = (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
    return torch.where(t <= 1, near, torch.where(t < 2, far, 0))
