"""The verb `upscale`: any picture, enlarged under a budget, streamed so that memory stays bounded.

A picture is read window by window, enlarged strip by strip and written row by row: by networks of a whole scale under a
budget (`layers.upscaler.Upscaler.strips`), by networks of any scale and by filters (`layers.rescaler.Rescaler.strips`).
Grey pictures go through the network as three equal channels; transparency is enlarged by bicubic interpolation.
"""

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from foveate import catalog, weights
from foveate.data import pictures
from foveate.data.files import Partial, check_target
from foveate.data.pictures import Picture
from foveate.engine.budget import Budget
from foveate.errors import BudgetError, InputError
from foveate.layers.resample import Size
from foveate.layers.rescaler import FILTERS, Rescaler, as_rescaler, check_direction
from foveate.layers.upscaler import Rendered, Upscaler, enlarge, sum_counts
from foveate.meter.cost import time_call
from foveate.meter.heatmap import heatmap
from foveate.restore.rescaling import (
    DEFAULT,
    DEFAULT_SCALE,
    Progress,
    described,
    others,
    placed,
    reader,
    rescaler,
    stream_rescaled,
    timed,
    wanted,
    whole_scale,
)
from foveate.restore.rescaling import Report as Report
from foveate.restore.rescaling import Result as Result
from foveate.restore.rescaling import methods as methods

MAP_SIDE = 2048
"""Longer side of the effort map, at most; maps of larger pictures leave pixels out."""


@lru_cache(maxsize=4)
def network(method: str, scale: int, device: str = "cpu") -> Upscaler:
    """The network of a method with the weights that come with foveate, kept for the next picture.

    Raises: UnknownSystemError for an unknown method; InputError for one that does not upscale, or a scale it was not
        trained for.
    """
    slug = catalog.card(method).slug
    there, free = methods(), others("enlarge")
    if not there.get(slug):
        raise InputError(f"{slug!r} is no method of upscale; use one of {', '.join([*there, *FILTERS])}.")
    if whole_scale(scale, free) not in there[slug]:
        raise InputError(
            f"{slug} enlarges by {', '.join(map(str, there[slug]))}, got scale {scale!r}; use one of these, or for any "
            f"scale one of {free}."
        )
    model: Upscaler = weights.load(slug, scale).to(memory_format=torch.channels_last)
    return placed(model, device)


