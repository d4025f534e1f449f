"""What every network offers that enlarges or shrinks pictures to any size: one face for the verbs.

A size is (rows, columns) in pixels, and the ratio of sizes is the scale, which may be fractional and differ between
rows and columns. A network gives `enlarge`, `reduce` or both. Large pictures pass window by window: `part` computes
some pixels of the result from a window of the source, `strips` all of them from top to bottom in bounded memory.

Resampling filters (`Filter`) have the same face; they are what networks are compared with.
"""

from collections.abc import Iterator
from itertools import pairwise
from math import ceil, floor
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from foveate.engine.tiles import Box
from foveate.errors import InputError, WeightsError
from foveate.layers.resample import KERNELS, Region, Span, grown, had, parts, resize, support, wholes
from foveate.layers.resample import Size as Size
from foveate.layers.upscaler import Read, check_picture

ALIGNED = 64
"""How many pixels a window may grow by, so that its edges lie on whole pixels of source and result."""


class Rescaler(nn.Module, PyTorchModelHubMixin):
    """Base of networks that rescale pictures.

    Attributes:
        slug: the system's name in the catalogue.
        recipe: the script that trains it, and what it is called with.
        scale: the one scale of a network that knows no other, else None.
        halo: source pixels around a window that its result depends on.
        largest: longest side, in source pixels, of what is computed at once, halo included; None for no limit.
    """

    slug: str
    recipe: str = "recipes/rescale.py"
    scale: int | None = None
    halo: int = 8
    largest: int | None = None

    def enlarge(self, x: Tensor, size: Size) -> Tensor:
        """Enlarge pictures.

        Shape: x [B, 3, h, w] in 0..1 -> [B, 3, *size], not clipped.
        Raises: InputError when the network only shrinks.
        """
        raise InputError(f"{self.slug} only shrinks pictures; enlarge with another method, such as bicubic.")

    def reduce(self, x: Tensor, size: Size) -> Tensor:
        """Shrink pictures.

        Shape: x [B, 3, H, W] in 0..1 -> [B, 3, *size], not clipped.
        Raises: InputError when the network only enlarges.
        """
        raise InputError(f"{self.slug} only enlarges pictures; shrink with another method, such as lanczos.")

    def flops(self, source: Size, size: Size) -> float:
        """FLOPs from one size to another, 2 per multiply-accumulate, without what windows compute twice.

        They are counted on a small picture of the same proportions and multiplied by the area.
        """
        from foveate.meter import count_flops

        cut = max(1.0, min(*source, *size) / 16)
        few, fewer = ((max(1, round(n / cut)) for n in sides) for sides in (source, size))
        little, result = tuple(few), tuple(fewer)
        if self.scale is not None:
            little = tuple(self.scale * n for n in result) if shrinks(source, size) else little
            result = result if shrinks(source, size) else tuple(self.scale * n for n in little)
        x = torch.zeros(1, 3, *little, device=self.device, dtype=self.dtype)
        with torch.no_grad():
            counted = count_flops(self._turn(shrinks(source, size)), x, result)
        return counted * (source[0] * source[1]) / (little[0] * little[1])

    def part(self, read: Read, source: Size, size: Size, box: Box, shrink: bool) -> Tensor:
        """Compute some pixels of the result from a window of the source.

        Unless a system knows better, a window is rescaled like a picture of its own. Its edges are chosen to lie on
        whole pixels of source and result, which at whole and simple scales they do exactly; at others the window is
        off by less than half a pixel of the result.

        Args:
            read: gives windows of the source.
            source, size: of the whole picture and of the whole result.
            box: the pixels wanted, xyxy in the result.
            shrink: whether to `reduce` or to `enlarge`.

        Shape: -> [1, 3, rows, columns] of the box.
        """
        x0, y0, x1, y1 = box
        (top, bottom), rows = self._aligned(source[0], size[0], (y0, y1))
        (left, right), columns = self._aligned(source[1], size[1], (x0, x1))
        own = (rows[1] - rows[0], columns[1] - columns[0])
        result = self._turn(shrink)(read(left, top, right, bottom), own)
        return result[..., y0 - rows[0] : y1 - rows[0], x0 - columns[0] : x1 - columns[0]]

    def strips(
        self, read: Read, source: Size, size: Size, shrink: bool | None = None, tile: int | None = None
    ) -> Iterator[Tensor]:
        """Rescale a picture of any size, as full-width strips from top to bottom.

        Args:
            read: gives windows of the source.
            source, size: before and after.
            shrink: whether to `reduce` or to `enlarge`; by default what the sizes say.
            tile: side of the windows in source pixels, halo not included; smaller ones need less memory.
        """
        shrink = shrinks(source, size) if shrink is None else shrink
        side = tile or (max(1, self.largest - 2 * self.halo) if self.largest else max(source))
        rows, columns = (_cuts(n, max(1, side * n // m)) for n, m in zip(size, source, strict=True))
        for y0, y1 in rows:
            parts = [self.part(read, source, size, (x0, y0, x1, y1), shrink) for x0, x1 in columns]
            yield parts[0] if len(parts) == 1 else torch.cat(parts, 3)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next((p.dtype for p in self.parameters()), torch.float32)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    @classmethod
    def pretrained(cls) -> Self:
        """The network with the weights that come with foveate. Raises: WeightsError when there are none."""
        from foveate import weights

        if not cls.has_weights():
            raise WeightsError(
                f"no weights of {cls.slug!r} come with this foveate; train some with `python {cls.recipe} "
                f"--data pictures/`, or pass a network of your own as the method."
            )
        model: Self = weights.fill(cls(**weights.card(cls.slug)["config"]), cls.slug)
        return model

    def keep(self, description: dict[str, Any], folder: Path | None = None) -> Path:
        """Write weights and card. `description` must hold "config"."""
        from foveate import weights

        return weights.save(self, self.slug, None, description, folder)

    @classmethod
    def has_weights(cls) -> bool:
        """Whether weights come with this foveate."""
        from foveate import weights

        return weights.place(cls.slug).exists()

    def _turn(self, shrink: bool) -> Any:
        return self.reduce if shrink else self.enlarge

    def _aligned(self, source: int, target: int, want: Span) -> tuple[Span, Span]:
        """Window of the source with its halo, and the pixels of the result it stands for."""
        scale = target / source if self.scale is None else 1 / self.scale if target <= source else float(self.scale)
        low, high = grown((floor(want[0] / scale), ceil(want[1] / scale - 1e-9)), self.halo, source)
        low = min(range(low, max(-1, low - ALIGNED), -1), key=lambda i: round(abs(i * scale - round(i * scale)), 9))
        ends = range(high, min(source, high + ALIGNED) + 1)
        high = min(ends, key=lambda i: 0 if i == source else round(abs(i * scale - round(i * scale)), 9))
        return (low, high), (round(low * scale), target if high == source else round(high * scale))


class Adapted(Rescaler):
    """A module that offers `enlarge` or `reduce` as a `Rescaler`; it is given whole pictures.

    Raises: InputError when it offers neither.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        if not any(callable(getattr(module, name, None)) for name in ("enlarge", "reduce")):
            raise InputError(
                f"a {type(module).__name__} is no method; pass a name, or a network with enlarge(x, size) or "
                "reduce(x, size)."
            )
        self.module = module
        self.slug = getattr(module, "slug", type(module).__name__)
        for name in ("enlarge", "reduce", "flops", "scale"):
            if hasattr(module, name):
                setattr(self, name, getattr(module, name))

    def strips(
        self, read: Read, source: Size, size: Size, shrink: bool | None = None, tile: int | None = None
    ) -> Iterator[Tensor]:
        return super().strips(read, source, size, shrink)


def as_rescaler(module: Any) -> Rescaler:
    """A network as it is where it is a `Rescaler`, else `Adapted`."""
    return module if isinstance(module, Rescaler) else Adapted(module)


class Filter(Rescaler):
    """A resampling filter of `foveate.layers.resample`, to any size.

    Args:
        kernel: "bicubic", "lanczos" or "area".

    Raises: InputError for another kernel.
    """

    largest = 1024

    def __init__(self, kernel: str = "bicubic") -> None:
        super().__init__()
        support(kernel, 1)
        self.slug = self.kernel = kernel

    def forward(self, x: Tensor, size: Size) -> Tensor:
        check_picture(x)
        check_size(size)
        return resize(x, wholes((x.shape[2], x.shape[3]), size), self.kernel)

    enlarge = reduce = forward

    def flops(self, source: Size, size: Size) -> float:
        """Rows first, then columns: a multiply-accumulate per tap that the kernel reaches and channel."""
        taps = [2 * support(self.kernel, a / b) for a, b in zip(source, size, strict=True)]
        return 2 * 3 * (size[0] * source[1] * taps[0] + size[0] * size[1] * taps[1])

    def part(self, read: Read, source: Size, size: Size, box: Box, shrink: bool) -> Tensor:
        axes = parts(source, size, region_of(box), self.kernel)
        return resize(read_region(read, had(axes)), axes, self.kernel)


FILTERS = KERNELS
"""Filters by name."""


def read_region(read: Read, region: Region) -> Tensor:
    """The pixels of some rows and columns."""
    return read(region[1][0], region[0][0], region[1][1], region[0][1])


def shrinks(source: Size, size: Size) -> bool:
    """Whether a side gets shorter."""
    return size[0] < source[0] or size[1] < source[1]


def check_size(size: Size) -> None:
    """Refuse what is no size. Raises: InputError."""
    if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise InputError(f"a size is (rows, columns) in whole pixels, both 1 or more, got {size!r}.")


def check_turn(x: Tensor, size: Size, shrink: bool) -> None:
    """Refuse what is no picture, and a size that goes the other way on either side. Raises: InputError."""
    check_picture(x)
    check_direction((x.shape[2], x.shape[3]), size, shrink)


def check_direction(source: Size, size: Size, shrink: bool) -> None:
    """Refuse a size that is larger on a side when shrinking, or smaller when enlarging. Raises: InputError."""
    check_size(size)
    if any(b > a if shrink else b < a for a, b in zip(source, size, strict=True)):
        word, other, way = ("shrunk", "larger", "enlarge") if shrink else ("enlarged", "smaller", "shrink")
        raise InputError(
            f"a picture of {source[1]}x{source[0]} is to be {word}, but {size[1]}x{size[0]} is {other} on a side; "
            f"{way} it instead, one side at a time if they differ."
        )


def whole_box(size: Size) -> Box:
    """The box of a whole picture."""
    return 0, 0, size[1], size[0]


def region_of(box: Box) -> Region:
    """Rows and columns of a box."""
    return (box[1], box[3]), (box[0], box[2])


def quantise(x: Tensor) -> Tensor:
    """Clip and round to 8 bits, as saving does; gradients pass the rounding and stop where the clip acts.

    >>> quantise(torch.tensor([-0.1, 0.5, 0.501]))
    tensor([0.0000, 0.5020, 0.5020])
    """
    x = x.clamp(0, 1)
    return (255 * x.detach()).round() / 255 + (x - x.detach())


def _cuts(length: int, most: int) -> list[Span]:
    n = -(-length // most)
    return list(pairwise([i * length // n for i in range(n + 1)]))
