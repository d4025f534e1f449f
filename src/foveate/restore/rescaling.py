"""What the verbs `upscale` and `downscale` share: which methods there are, reports, sizes, streaming to any size."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from math import isfinite
from numbers import Real
from typing import Any, NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor

from foveate import catalog, weights
from foveate.data import pictures
from foveate.data.pictures import Picture
from foveate.errors import InputError
from foveate.layers.resample import Size
from foveate.layers.rescaler import FILTERS, Filter, Rescaler
from foveate.layers.upscaler import Read, Upscaler
from foveate.meter.cost import peak_memory, time_call

DEFAULT, DEFAULT_SCALE = "pcsr", 4

Progress = Callable[[int, int], None]
"""progress(rows done, rows in all)."""

M = TypeVar("M", bound=torch.nn.Module)


@dataclass(frozen=True)
class Report:
    """What an enlargement, or a reduction, cost.

    Attributes:
        method, budget: as asked.
        scale: how many times longer, or shorter, the sides became; as text where they differ, "2.5x1.5".
        width, height: of the result.
        share: FLOPs spent as a share of the full network's.
        flops, full_flops: 2 per multiply-accumulate.
        seconds: wall time from decoded input to the written result.
        peak_bytes: memory needed on top of what was held before; None where the system does not tell.
        decisions: what was chosen and how often, as shares: {"heavy": 0.2} of pixels, {"exit 1": 0.4, ...} of patches.
        map: picture of where the compute went, where one was asked for.
        shrunk: whether it is a reduction.
    """

    method: str
    scale: float | str
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
    shrunk: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it: everything but the map."""
        values = asdict(replace(self, map=None))
        del values["map"]
        return values

    def __str__(self) -> str:
        spent = f"{self.flops / 1e9:.3g} GFLOPs"
        if self.decisions:
            spent = f"{self.flops / 1e9:.1f} of {self.full_flops / 1e9:.1f} GFLOPs ({self.share:.0%})"
        chosen = "".join(f", {name} {part:.0%}" for name, part in self.decisions.items())
        how = f"{'/' if self.shrunk else 'x'}{self.scale if isinstance(self.scale, str) else f'{self.scale:g}'}"
        return f"{self.width}x{self.height} by {self.method} {how}: {spent}, {self.seconds:.2f} s{chosen}"


class Result(NamedTuple):
    """An enlarged picture (or the path it was written to), and what it cost."""

    image: Any
    report: Report


def methods(turn: str = "enlarge") -> dict[str, list[int]]:
    """Methods that can be used at once, each with its scales; none are named where it takes any.

    Args:
        turn: "enlarge", or "reduce" for those of `downscale`.
    """
    there = {slug: scales for slug, scales in weights.available().items() if _turns(slug, turn)}
    if DEFAULT in there:
        there = {DEFAULT: there[DEFAULT], **there}
    return there | {slug: [] for slug in any_scale(turn) if catalog.card(slug).target().has_weights()}


def any_scale(turn: str = "enlarge") -> list[str]:
    """Systems that take any scale, with or without weights."""
    cards = catalog.search(wing="restore", works=True)
    return [c.slug for c in cards if _turns(c.slug, turn) and issubclass(c.target(), Rescaler)]


def _turns(slug: str, turn: str) -> bool:
    card = catalog.load().get(slug)
    target = card.target() if card and card.works else None
    own = getattr(target, turn, getattr(target, "upscale", None) if turn == "enlarge" else None)
    return own is not None and own is not getattr(Rescaler, turn)


@lru_cache(maxsize=4)
def rescaler(method: str, turn: str = "enlarge", device: str = "cpu") -> Rescaler | None:
    """A filter, or the network of a method that takes any scale, kept for the next picture; None for other methods.

    Raises: UnknownSystemError for an unknown method; WeightsError for one that no weights come with.
    """
    if method in FILTERS:
        return placed(Filter(method), device)
    slug = catalog.card(method).slug
    return placed(catalog.card(slug).target().pretrained(), device) if slug in any_scale(turn) else None


