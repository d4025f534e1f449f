"""Windows of a map, shifted ones too, and what must not be seen across the seam of a shift.

A map [B, H, W, C], H and W multiples of the side S, is rolled up and left by the shift and cut into R x K windows of
N = S*S places. After the roll only the last row and the last column of windows hold places that were no neighbours:
those from the other end of the map. So there are four kinds of windows (last row or not, last column or not), and a
mask per kind does for maps of any size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def cut(x: Tensor, side: int, shift: int = 0) -> Tensor:
    """Roll and cut into windows. Shape: [B, H, W, C] -> [B, R, K, S*S, C]."""
    if shift:
        x = torch.roll(x, (-shift, -shift), (1, 2))
    return x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3).flatten(3, 4)


def paste(windows: Tensor, side: int, shift: int = 0) -> Tensor:
    """Undo `cut`. Shape: [B, R, K, S*S, C] -> [B, H, W, C]."""
    x = windows.unflatten(3, (side, side)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return torch.roll(x, (shift, shift), (1, 2)) if shift else x


def wrapped(side: int, shift: int, every: int = 1) -> Tensor:
    """Which places of a shifted window must not see which: those that the roll brought from the other end of the map.

    Args:
        every: keys stand for cells of `every` x `every` places; it divides side and shift.

    Shape: bool [2, 2, S*S, (S / every)^2], the first two axes: of the last row of windows, of the last column.

    >>> wrapped(2, 1)[0, 1].int().tolist()
    [[0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0]]
    """
    far = torch.arange(side) >= side - shift
    none = torch.zeros_like(far)
    kinds = torch.stack([none, far])
    region = 2 * kinds[:, None, :, None].int() + kinds[None, :, None, :].int()  # [2, 2, S, S]
    queries, keys = region.flatten(2), region[..., ::every, ::every].flatten(2)
    return queries[..., :, None] != keys[..., None, :]


def mirrored(size: int, length: int) -> Tensor:
    """Where to read so that an axis goes on mirrored, as often as it takes (reflection padding of any length).

    >>> mirrored(3, 8).tolist()
    [0, 1, 2, 1, 0, 1, 2, 1]
    """
    around = max(2 * size - 2, 1)
    index = torch.arange(length) % around
    return torch.minimum(index, (around - index) % around) if size > 1 else index


def fill_windows(x: Tensor, side: int) -> Tensor:
    """Extend a picture below and to the right to whole windows, mirrored. Shape: [B, C, H, W] -> [B, C, R*S, K*S]."""
    (h, w), (down, right) = x.shape[2:], (-n % side for n in x.shape[2:])
    if not down and not right:
        return x
    if down < h and right < w:
        return F.pad(x, (0, right, 0, down), mode="reflect")
    rows, columns = (mirrored(n, n + more).to(x.device) for n, more in ((h, down), (w, right)))
    return x[..., rows[:, None], columns]
