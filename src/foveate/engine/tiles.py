"""Pictures of any size in bounded memory: plan tiles, cut, rejoin, stream, blend.

A tile is two boxes. The *cores* are a partition of the picture; the *window* of a tile is its core and some context
around it, cut off at the picture's border, so a window has no context that the picture has not. An operation whose
receptive field reaches r pixels gives the same result by tiles as on the whole picture when the context is at least r:
at the border it sees the same border, elsewhere the pixels that it needs. Where the reach is larger, `blend` hides the
seams: windows are averaged with weights that rise linearly from their edge to the core and beyond,

    y = sum_i w_i y_i / sum_i w_i,   w_i(p) = min(1, (p - window edge) / (2 * (core edge - window edge)))   per side

All boxes are xyxy in pixels of the input; `scale` is the whole number by which the operation enlarges.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from foveate.errors import InputError

Box = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Tile:
    """Hold one tile of a plan.

    Args:
        core: the part of the picture that this tile answers for, xyxy.
        window: what is cut out for it: the core and its context, xyxy.
    """

    core: Box
    window: Box


def plan(
    height: int,
    width: int,
    tile: int,
    overlap: int = 0,
    *,
    equal: bool = False,
    generator: torch.Generator | None = None,
) -> list[Tile]:
    """Plan tiles row by row.

    Args:
        height, width: of the picture in pixels.
        tile: side of a core; the last ones of a row or column hold what is left.
        overlap: context on each side in pixels, default 0; neighbouring windows share twice as much.
        equal: make all windows of one size, so that they stack into a batch: those at the border reach further
            inwards instead of being cut. Default False.
        generator: when given, the grid is shifted by a random offset (the first tiles are then cut too): seams that
            fall elsewhere at every step need no overlap to vanish.

    Raises: InputError for an empty picture, a tile below 1 or a negative overlap.

    >>> plan(4, 6, tile=4, overlap=1)
    [Tile(core=(0, 0, 4, 4), window=(0, 0, 5, 4)), Tile(core=(4, 0, 6, 4), window=(3, 0, 6, 4))]
    """
    if height < 1 or width < 1:
        raise InputError(f"A picture has at least one pixel, got {width} x {height}.")
    if tile < 1 or overlap < 0:
        raise InputError(f"plan needs tile >= 1 and overlap >= 0 pixels, got {tile} and {overlap}.")
    shift = [0, 0] if generator is None else torch.randint(tile, (2,), generator=generator).tolist()
    rows = _spans(height, tile, overlap, equal, shift[0])
    columns = _spans(width, tile, overlap, equal, shift[1])
    return [Tile((x0, y0, x1, y1), (wx0, wy0, wx1, wy1)) for y0, y1, wy0, wy1 in rows for x0, x1, wx0, wx1 in columns]


def _spans(length: int, tile: int, overlap: int, equal: bool, shift: int) -> list[tuple[int, int, int, int]]:
    """Cut one axis: (core start, core stop, window start, window stop) of each tile."""
    starts = [0, *range(shift or tile, length, tile)]
    size = min(tile + 2 * overlap, length)
    spans = []
    for start, stop in zip(starts, [*starts[1:], length], strict=True):
        if equal:
            first = min(max(start - overlap, 0), length - size)
            spans.append((start, stop, first, first + size))
        else:
            spans.append((start, stop, max(start - overlap, 0), min(stop + overlap, length)))
    return spans


def split(x: Tensor, tiles: Iterable[Tile], scale: int = 1) -> list[Tensor]:
    """Cut the windows out of a picture, as views.

    Args:
        x: the picture, of any dtype.
        tiles: of a plan.
        scale: when the picture is already enlarged against the plan, by how much; default 1.

    Shape: x [..., H * scale, W * scale] -> one [..., h * scale, w * scale] per tile.
    """
    boxes = (_scaled(t.window, scale) for t in tiles)
    return [x[..., y0:y1, x0:x1] for x0, y0, x1, y1 in boxes]


def merge(parts: Iterable[Tensor], tiles: Sequence[Tile], scale: int = 1) -> Tensor:
    """Put a picture together from the cores of its windows; `merge(split(x, tiles), tiles)` is x exactly.

    Args:
        parts: one result per tile, covering its window enlarged by `scale`; any dtype.
        tiles: a whole plan.
        scale: whole number of output pixels per input pixel, default 1.

    Shape: parts [..., h * scale, w * scale] -> [..., H * scale, W * scale].
    Raises: InputError when a part does not have the size of its window.
    """
    height, width = _size(tiles)
    out: Tensor | None = None
    for part, tile in zip(parts, tiles, strict=True):
        if out is None:
            out = part.new_empty(*part.shape[:-2], height * scale, width * scale)
        x0, y0, x1, y1 = _scaled(tile.core, scale)
        out[..., y0:y1, x0:x1] = _core(part, tile, scale)
    assert out is not None
    return out


def stream(
    read: Callable[[int, int, int, int], Tensor],
    fn: Callable[[Tensor], Tensor],
    write: Callable[[int, Tensor], None],
    height: int,
    width: int,
    tile: int,
    halo: int,
    scale: int = 1,
) -> None:
    """Run an operation over a picture that need not fit in memory, a row of tiles at a time.

    Args:
        read: gives the pixels of a box, called as read(x0, y0, x1, y1) from top to bottom.
        fn: the operation, window in, window enlarged by `scale` out.
        write: takes finished rows from top to bottom, called as write(y, band), y counted in output rows.
        height, width: of the input in pixels.
        tile: side of a core in pixels.
        halo: context in pixels; when it covers the reach of `fn` the result does not depend on the tiling.
        scale: whole number of output pixels per input pixel, default 1.

    Shape: read -> [..., h, w]; fn: [..., h, w] -> [..., h * scale, w * scale]; band [..., rows, width * scale].
    Raises: InputError when `fn` returns another size, and what `plan` raises.
    """
    for _, row in groupby(plan(height, width, tile, halo), key=lambda t: t.core[1]):
        tiles = list(row)
        top, bottom = scale * tiles[0].core[1], scale * tiles[0].core[3]
        band: Tensor | None = None
        for t in tiles:
            part = _core(fn(read(*t.window)), t, scale)
            if band is None:
                band = part.new_empty(*part.shape[:-2], bottom - top, width * scale)
            band[..., scale * t.core[0] : scale * t.core[2]] = part
        assert band is not None
        write(top, band)


def blend_weights(tiles: Sequence[Tile], scale: int = 1) -> list[Tensor]:
    """Give each window's share of every pixel it covers; at each pixel of the picture the shares sum to 1.

    Shape: one float32 [h * scale, w * scale] per tile.
    """
    height, width = _size(tiles)
    raw = [
        _ramp(t.window[1], t.core[1], t.core[3], t.window[3], scale)[:, None]
        * _ramp(t.window[0], t.core[0], t.core[2], t.window[2], scale)
        for t in tiles
    ]
    total = torch.zeros(height * scale, width * scale)
    for weight, where in zip(raw, split(total, tiles, scale), strict=True):
        where += weight
    return [weight / where for weight, where in zip(raw, split(total, tiles, scale), strict=True)]


def blend(parts: Iterable[Tensor], tiles: Sequence[Tile], scale: int = 1) -> Tensor:
    """Put a picture together by cross-fading overlapping windows; pixels under one window are taken as they are.

    Args:
        parts: one result per tile, covering its window enlarged by `scale`; integers are rounded at the end.
        tiles: a whole plan, with an overlap for there to be anything to fade.
        scale: whole number of output pixels per input pixel, default 1.

    Shape: parts [..., h * scale, w * scale] -> [..., H * scale, W * scale].
    Raises: InputError when a part does not have the size of its window.
    """
    height, width = _size(tiles)
    out: Tensor | None = None
    for part, tile, weight in zip(parts, tiles, blend_weights(tiles, scale), strict=True):
        _check_part(part, tile, scale)
        if out is None:
            dtype = part.dtype
            precise = torch.promote_types(dtype, torch.float32)
            out = torch.zeros(*part.shape[:-2], height * scale, width * scale, dtype=precise, device=part.device)
        (where,) = split(out, [tile], scale)
        where += part * weight.to(out)
    assert out is not None
    return out.to(dtype) if dtype.is_floating_point else out.round().to(dtype)


def _scaled(box: Box, scale: int) -> Box:
    x0, y0, x1, y1 = box
    return scale * x0, scale * y0, scale * x1, scale * y1


def _ramp(first: int, start: int, stop: int, last: int, scale: int) -> Tensor:
    at = (torch.arange((last - first) * scale) + 0.5) / scale
    rising = at / (2 * (start - first)) if start > first else torch.ones_like(at)
    falling = (last - first - at) / (2 * (last - stop)) if last > stop else torch.ones_like(at)
    return torch.minimum(rising, falling).clamp_max(1)


def _size(tiles: Sequence[Tile]) -> tuple[int, int]:
    if not tiles:
        raise InputError("There are no tiles to put together; pass a whole plan.")
    return max(t.core[3] for t in tiles), max(t.core[2] for t in tiles)


def _check_part(part: Tensor, tile: Tile, scale: int) -> None:
    x0, y0, x1, y1 = tile.window
    wanted = ((y1 - y0) * scale, (x1 - x0) * scale)
    if part.dim() < 2 or tuple(part.shape[-2:]) != wanted:
        raise InputError(
            f"The window {tile.window} enlarged {scale} times is {wanted[1]} x {wanted[0]} pixels, "
            f"but its result has shape {tuple(part.shape)}; return the window's size times scale."
        )


def _core(part: Tensor, tile: Tile, scale: int) -> Tensor:
    _check_part(part, tile, scale)
    left, top = tile.window[:2]
    x0, y0, x1, y1 = tile.core
    return part[..., scale * (y0 - top) : scale * (y1 - top), scale * (x0 - left) : scale * (x1 - left)]
