"""The verb `upscale`: any picture, enlarged under a budget, streamed so that memory stays bounded.

A picture is read window by window, enlarged strip by strip (`layers.upscaler.Upscaler.strips`) and written row by row.
Grey pictures go through the network as three equal channels; transparency is enlarged by bicubic interpolation.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from foveate import catalog, weights
from foveate.data import pictures
from foveate.data.files import Partial, check_target
from foveate.data.pictures import Picture
from foveate.engine.budget import Budget
from foveate.errors import InputError
from foveate.layers.upscaler import Rendered, Upscaler, enlarge, sum_counts
from foveate.meter.cost import peak_memory, time_call
from foveate.meter.heatmap import heatmap

DEFAULT = "pcsr"
MAP_SIDE = 2048
"""Longer side of the effort map, at most; maps of larger pictures leave pixels out."""

Progress = Callable[[int, int], None]
"""progress(rows done, rows in all)."""


@dataclass(frozen=True)
class Report:
    """What an enlargement cost.

    Attributes:
        method, scale, budget: as asked.
        width, height: of the result.
        share: FLOPs spent as a share of the full network's.
        flops, full_flops: 2 per multiply-accumulate.
        seconds: wall time from decoded input to the written result.
        peak_bytes: memory needed on top of what was held before; None where the system does not tell.
        decisions: what was chosen and how often, as shares: {"heavy": 0.2} of pixels, {"exit 1": 0.4, ...} of patches.
        map: picture of where the compute went, where one was asked for.
    """

    method: str
    scale: int
    budget: str
    width: int
    height: int
    share: float
    flops: float
    full_flops: float
    seconds: float
    peak_bytes: int | None
    decisions: dict[str, float]
    map: Image.Image | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it: everything but the map."""
        values = asdict(replace(self, map=None))
        del values["map"]
        return values

    def __str__(self) -> str:
        spent = f"{self.flops / 1e9:.1f} of {self.full_flops / 1e9:.1f} GFLOPs ({self.share:.0%})"
        chosen = "".join(f", {name} {part:.0%}" for name, part in self.decisions.items())
        return f"{self.width}x{self.height} by {self.method} x{self.scale}: {spent}, {self.seconds:.2f} s{chosen}"


class Result(NamedTuple):
    """An enlarged picture (or the path it was written to), and what it cost."""

    image: Any
    report: Report


def methods() -> dict[str, list[int]]:
    """Methods that can be used at once, each with its scales."""
    there = weights.available()
    return {DEFAULT: there.get(DEFAULT, []), **{slug: scales for slug, scales in there.items() if slug != DEFAULT}}


@lru_cache(maxsize=4)
def network(method: str, scale: int, device: str = "cpu") -> Upscaler:
    """The network of a method with the weights that come with foveate, kept for the next picture.

    Raises: UnknownSystemError for an unknown method; InputError for one that does not upscale, or a scale it was not
        trained for.
    """
    slug = catalog.card(method).slug
    there = methods()
    if slug not in there:
        raise InputError(f"{slug!r} is no method of upscale; use one of {', '.join(there)}.")
    if scale not in there[slug]:
        raise InputError(
            f"{slug} enlarges by {', '.join(map(str, there[slug]))}, got scale {scale!r}; use one of these."
        )
    model = weights.load(slug, scale).to(memory_format=torch.channels_last)
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {device!r} cannot be used on this machine ({reason}); use 'cpu'.") from error


def upscale(
    source: pictures.Source,
    out: str | Path | None = None,
    *,
    scale: int = 4,
    method: str | Upscaler = DEFAULT,
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
        scale: 2, 3 or 4.
        method: "pcsr", "adaptive-patch-exiting", "scnet", "espcn", or a network of your own.
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
    """
    if tile is not None and tile < 1:
        raise InputError(f"a tile has at least one pixel, got {tile}; leave it out for the default.")
    model = method if isinstance(method, Upscaler) else network(method, whole_scale(scale), device)
    asked = Budget.parse(budget)
    picture = pictures.load(source)
    if map and not isinstance(map, bool):
        _check_map(Path(map), picture, out)
    height, width = picture.height, picture.width
    full = model.full_flops(height, width)
    share = asked.share_of(gflops=full / 1e9, **_milliseconds(asked, model, full))
    model.check_share(share)
    done: dict[str, Any] = {}

    def run() -> None:
        with pictures.writer(out, picture, model.scale * height, model.scale * width) as target, torch.inference_mode():
            done["spent"], done["effort"] = _stream(model, picture, target, share, tile, device, bool(map), progress)
            done["image"] = target.close()

    def timed() -> None:
        done["seconds"] = time_call(run)

    peak = peak_memory(timed)
    drawn = _draw(done["effort"], picture, map) if map else None
    spent: Rendered = done["spent"]
    report = Report(
        method=model.slug,
        scale=model.scale,
        budget=str(asked),
        width=model.scale * width,
        height=model.scale * height,
        share=spent.flops / full,
        flops=spent.flops,
        full_flops=full,
        seconds=done["seconds"],
        peak_bytes=peak,
        decisions=model.shares_of(spent.counts),
        map=drawn,
    )
    return Result(done["image"], report)


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


def whole_scale(scale: Any) -> int:
    """The scale as an integer. Raises: InputError when it is none, or below 1."""
    if isinstance(scale, bool) or not isinstance(scale, Real) or scale < 1 or not float(scale).is_integer():
        raise InputError(f"scale must be a whole number such as 2, 3 or 4, got {scale!r}.")
    return int(float(scale))


def _milliseconds(asked: Budget, model: Upscaler, full: float) -> dict[str, float]:
    """What the full network would take on this machine, timed on a small picture, when the budget is a time."""
    if asked.unit != "ms":
        return {}
    x = torch.rand(1, 3, 96, 96, device=model.device)
    seconds = min(time_call(lambda: model.upscale(x)) for _ in range(3))
    return {"ms": 1e3 * seconds * full / model.full_flops(96, 96)}


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

    def read(x0: int, y0: int, x1: int, y1: int) -> Tensor:
        color, _ = picture.window(y0, y1, x0, x1)
        return color.to(device, model.dtype).expand(-1, 3, -1, -1)

    y, flops, counts, efforts = 0, 0.0, dict[str, int](), list[Tensor]()
    skip = -(-max(height, width) // MAP_SIDE)
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


def _check_map(place: Path, picture: Picture, out: str | Path | None) -> None:
    if place.suffix.lower() != ".png":
        raise InputError(f"a map is written as PNG, got {str(place)!r}; give it a name that ends in .png.")
    check_target(place, picture.path)
    if out is not None and place.resolve() == Path(out).resolve():
        raise InputError(f"map and result are both to be {str(place)!r}; give the map another name.")


def _draw(effort: Tensor, picture: Picture, place: bool | str | Path) -> Image.Image:
    skip = -(-max(picture.height, picture.width) // MAP_SIDE)
    small = Picture(picture.pixels[::skip, ::skip], "array", lambda pixels: pixels)
    under = small.window(0, small.height, 0, small.width)[0].expand(-1, 3, -1, -1)
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
