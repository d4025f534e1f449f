"""The verb `downscale`: any picture, shrunk by a filter or a network, streamed so that memory stays bounded.

`rescale_cycle` shrinks and enlarges a picture again and again and says what is left of it. Each cycle starts from what
a file would hold of the one before: both the small and the enlarged picture are rounded to 8 bits.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate import catalog, weights
from foveate.data import pictures
from foveate.errors import InputError
from foveate.layers.resample import Size
from foveate.layers.rescaler import FILTERS, Rescaler, as_rescaler, check_direction, quantise
from foveate.layers.upscaler import Upscaler, window_reader
from foveate.meter.quality import psnr, ssim
from foveate.restore import upscale as enlarging
from foveate.restore.rescaling import (
    DEFAULT_SCALE,
    Progress,
    Report,
    Result,
    described,
    methods,
    others,
    placed,
    rescaler,
    stream_rescaled,
    timed,
    wanted,
    whole_scale,
)

DEFAULT = "lanczos"

AMPLIFIED = 8
"""By how much differences are amplified in a picture of them."""


@dataclass(frozen=True)
class Cycle:
    """A picture after some rounds of shrinking and enlarging.

    Attributes:
        method: what shrank and enlarged it.
        number: rounds, from 1.
        psnr, ssim: against the original, of all three channels.
        change: PSNR against the round before; infinite when nothing changed any more.
    """

    method: str
    number: int
    psnr: float
    ssim: float
    change: float


@lru_cache(maxsize=4)
def reducer(method: str, scale: float | None = None, device: str = "cpu") -> Rescaler:
    """The filter or network of a method, with the weights that come with foveate, kept for the next picture.

    Args:
        scale: for networks of one scale; None where a size is given instead.

    Raises: UnknownSystemError for an unknown method; InputError for one that does not shrink pictures, or a scale it
        was not trained for; WeightsError for one that no weights come with.
    """
    free = rescaler(method, "reduce", device)
    if free is not None:
        return free
    slug = catalog.card(method).slug
    there = methods("reduce")
    if not there.get(slug):
        raise InputError(f"{slug!r} is no method of downscale; use one of {', '.join([*there, *FILTERS])}.")
    if scale is None:
        raise InputError(f"{slug} takes a scale, not a size; for any size use one of {others('reduce')}.")
    if whole_scale(scale, others("reduce")) not in there[slug]:
        known = ", ".join(map(str, there[slug]))
        raise InputError(f"{slug} shrinks by {known}, got scale {scale!r}; for any other use {others('reduce')}.")
    return placed(as_rescaler(weights.load(slug, int(scale))), device)


def downscale(
    source: pictures.Source,
    out: str | Path | None = None,
    *,
    scale: float | None = None,
    size: Size | None = None,
    method: str | Rescaler = DEFAULT,
    tile: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Result:
    """Shrink a picture.

    Args:
        source: a path, Pillow image, NumPy array (uint8, uint16, float; [H, W] or [H, W, C]) or tensor ([C, H, W] or
            [1, C, H, W]); grey or colour, with or without alpha.
        out: file to write; its extension names the format. PNG and TIFF are written row by row.
        scale: how many times shorter the sides become, default 4; any number from 1 on, but for networks of one scale.
        size: (width, height) of the result instead.
        method: "lanczos", "area", "bicubic", a system that shrinks, or a network of your own with `reduce(x, size)`.
        tile: side of the windows, in input pixels; a smaller one needs less memory and gives the same result.
        device: where to compute, e.g. "cuda".
        progress: called with the rows done and all rows.

    Returns: (image, report): image is of the source's kind, a Pillow image for a path, or the path written.

    Raises: PictureError for a picture that cannot be read or written; WeightsError for a method without weights;
        InputError for anything else that does not fit. Nothing is left half-written.

    >>> import numpy as np
    >>> image, report = downscale(np.zeros((10, 14, 3), np.uint8), scale=2.5)
    >>> image.shape, report.method, report.scale
    ((4, 6, 3), 'lanczos', '2.333x2.5')
    """
    model = check(scale=scale, size=size, method=method, tile=tile, device=device)
    picture = pictures.load(source)
    sides = (picture.height, picture.width)
    target = small_size(model, sides, scale, size)
    flops = model.flops(sides, target)
    images: list[Any] = []

    def work() -> None:
        with pictures.writer(out, picture, *target) as rows, torch.inference_mode():
            stream_rescaled(model, picture, rows, target, True, tile, device, progress)
            images.append(rows.close())

    seconds, peak = timed(work)
    report = Report(
        method=model.slug,
        scale=described(sides, target, shrink=True),
        budget="1",
        width=target[1],
        height=target[0],
        share=1.0,
        flops=flops,
        full_flops=flops,
        seconds=seconds,
        peak_bytes=peak,
        decisions={},
        shrunk=True,
    )
    return Result(images[0], report)


def downscale_file(source: Path, target: Path, **settings: Any) -> dict[str, Any]:
    """One file of a batch: write the target and return the report."""
    return downscale(source, target, **settings).report.to_dict()


def check(
    *,
    scale: float | None,
    size: Size | None,
    method: str | Rescaler = DEFAULT,
    tile: int | None = None,
    device: str = "cpu",
) -> Rescaler:
    """The network, once all that can be known without a picture fits together. Raises: InputError, WeightsError."""
    enlarging.check_tile(tile)
    wanted((1, 1), scale, size, shrink=True)
    if not isinstance(method, str):
        return as_rescaler(method)
    return reducer(method, scale if scale is not None or size is not None else DEFAULT_SCALE, device)


def small_size(model: Rescaler, source: Size, scale: float | None, size: Size | None) -> Size:
    """(rows, columns) of what a picture is shrunk to. Raises: InputError when it would grow."""
    if model.scale is not None and size is None:
        if scale not in (None, model.scale):
            raise InputError(f"{model.slug} shrinks by {model.scale}, got scale {scale!r}.")
        return -(-source[0] // model.scale), -(-source[1] // model.scale)
    target = wanted(source, scale, size, shrink=True)
    check_direction(source, target, shrink=True)
    return target


def rescale_cycle(
    source: pictures.Source,
    *,
    scale: float | None = None,
    size: Size | None = None,
    method: str | Rescaler | tuple[Rescaler, Rescaler | Upscaler] = "lanczos+bicubic",
    times: int = 1,
    out: Path | None = None,
    tile: int | None = None,
    device: str = "cpu",
) -> Iterator[Cycle]:
    """Shrink a picture and enlarge it to its size again, some times over.

    Args:
        source: a picture of any kind; transparency is left out.
        scale, size: of the small picture, as in `downscale`.
        method: two methods joined by "+", one that does both, or networks of your own.
        times: rounds.
        out: a folder that takes the small and the enlarged picture of every round, and their last difference from the
            original, amplified 8 times.
        tile, device: as in `downscale`.

    Raises: InputError for methods that do not fit the picture, and whatever `downscale` and `upscale` raise.

    >>> import numpy as np
    >>> [cycle.psnr for cycle in rescale_cycle(np.full((22, 22), 100, np.uint8), scale=2)]
    [inf]
    """
    if not isinstance(times, int) or times < 1:
        raise InputError(f"a picture goes round at least once, got times={times!r}.")
    down, up = pair_of(method, scale, size, device)
    picture = pictures.load(source)
    original = picture.rgb().to(device)
    sides = (picture.height, picture.width)
    target = small_size(down, sides, scale, size)
    name = method if isinstance(method, str) else down.slug if down is up else f"{down.slug}+{up.slug}"
    stem = f"{picture.path.stem if picture.path else 'picture'}-{name}"
    before = original = quantise(original)
    for number in range(1, times + 1):
        with torch.inference_mode():
            small = quantise(_whole(down, before, target, True, tile))
            after = quantise(_whole(up, small, sides, False, tile))
        cycle = Cycle(
            name, number, *(float(q) for q in (psnr(after, original), ssim(after, original), psnr(after, before)))
        )
        if out is not None:
            pictures.save(out / f"{stem}-{number}-small.png", _levels(small))
            pictures.save(out / f"{stem}-{number}.png", _levels(after))
            if number == times:
                difference = (AMPLIFIED * (after - original).abs()).clamp(0, 1)
                pictures.save(out / f"{stem}-difference.png", _levels(difference))
        before = after
        yield cycle


def pair_of(
    method: str | Rescaler | tuple[Rescaler, Rescaler | Upscaler], scale: float | None, size: Size | None, device: str
) -> tuple[Rescaler, Rescaler | Upscaler]:
    """What shrinks and what enlarges."""
    if isinstance(method, tuple):
        first, second = method
        return as_rescaler(first), second if isinstance(second, Upscaler) else as_rescaler(second)
    if not isinstance(method, str):
        both = as_rescaler(method)
        return both, both
    names = method.split("+")
    if len(names) > 2:
        raise InputError(f"a cycle has one method that shrinks and one that enlarges, got {method!r}; write a+b.")
    down = check(scale=scale, size=size, method=names[0], device=device)
    return down, enlarging.check(scale=scale, size=size, method=names[-1], device=device)[0]


def _levels(x: Tensor) -> Tensor:
    """The 8 bits of a picture."""
    return (255 * x.float()).round().byte().cpu()


def _whole(model: Rescaler | Upscaler, x: Tensor, size: Size, shrink: bool, tile: int | None) -> Tensor:
    """A picture in memory at another size."""
    x = x.to(model.dtype)
    if isinstance(model, Upscaler):
        image = model.upscale(x, tile=tile).image
        if tuple(image.shape[2:]) != size:
            raise InputError(
                f"{model.slug} makes {image.shape[3]}x{image.shape[2]} of the small picture, not {size[1]}x{size[0]}; "
                f"take a picture whose sides are multiples of {model.scale}, and that scale."
            )
        return image
    source = (x.shape[2], x.shape[3])
    return torch.cat(list(model.strips(window_reader(x), source, size, shrink, tile)), 2)