def others(turn: str) -> str:
    """What to use for any scale."""
    return ", ".join([slug for slug in any_scale(turn) if slug in methods(turn)] + list(FILTERS))


def placed(model: M, device: str) -> M:
    """The network on a device. Raises: InputError for one that this machine lacks."""
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {device!r} cannot be used on this machine ({reason}); use 'cpu'.") from error


def whole_scale(scale: Any, others: str = "") -> int:
    """The scale as an integer. Raises: InputError when it is none, or below 1, naming others that take any."""
    if isinstance(scale, bool) or not isinstance(scale, Real) or scale < 1 or not float(scale).is_integer():
        advice = f"; for any other scale use method {others}" if others else ""
        raise InputError(f"scale must be a whole number such as 2, 3 or 4, got {scale!r}{advice}.")
    return int(float(scale))


def wanted(source: Size, scale: float | None, size: Size | None, shrink: bool = False) -> Size:
    """(rows, columns) of the result, of a scale or of a size (width, height). Raises: InputError for what is neither.

    >>> wanted((1000, 1500), 2.7, None), wanted((1000, 1500), None, (1920, 1080))
    ((2700, 4050), (1080, 1920))
    """
    if scale is not None and size is not None:
        raise InputError(f"give a scale or a size, not both; got scale {scale!r} and size {size!r}.")
    if size is not None:
        if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
            raise InputError(f"a size is (width, height) in whole pixels, both 1 or more, got {size!r}.")
        return size[1], size[0]
    scale = DEFAULT_SCALE if scale is None else scale
    if isinstance(scale, bool) or not isinstance(scale, Real) or not isfinite(scale) or scale < 1:
        raise InputError(f"scale must be a number from 1 on, such as 2 or 2.7, got {scale!r}.")
    height, width = (max(1, round(n / scale if shrink else n * scale)) for n in source)
    return height, width


def described(source: Size, size: Size, shrink: bool = False) -> float | str:
    """Scale of both sides, or of columns and rows, to three digits behind the point."""
    pairs = list(zip(source, size, strict=True))
    rows, columns = (round(a / b if shrink else b / a, 3) for a, b in pairs)
    return columns if rows == columns else f"{columns:g}x{rows:g}"


def timed(work: Callable[[], None]) -> tuple[float, int | None]:
    """Run; wall time in seconds, and the memory that it needed."""
    seconds: list[float] = []
    peak = peak_memory(lambda: seconds.append(time_call(work)))
    return seconds[0], peak


def stream_rescaled(
    model: Rescaler,
    picture: Picture,
    target: pictures.Writer,
    size: Size,
    shrink: bool,
    tile: int | None,
    device: str,
    progress: Progress | None,
) -> None:
    """Rescale a picture row by row into a writer; transparency by the bicubic filter."""
    source, y = (picture.height, picture.width), 0
    for strip in model.strips(reader(picture, model, device), source, size, shrink, tile):
        color = strip if picture.channels == 3 else strip.mean(1, keepdim=True)
        end = y + color.shape[2]
        target.rows(y, color, _clear(picture, size, (y, end), shrink) if picture.alpha else None)
        y = end
        if progress:
            progress(y, size[0])


def _clear(picture: Picture, size: Size, rows: tuple[int, int], shrink: bool) -> Tensor:
    """Rows of the rescaled alpha channel."""

    def read(x0: int, y0: int, x1: int, y1: int) -> Tensor:
        alpha = picture.window(y0, y1, x0, x1)[1]
        assert alpha is not None
        return alpha

    filter, most = Filter("bicubic"), 1024
    boxes = [(x, rows[0], min(x + most, size[1]), rows[1]) for x in range(0, size[1], most)]
    return torch.cat([filter.part(read, (picture.height, picture.width), size, b, shrink) for b in boxes], 3)


def reader(picture: Picture, model: Upscaler | Rescaler, device: str) -> Read:
    """Windows of the colours of a picture, three channels."""

    def read(x0: int, y0: int, x1: int, y1: int) -> Tensor:
        color, _ = picture.window(y0, y1, x0, x1)
        return color.to(device, model.dtype).expand(-1, 3, -1, -1)

    return read
