"""The verb `stylize`: any picture in the manner of another, by one pass of a network trained for that style.

The networks are those of `foveate.learn.image_transform`, trained by recipes/stylize.py. A picture of up to `WHOLE`
pixels is one window. A larger one passes through in tiles: means and variances of the instance norms are measured
first, on 16 windows in full resolution spread evenly over the picture, and are the same in every tile, so there is no
seam and memory stays bounded. Grey pictures stay grey, transparency stays as it is.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.data import pictures
from foveate.data.loading import Picture
from foveate.engine.tiles import stream
from foveate.errors import InputError, WeightsError
from foveate.learn.image_transform import LEAST, TransformNet
from foveate.meter.cost import peak_memory, time_call
from foveate.meter.flops import count_flops
from foveate.weights import FOLDER

WHOLE = 1 << 20
"""Pixels of the largest picture that is one window."""

TILE = 640
SAMPLED = (4, 256)
"""Windows that statistics are measured on: how many along a side, and their side."""

Progress = Callable[[int, int], None]
"""progress(rows done, rows in all)."""


@dataclass(frozen=True)
class Report:
    """What it cost.

    Attributes:
        style, strength: as asked.
        width, height: of the picture.
        tiles: windows that it passed through in.
        flops: 2 per multiply-accumulate; what neighbouring tiles compute twice is left out.
        seconds: wall time from decoded input to the written result.
        peak_bytes: memory needed on top of what was held before; None where the system does not tell.
    """

    style: str
    strength: float
    width: int
    height: int
    tiles: int
    flops: float
    seconds: float
    peak_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)

    def __str__(self) -> str:
        parts = f" in {self.tiles} tiles" if self.tiles > 1 else ""
        spent = f"{self.flops / 1e9:.1f} GFLOPs, {self.seconds:.2f} s"
        return f"{self.width}x{self.height} in the style {self.style!r}{parts}: {spent}"


class Result(NamedTuple):
    """A stylised picture (or the path it was written to), and what it cost."""

    image: Any
    report: Report


def styles() -> list[str]:
    """Styles that come with foveate.

    >>> "strokes" in styles()
    True
    """
    return sorted(card.stem.removeprefix("stylize-") for card in FOLDER.glob("stylize-*.json"))


@lru_cache(maxsize=4)
def style_network(style: str, device: str = "cpu") -> TransformNet:
    """The network of a style, kept for the next picture.

    Args:
        style: a name that `styles()` lists, or a safetensors file: one that recipes/stylize.py wrote, with its card
            beside it, or weights of PyTorch's `fast_neural_style` example.

    Raises: InputError for an unknown name; WeightsError for a file that is not there or holds something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(style) if Path(style).suffix == ".safetensors" else FOLDER / f"stylize-{style}.safetensors"
    if path.parent == FOLDER and not path.exists():
        raise InputError(f"no style {style!r}; use one of {', '.join(styles())}, or a file of weights (.safetensors).")
    try:
        state = {k: v.float() for k, v in load_file(path).items()}
        card = path.with_suffix(".json")
        if card.exists():
            network = TransformNet(**json.loads(card.read_text())["config"])
            network.load_state_dict(state)
        else:
            network = TransformNet.load_official(state)
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{str(path)!r} holds no weights of a style ({error}); make some by recipes/stylize.py."
        ) from error
    try:
        return network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {device!r} cannot be used on this machine ({reason}); use 'cpu'.") from error