def upscale(
    source: pictures.Source,
    out: str | Path | None = None,
    *,
    scale: float | None = None,
    size: Size | None = None,
    method: str | Upscaler | Rescaler = DEFAULT,
    budget: Budget | float | str = 1.0,
    map: bool | str | Path = False,
    tile: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Result:
    """Enlarge a picture.

    Args:
        source: a path, Pillow image, NumPy array (uint8, uint16, float; [H, W] or [H, W, C]) or tensor ([C, H, W] or
            [1, C, H, W]); grey or colour, with or without alpha.
        out: file to write; its extension names the format. PNG and TIFF are written row by row.
        scale: 2, 3 or 4 (the default); with methods that take any scale, any number from 1 on.
        size: (width, height) of the result instead, with methods that take any scale.
        method: a name that `methods()` lists, "bicubic", "lanczos" or "area", or a network of your own.
        budget: a share of the full network's cost (0.5, "50%"), or an absolute "20 GFLOPs" or "300 ms".
        map: also make a picture of where the compute went; a path writes it.
        tile: side of the windows, in input pixels; a smaller one needs less memory and gives the same result.
        device: where to compute, e.g. "cuda".
        progress: called with the rows done and all rows.

    Returns: (image, report): image is of the source's kind, a Pillow image for a path, or the path written.

    Raises: PictureError for a picture that cannot be read or written; BudgetError for a budget the method cannot meet,
        naming its floor; InputError for anything else that does not fit. Nothing is left half-written.

    >>> import numpy as np
    >>> image, report = upscale(np.zeros((5, 7, 3), np.uint8), scale=2, method="espcn")
    >>> image.shape
    (10, 14, 3)
    >>> upscale(np.zeros((5, 7, 3), np.uint8), size=(20, 12), method="bicubic").image.shape
    (12, 20, 3)
    """
    model, asked = check(scale=scale, size=size, method=method, budget=budget, tile=tile, device=device)
    picture = pictures.load(source)
    if map and not isinstance(map, bool):
        _check_map(Path(map), picture, out)
    source_size = (picture.height, picture.width)
    if isinstance(model, Rescaler):
        target = wanted(source_size, scale, size)
        check_direction(source_size, target, shrink=False)
        full = model.flops(source_size, target)
    else:
        target = (model.scale * picture.height, model.scale * picture.width)
        full = model.full_flops(*source_size)
    share = asked.share_of(gflops=full / 1e9, **_milliseconds(asked, model, full, source_size, target))
    check_share(model, share)
    done: dict[str, Any] = {}

    def work() -> None:
        with pictures.writer(out, picture, *target) as rows, torch.inference_mode():
            if isinstance(model, Rescaler):
                stream_rescaled(model, picture, rows, target, False, tile, device, progress)
                done["effort"] = torch.ones(1, 1, *(-(-n // _skip(picture)) for n in source_size)) if map else None
                done["spent"] = Rendered(torch.empty(0), torch.empty(0), full)
            else:
                done["spent"], done["effort"] = _stream(model, picture, rows, share, tile, device, bool(map), progress)
            done["image"] = rows.close()

    seconds, peak = timed(work)
    spent: Rendered = done["spent"]
    report = Report(
        method=model.slug,
        scale=model.scale if isinstance(model, Upscaler) else described(source_size, target),
        budget=str(asked),
        width=target[1],
        height=target[0],
        share=spent.flops / full if full else 1.0,
        flops=spent.flops,
        full_flops=full,
        seconds=seconds,
        peak_bytes=peak,
        decisions=model.shares_of(spent.counts) if isinstance(model, Upscaler) else {},
        map=_draw(done["effort"], picture, map) if map else None,
    )
    return Result(done["image"], report)


def check(
    *,
    scale: float | None,
    size: Size | None,
    method: str | Upscaler | Rescaler = DEFAULT,
    budget: Budget | float | str = 1.0,
    tile: int | None = None,
    device: str = "cpu",
) -> tuple[Upscaler | Rescaler, Budget]:
    """The network and the budget, once all that can be known without a picture fits together."""
    check_tile(tile)
    asked = Budget.parse(budget)
    model: Upscaler | Rescaler
    if not isinstance(method, str):
        model = method if isinstance(method, Upscaler) else as_rescaler(method)
    elif (free := rescaler(method, "enlarge", device)) is not None:
        model = free
    elif size is not None:
        raise InputError(f"{method} takes a scale, not a size; for any size use one of {others('enlarge')}.")
    else:
        model = network(method, DEFAULT_SCALE if scale is None else whole_scale(scale, others("enlarge")), device)
    if isinstance(model, Rescaler):
        wanted((1, 1), scale, size)
    elif size is not None:
        raise InputError(f"{model.slug} takes a scale, not a size; got size {size!r}.")
    if asked.unit == "share":
        check_share(model, asked.amount)
    return model, asked


def check_tile(tile: int | None) -> None:
    """Refuse a window without pixels. Raises: InputError."""
    if tile is not None and tile < 1:
        raise InputError(f"a tile has at least one pixel, got {tile}; leave it out for the default.")


def check_share(model: Upscaler | Rescaler, share: float) -> None:
    """Refuse a share of the cost that a method cannot meet. Raises: BudgetError."""
    if isinstance(model, Upscaler):
        model.check_share(share)
    elif not 1 - 1e-9 <= share <= 1:
        raise BudgetError(f"{model.slug} takes shares from 1.00 to 1 of its full cost, got {share:g}.")


def upscale_file(
    source: Path, target: Path, *, maps: tuple[Path, Path] | None = None, **settings: Any
) -> dict[str, Any]:
    """One file of a batch: write the target and return the report.

    Args:
        maps: (output folder, folder of maps): the map goes to the target's relative path, as PNG.
    """
    place: Path | bool = False
    if maps is not None:
        place = (maps[1] / target.relative_to(maps[0])).with_suffix(".png")
        place.parent.mkdir(parents=True, exist_ok=True)
    return upscale(source, target, map=place, **settings).report.to_dict()


def _milliseconds(
    asked: Budget, model: Upscaler | Rescaler, full: float, source: Size, target: Size
) -> dict[str, float]:
    """What the full network would take on this machine, timed on a small picture, when the budget is a time."""
    if asked.unit != "ms":
        return {}
    x = torch.rand(1, 3, 96, 96, device=model.device)
    if isinstance(model, Upscaler):
        flops = model.full_flops(96, 96)
        seconds = [time_call(partial(model.upscale, x)) for _ in range(3)]
    else:
        little = (-(-96 * target[0] // source[0]), -(-96 * target[1] // source[1]))
        flops = model.flops((96, 96), little)
        with torch.inference_mode():
            seconds = [time_call(partial(model.enlarge, x, little)) for _ in range(3)]
    return {"ms": 1e3 * min(seconds) * full / flops}


def _stream(
    model: Upscaler,
    picture: Picture,
    target: pictures.Writer,
    share: float,
    tile: int | None,
    device: str,
    keep_effort: bool,
    progress: Progress | None,
) -> tuple[Rendered, Tensor | None]:
    height, width, s = picture.height, picture.width, model.scale
    read = reader(picture, model, device)
    y, flops, counts, efforts = 0, 0.0, dict[str, int](), list[Tensor]()
    skip = _skip(picture)
    for strip in model.strips(read, height, width, share, tile):
        color = strip.image if picture.channels == 3 else strip.image.mean(1, keepdim=True)
        rows = color.shape[2] // s
        target.rows(s * y, color, _alpha(picture, y, y + rows, s) if picture.alpha else None)
        flops += strip.flops
        counts = sum_counts([counts, strip.counts])
        if keep_effort:
            efforts.append(strip.effort[..., -y % skip :: skip, ::skip].cpu())
        y += rows
        if progress:
            progress(y, height)
    return Rendered(torch.empty(0), torch.empty(0), flops, counts), torch.cat(efforts, 2) if efforts else None


def _alpha(picture: Picture, y0: int, y1: int, scale: int) -> Tensor:
    above, below = max(0, y0 - 3), min(picture.height, y1 + 3)
    alpha = picture.window(above, below, 0, picture.width)[1]
    assert alpha is not None
    return enlarge(alpha, scale, "bicubic")[..., scale * (y0 - above) : scale * (y1 - above), :]


def _skip(picture: Picture) -> int:
    """Every how many pixels a map shows."""
    return -(-max(picture.height, picture.width) // MAP_SIDE)


def _check_map(place: Path, picture: Picture, out: str | Path | None) -> None:
    if place.suffix.lower() != ".png":
        raise InputError(f"a map is written as PNG, got {str(place)!r}; give it a name that ends in .png.")
    check_target(place, picture.path)
    if out is not None and place.resolve() == Path(out).resolve():
        raise InputError(f"map and result are both to be {str(place)!r}; give the map another name.")


def _draw(effort: Tensor, picture: Picture, place: bool | str | Path) -> Image.Image:
    skip = _skip(picture)
    small = Picture(picture.pixels[::skip, ::skip], "array", lambda pixels: pixels)
    under = small.rgb()
    drawn = heatmap(effort, under)
    if not isinstance(place, bool):
        part = Partial(check_target(place))
        try:
            drawn.save(part.file, format="PNG")
            part.commit()
        except BaseException:
            part.discard()
            raise
    return drawn
