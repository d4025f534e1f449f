"""Evaluating a neural image so that every machine gives the same pixels.

Floating point is a carrier here. What a layer gives is made a multiple of 2^-20 and codes times steps have few binary
digits, so that in 64 bits a sum of products is exact: its order, which libraries choose by machine and number of
threads, does not matter. Sines come from additions and multiplications alone, one operation at a time.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.layers.implicit import Arithmetic, NeuralImage
from foveate.ops.threads import each

_CELLS = 1 << 18
"""Numbers of a layer that are computed at once."""

_LARGEST = 512.0
_TAYLOR = tuple((-1) ** k * (2 * math.pi) ** (2 * k + 1) / math.factorial(2 * k + 1) for k in range(9))


def sine(turns: Tensor) -> Tensor:
    """sin(2 pi turns) to 2^-24, by a rule that leaves nothing to the machine.

    >>> sine(torch.tensor([0.0, 0.25, -0.5, 1.75], dtype=torch.float64)).tolist()
    [0.0, 1.0, 0.0, -1.0]
    """
    t = turns - turns.round()
    t = t - 2 * (t - t.clamp(-0.25, 0.25))  # sin(pi - u) = sin u
    square, total = t * t, torch.full_like(t, _TAYLOR[-1])
    for factor in reversed(_TAYLOR[:-1]):
        total.mul_(square).add_(factor)
    return total.mul_(t).mul_(2.0**24).round_().mul_(2.0**-24)


def snap(values: Tensor) -> Tensor:
    """The nearest multiple of 2^-20."""
    return values.mul(2.0**20).round_().mul_(2.0**-20).clamp_(-_LARGEST, _LARGEST)


EXACT = Arithmetic(sine, snap)


def render(
    net: NeuralImage,
    height: int,
    width: int,
    level: int = -1,
    size: tuple[int, int] | None = None,
    window: tuple[int, int, int, int] | None = None,
) -> Tensor:
    """Draw a neural image; at the cost of the window alone.

    Args:
        height, width: of the picture it was made for.
        level: which of its pictures.
        size: (width, height) to draw at. Where that is coarser than the picture, finer samples are averaged.
        window: (x, y, width, height) of it.

    Shape: -> [C, h, w] in 0..1, float32.
    """
    net = copy.deepcopy(net).double()
    full = (width, height) if size is None else size
    left, top, w, h = (0, 0, *full) if window is None else window
    n = math.ceil(max(width / full[0], height / full[1]))
    y = places(full[1] * n, height / max(height, width), top * n, h * n)
    x = places(full[0] * n, width / max(height, width), left * n, w * n)
    out = torch.empty(len(net.offsets[level]), h, w)
    wide = max(1, min(w, _CELLS // (n * n * net.levels[level][0])))
    rows = max(1, _CELLS // (n * n * net.levels[level][0] * wide))

    def draw(part: tuple[int, int]) -> None:
        i, j = part
        own_y, own_x = y[i * n : (i + rows) * n], x[j * n : (j + wide) * n]
        (colours,) = net(own_y, own_x, [level], EXACT)
        plane = colours.T.clamp(0, 1).view(len(out), len(own_y), len(own_x))
        out[:, i : i + rows, j : j + wide] = F.avg_pool2d(plane, n) if n > 1 else plane

    with torch.inference_mode():
        each(draw, [(i, j) for i in range(0, h, rows) for j in range(0, w, wide)])
    return out


def places(total: int, extent: float = 1.0, start: int = 0, count: int | None = None) -> Tensor:
    """Centres of pixels `start` to `start + count` out of `total` that lie between -extent and extent, in float64.

    >>> places(2, 0.5).tolist(), places(4, 1.0, 3, 1).tolist()
    ([-0.25, 0.25], [0.75])
    """
    number = torch.arange(start, start + (total if count is None else count), dtype=torch.float64)
    return ((2 * number + 1) / total - 1) * extent