def stylize(
    source: pictures.Source,
    out: str | Path | None = None,
    *,
    style: str | TransformNet = "strokes",
    strength: float = 1.0,
    tile: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Result:
    """Paint a picture in a style.

    Args:
        source: a path, Pillow image, NumPy array (uint8, uint16, float; [H, W] or [H, W, C]) or tensor ([C, H, W] or
            [1, C, H, W]); grey or colour, with or without alpha.
        out: file to write; its extension names the format. PNG and TIFF are written row by row.
        style: a name that `styles()` lists, a file of weights, or a network of your own.
        strength: 1 for the style alone, 0 for the picture as it was, and between.
        tile: side of the windows in pixels; a smaller one needs less memory.
        device: where to compute, e.g. "cuda".
        progress: called with the rows done and all rows.

    Returns: (image, report): image is of the source's kind, a Pillow image for a path, or the path written.

    Raises: PictureError for a picture that cannot be read or written; WeightsError for unusable weights; InputError for
        anything else that does not fit. Nothing is left half-written.

    >>> import numpy as np
    >>> image, report = stylize(np.zeros((5, 7, 3), np.uint8))
    >>> image.shape
    (5, 7, 3)
    """
    check(strength, tile)
    network = style if isinstance(style, TransformNet) else style_network(style, device)
    if network.scale != 1:
        raise InputError(f"the network enlarges by {network.scale}; stylize takes one that keeps the size.")
    picture = pictures.load(source)
    painter = _Painter(network, picture, strength, tile, device)
    done: dict[str, Any] = {}

    def run() -> None:
        with pictures.writer(out, picture, picture.height, picture.width) as target, torch.inference_mode():
            painter.paint(target, progress)
            done["image"] = target.close()

    def timed() -> None:
        done["seconds"] = time_call(run)

    peak = peak_memory(timed)
    name = style if isinstance(style, str) else type(style).__name__
    report = Report(
        name, strength, picture.width, picture.height, painter.tiles, painter.flops(), done["seconds"], peak
    )
    return Result(done["image"], report)


def stylize_file(source: Path, target: Path, **settings: Any) -> dict[str, Any]:
    """One file of a batch: write the target and return the report."""
    return stylize(source, target, **settings).report.to_dict()


def check(strength: float, tile: int | None) -> None:
    """Say what is wrong with the settings before any picture is opened. Raises: InputError."""
    if not 0 <= strength <= 1:
        raise InputError(f"a strength is from 0 (the picture) to 1 (the style), got {strength!r}.")
    if tile is not None and tile < 1:
        raise InputError(f"a tile has at least one pixel, got {tile}; leave it out for the default.")


class _Painter:
    """One picture on its way through a network."""

    def __init__(self, network: TransformNet, picture: Picture, strength: float, tile: int | None, device: str) -> None:
        self.network, self.picture, self.strength, self.device = network, picture, strength, device
        self.height, self.width = picture.height, picture.width
        small = self.height * self.width <= WHOLE
        side = tile or (max(self.height, self.width) if small else TILE)
        self.tile = -(-side // network.multiple) * network.multiple
        self.tiles = -(-self.height // self.tile) * -(-self.width // self.tile)

    def paint(self, target: pictures.Writer, progress: Progress | None) -> None:
        """Write all rows of the result."""

        def write(y: int, band: Tensor) -> None:
            color, alpha = self.picture.window(y, y + band.shape[2], 0, self.width)
            band = band.cpu() if self.picture.channels == 3 else band.cpu().mean(1, keepdim=True)
            target.rows(y, torch.lerp(color, band.float(), self.strength), alpha)
            if progress:
                progress(y + band.shape[2], self.height)

        if self.tiles == 1:
            write(0, self.through(self.read(0, 0, self.width, self.height)))
            return
        with self.network.normed_as(_roomy(self.samples())):
            stream(self.read, self.through, write, self.height, self.width, self.tile, self.network.halo)

    def flops(self) -> float:
        """Floating-point operations of the picture."""
        side = 64
        x = torch.zeros(1, 3, side, side, dtype=next(self.network.parameters()).dtype, device=self.device)
        with torch.no_grad():
            return count_flops(self.network, x) / side**2 * self.height * self.width

    def read(self, x0: int, y0: int, x1: int, y1: int) -> Tensor:
        """A window in colour. Shape: [1, 3, y1 - y0, x1 - x0]."""
        color, _ = self.picture.window(y0, y1, x0, x1)
        return color.expand(-1, 3, -1, -1).to(self.device, next(self.network.parameters()).dtype)

    def through(self, x: Tensor) -> Tensor:
        """A window through the network."""
        return self.network(_roomy(x))[..., : x.shape[2], : x.shape[3]]

    def samples(self) -> Tensor:
        """Windows spread evenly over the picture, or the picture where it is small. Shape: [N, 3, h, w]."""
        if self.height * self.width <= WHOLE:
            return self.read(0, 0, self.width, self.height)
        count, side = SAMPLED
        h, w = min(side, self.height), min(side, self.width)
        ys, xs = (
            torch.linspace(0, whole - part, min(count, -(-whole // part))).round().int().tolist()
            for whole, part in ((self.height, h), (self.width, w))
        )
        return torch.cat([self.read(x, y, x + w, y + h) for y in ys for x in xs])


def _roomy(x: Tensor) -> Tensor:
    """A picture too small for the network's mirrors, continued by its last row and column."""
    height, width = x.shape[2:]
    room = 2 * LEAST
    return F.pad(x, (0, max(0, room - width), 0, max(0, room - height)), mode="replicate")
