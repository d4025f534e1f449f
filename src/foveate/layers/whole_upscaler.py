"""Networks in which one pixel sees very far, or all of the picture: what they see is fixed by the picture alone.

Such a network has no halo that tiles could be given at a sensible price. So a picture of up to PIECE pixels a side
goes through in one piece, as published; a larger one is cut into fixed pieces with some context, each of which the
network treats as a picture of its own. Pieces follow from the size of the picture: a smaller `tile` changes nothing.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from foveate.layers.upscaler import STRIP_PIXELS, Read, Rendered, Upscaler, sum_counts, with_halo

PIECE = 768
"""Longest side of a piece in low-resolution pixels, without its context."""


class WholeUpscaler(Upscaler):
    """Base of networks that are run on whole pictures, up to PIECE pixels a side.

    Attributes:
        halo: context of a piece of a larger picture, in pixels; a multiple of `grid`.
        grid: pieces and their contexts begin at multiples of it, so that windows and cells lie as in the whole picture.
    """

    grid: int = 1

    def render(self, x: Tensor) -> tuple[Tensor, float, dict[str, int]]:
        """Enlarge a piece: (image, share of the full network's work, what was decided)."""
        return self(x), 1.0, {}

    def strips(
        self, read: Read, height: int, width: int, share: float = 1.0, tile: int | None = None
    ) -> Iterator[Rendered]:
        """See `Upscaler.strips`. `tile` is not looked at: pieces are fixed."""
        self.check_share(share)
        s = self.scale
        for y0, y1 in spans(height, min(PIECE, STRIP_PIXELS // width), self.grid):
            images, efforts, flops, counts = [], [], 0.0, []
            for x0, x1 in spans(width, PIECE, self.grid):
                x, dx, dy = with_halo(read, height, width, (x0, y0, x1, y1), self.halo)
                image, spent, chosen = self.render(x)
                images.append(image[..., s * dy : s * (dy + y1 - y0), s * dx : s * (dx + x1 - x0)])
                efforts.append(x.new_full((1, 1, y1 - y0, x1 - x0), spent))
                flops += spent * self.full_flops(y1 - y0, x1 - x0)
                counts.append(chosen)
            yield Rendered(torch.cat(images, 3), torch.cat(efforts, 3), flops, sum_counts(counts))


def spans(length: int, limit: int, grid: int = 1) -> list[tuple[int, int]]:
    """Nearly equal ranges of about `limit` at most, which begin at multiples of `grid`.

    >>> spans(100, 48, 16)
    [(0, 48), (48, 96), (96, 100)]
    >>> spans(70, 48, 16)
    [(0, 48), (48, 70)]
    """
    count = -(-length // max(limit, grid))
    step = -(-length // (count * grid)) * grid
    return [(start, min(start + step, length)) for start in range(0, length, step)]
