"""What every super-resolution network of a fixed scale offers: one face over dense and adaptive ones.

A network is given a way to `read` windows of the low-resolution picture and returns full-width strips of the enlarged
one, top to bottom, so that pictures of any size pass through bounded memory. What it decides (which pixel, which
patch deserves more) depends on the picture alone, never on how the picture was cut.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Self

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from foveate.engine.tiles import Box, plan
from foveate.errors import BudgetError, InputError

Read = Callable[[int, int, int, int], Tensor]
"""read(x0, y0, x1, y1) -> [1, 3, y1 - y0, x1 - x0], values in 0..1."""

TILE = 320
"""Side of the windows that networks are run on, in low-resolution pixels: a few MB of features stay in cache."""

STRIP_PIXELS = 1 << 20
"""Low-resolution pixels of a strip, which bounds the memory of streaming; a smaller picture is one strip."""


@dataclass
class Rendered:
    """Enlarged rows, and what they cost.

    Attributes:
        image: [B, 3, s*h, s*w], not clipped.
        effort: [B, 1, h, w] in 0..1, the share of the full network each low-resolution pixel was given.
        flops: floating-point operations spent, 2 per multiply-accumulate; what neighbouring tiles compute twice is
            left out, for it is the same at every budget.
        counts: what was decided, e.g. {"heavy": 120, "pixels": 400} or {"exit 1": 3, "exit 2": 1}; sums over strips.
    """

    image: Tensor
    effort: Tensor
    flops: float
    counts: dict[str, int] = field(default_factory=dict)


class Upscaler(nn.Module, PyTorchModelHubMixin):
    """Base of super-resolution networks.

    Attributes:
        slug: the system's name in the catalogue.
        scale: enlargement s, an integer.
        halo: radius, in low-resolution pixels, of what one output pixel sees.
        floor: the smallest budget share it can meet; 1 for networks that do not adapt.
        cheaper: the method to use below the floor.
    """

    slug: str
    scale: int
    halo: int
    cheaper: str | None = None

    @property
    def floor(self) -> float:
        """The smallest share of the full cost the network can run at."""
        return 1.0

    def full_flops(self, height: int, width: int) -> float:
        """FLOPs of the full network on a [1, 3, height, width] picture, without tile overlap."""
        return self._flops_per_pixel() * height * width

    def _flops_per_pixel(self) -> float:
        from foveate.meter import count_flops

        if "flops_per_pixel" not in self.__dict__:
            side = 2 * self.scale
            example = torch.zeros(1, 3, side, side, dtype=self.dtype, device=self.device)
            with torch.no_grad():
                self.__dict__["flops_per_pixel"] = count_flops(self.forward, example) / side**2
        return self.__dict__["flops_per_pixel"]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.parameters()).device

    def check_share(self, share: float) -> None:
        """Refuse a share of the full cost that the network cannot meet.

        Raises: BudgetError naming the floor and the cheaper method.
        """
        if not self.floor - 1e-9 <= share <= 1:
            name = type(self).__name__
            advice = f"; for less, use method {self.cheaper!r}" if self.cheaper else ""
            raise BudgetError(
                f"{name} x{self.scale} takes shares from {self.floor:.2f} to 1 of its full cost, got {share:g}{advice}."
            )

    def strips(
        self, read: Read, height: int, width: int, share: float = 1.0, tile: int | None = None
    ) -> Iterator[Rendered]:
        """Enlarge a picture of any size, as full-width strips from top to bottom.

        Args:
            read: gives windows of the picture.
            height, width: size of the picture in pixels.
            share: share of the full cost to spend, from `floor` to 1.
            tile: side of the windows in pixels; the result does not depend on it, memory does.
        """
        self.check_share(share)
        s = self.scale
        for y0, y1 in strip_rows(height, width, tile):
            image = None
            for x0, top, x1, bottom in (t.core for t in plan(y1 - y0, width, tile or TILE)):
                x, dx, dy = with_halo(read, height, width, (x0, y0 + top, x1, y0 + bottom), self.halo)
                part = self(x)[..., s * dy : s * (dy + bottom - top), s * dx : s * (dx + x1 - x0)]
                if image is None:
                    image = part.new_empty(1, 3, s * (y1 - y0), s * width)
                image[..., s * top : s * bottom, s * x0 : s * x1] = part
            assert image is not None
            yield Rendered(image, image.new_ones(1, 1, y1 - y0, width), self.full_flops(y1 - y0, width))

    def upscale(self, x: Tensor, share: float = 1.0, tile: int | None = None) -> Rendered:
        """Enlarge pictures that lie in memory.

        Shape: x [B, 3, h, w] in 0..1 -> image [B, 3, s*h, s*w], not clipped.
        Raises: InputError on a wrong shape; BudgetError on a share that cannot be met.
        """
        check_picture(x)
        x = x.to(self.dtype)
        pictures = []
        with torch.inference_mode():
            for one in x:
                read = window_reader(one[None])
                pictures.append(gather_strips(list(self.strips(read, x.shape[2], x.shape[3], share, tile))))
        if len(pictures) == 1:
            return pictures[0]
        return Rendered(
            torch.cat([p.image for p in pictures]),
            torch.cat([p.effort for p in pictures]),
            sum(p.flops for p in pictures),
            sum_counts(p.counts for p in pictures),
        )

    def shares_of(self, counts: dict[str, int]) -> dict[str, float]:
        """Decisions as shares of all units decided on."""
        total = sum(counts.values())
        return {name: count / total for name, count in counts.items()}

    @classmethod
    def pretrained(cls, scale: int, **config: object) -> Self:
        """The network with the weights that come with foveate."""
        from foveate import weights

        return weights.load(cls.slug, scale, **config)


def check_picture(x: Tensor) -> None:
    """Refuse anything but a non-empty, finite [B, 3, h, w] float picture. Raises: InputError."""
    if x.dim() != 4 or x.shape[1] != 3:
        raise InputError(f"expected pictures of shape [B, 3, H, W], got {tuple(x.shape)}; add or expand dimensions.")
    if x.numel() == 0:
        raise InputError(f"the picture is empty: shape {tuple(x.shape)}.")
    if not x.is_floating_point():
        raise InputError(f"expected float values in 0..1, got {x.dtype}; divide by the type's largest value.")
    if not torch.isfinite(x).all():
        raise InputError("the picture holds NaN or infinite values; clean it first (torch.nan_to_num).")


def window_reader(x: Tensor) -> Read:
    """Windows of a tensor [1, 3, h, w]."""
    return lambda x0, y0, x1, y1: x[..., y0:y1, x0:x1]


def strip_rows(height: int, width: int, tile: int | None = None) -> list[tuple[int, int]]:
    """Row ranges of nearly equal strips of at most STRIP_PIXELS (and at most `tile` rows, where one is given).

    >>> strip_rows(10, 100, tile=4)
    [(0, 3), (3, 6), (6, 10)]
    """
    rows = max(1, min(tile or height, max(STRIP_PIXELS // width, 16)))
    n = -(-height // rows)
    edges = [i * height // n for i in range(n + 1)]
    return list(pairwise(edges))


def with_halo(read: Read, height: int, width: int, box: Box, halo: int) -> tuple[Tensor, int, int]:
    """A box with its context, cut at the border of the picture: (pixels, columns to the left, rows above)."""
    x0, y0, x1, y1 = box
    left, top = max(0, x0 - halo), max(0, y0 - halo)
    return read(left, top, min(width, x1 + halo), min(height, y1 + halo)), x0 - left, y0 - top


def gather_strips(strips: list[Rendered]) -> Rendered:
    """Stack strips of one picture."""
    if len(strips) == 1:
        return strips[0]
    return Rendered(
        torch.cat([s.image for s in strips], dim=2),
        torch.cat([s.effort for s in strips], dim=2),
        sum(s.flops for s in strips),
        sum_counts(s.counts for s in strips),
    )


def sum_counts(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """Add up decisions by name."""
    total: dict[str, int] = {}
    for one in counts:
        for key, value in one.items():
            total[key] = total.get(key, 0) + value
    return total


def enlarge(x: Tensor, scale: int, mode: str = "bilinear") -> Tensor:
    """Interpolate by an integer factor, pixel centres aligned (align_corners=False)."""
    return F.interpolate(x, scale_factor=scale, mode=mode, align_corners=False)
