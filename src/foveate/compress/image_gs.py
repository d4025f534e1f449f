"""Image-GS: Gaussians where the picture has detail, each pixel a weighted mean of the strongest few.

Zhang et al. 2025, "Image-GS: Content-Adaptive Image Representation via 2D Gaussians", arXiv:2407.01866.

    out(p) = sum_{n in T(p)} g_n(p) c_n / (eps + sum_{n in T(p)} g_n(p))        T(p): the 10 largest g_n(p)

with g_n = exp(-d^T Q_n d / 2), Q_n from two inverse standard deviations and an angle. Half of the Gaussians start where
the gradient is large (a share of 0.3 anywhere), the others come while fitting, where the error is large: both in
`foveate.compress.gaussian_fit`. A new Gaussian takes the picture's colour, not the residual as in the official code: it
joins a mean. Measured on our pictures that is worth 1 to 3 dB in short fits.

Gaussians are fitted with quantisation in the loop: places on a grid of about a fifth of a pixel, logarithms of standard
deviations and the angle in 6 bits, colours in 6 bits a channel, some 50 bits in all once entropy-coded.

Level of detail: the file holds the Gaussians in `LEVELS` sections of growing size, those that came first in the fit
first. A file cut off decodes to a coarser picture, in which the n of N Gaussians that are there are made wider by
sqrt(N / n), to close the gaps of those that are missing. Some of the last steps draw such a picture, so that it is
fitted too.
"""

from dataclasses import dataclass, replace
from math import ceil, log2, pi, sqrt
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from foveate.compress.codec import Progress, Size, Window
from foveate.compress.container import Container
from foveate.compress.entropy import Adaptive, Decoder, Encoder, Ints
from foveate.compress.fields import Reader, varint
from foveate.compress.gaussian_bits import get_places, put_places, sort_places
from foveate.compress.gaussian_coding import fit_coded, plan
from foveate.compress.gaussian_fit import AXES, UNIFORM, Fit, Splats, frame, squared, supersampled
from foveate.compress.quantisers import Affine, round_through
from foveate.engine.budget import Budget
from foveate.errors import InputError
from foveate.meter.quality import ssim

MODE = "topk"
LEVELS = 6
"""Sections of a file: each holds as many Gaussians as all before it."""

_CODES = ("places", "scales", "angles", "colours")
_GROUP = 5  # bits of a place that are coded adaptively
_COARSE = 8  # every how many steps a coarser picture is fitted


@dataclass(frozen=True, eq=False)
class Quantised:
    """Gaussians as a file holds them, in the order in which they are to be decoded.

    Attributes:
        places: [N, 2], of 2^bits on either axis.
        scales, angles: codes [N, 2] and [N, 1].
        colours: codes [N, C].
        scale, colour: quantisers of the logarithms of inverse standard deviations, and of colours.
        bits: of a place on either axis, and of an angle.
    """

    places: Ints
    scales: Ints
    angles: Ints
    colours: Ints
    scale: Affine
    colour: Affine
    bits: tuple[int, int]

    def __len__(self) -> int:
        return len(self.places)

    def select(self, index: npt.NDArray[np.intp]) -> "Quantised":
        """Those of an index."""
        return self.coded(*(getattr(self, name)[index] for name in _CODES))

    def coded(self, places: Ints, scales: Ints, angles: Ints, colours: Ints) -> "Quantised":
        """Other codes for the same quantisers."""
        return replace(self, places=places, scales=scales, angles=angles, colours=colours)

    def splats(self, height: int, width: int) -> Splats:
        """What is drawn."""
        centres = (torch.from_numpy(self.places) + 0.5) * torch.tensor([width, height]) / 2 ** self.bits[0]
        angles = torch.from_numpy(self.angles) * (pi / 2 ** self.bits[1])
        shapes = torch.cat([self.scale.values(torch.from_numpy(self.scales)).exp(), angles], 1)
        return Splats(centres, shapes.float(), self.colour.values(torch.from_numpy(self.colours)))


class Quantiser:
    """Quantisers of all that a Gaussian is, made for the Gaussians of a fit.

    Args:
        bits: of places, scales, angles and colours.
        progressive: fit coarser pictures too.
    """

    def __init__(self, fit: Fit, bits: tuple[int, int, int, int], progressive: bool) -> None:
        _, shapes, colours = fit.splats
        self.bits, self.fit, self.progressive = bits, fit, progressive
        self.scale = Affine.of(shapes[:, :2].log(), bits[1], outside=0.001)
        self.colour = Affine.of(colours, bits[3], outside=0.001)
        self.edge = colours.new_tensor([fit.grid.width, fit.grid.height])
        self._steps = 0

    def __call__(self, splats: Splats) -> Splats:
        """Quantised Gaussians with gradients; every few calls only a beginning of them, wider."""
        cells = self.edge / 2 ** self.bits[0]
        centres = (round_through(splats.centres / cells - 0.5) + 0.5) * cells
        turn = pi / 2 ** self.bits[2]
        angles = round_through(splats.shapes[:, 2:] / turn) * turn
        shapes = torch.cat([self.scale(splats.shapes[:, :2].log()).exp(), angles], 1)
        whole = Splats(centres, shapes, self.colour(splats.colours))
        self._steps += 1
        ends = level_ends(len(centres))
        if self.progressive and self._steps % _COARSE == 0 and len(ends) > 1:
            count = ends[self._steps // _COARSE % (len(ends) - 1)]
            return widened(Splats(*(t[:count] for t in whole)), len(centres))
        return whole

    def pull(self, splats: Splats) -> None:
        """Nothing but the picture pulls."""

    def settle(self, fit: Fit, final: bool) -> Quantised:
        """The Gaussians as codes."""
        centres, shapes, colours = fit.splats
        places = (centres / self.edge * 2 ** self.bits[0]).floor().clamp(0, 2 ** self.bits[0] - 1).long()
        angles = (shapes[:, 2:] / (pi / 2 ** self.bits[2])).round().long() % 2 ** self.bits[2]
        scales, paint = self.scale.codes(shapes[:, :2].log()), self.colour.codes(colours)
        codes = (places.numpy(), scales.numpy(), angles.numpy(), paint.numpy())
        return Quantised(*codes, self.scale, self.colour, (self.bits[0], self.bits[2]))


class ImageGS:
    """Compress a picture as Gaussians placed by its content.

    Args:
        steps: of the fit; ignored under a budget of seconds.
        placement: "content", or "random": all at once and anywhere, what the paper compares with.
        loss: "squared" error, or "published": |d| + 0.1 (1 - SSIM), which takes longer.
        bits: of a place on either axis (0: a fifth of a pixel), each scale, the angle, each channel of a colour.
        progressive: fit the coarser pictures of shortened files too, at some cost for the whole.
        seed: of the random places.

    Raises: InputError when one is out of range.
    """

    slug: ClassVar[str] = "image-gs"
    planes: ClassVar[tuple[int, ...]] = (1, 3)
    units: ClassVar[tuple[str, ...]] = ("bytes", "gaussians", "ms")
    any_size: ClassVar[bool] = True
    random_access: ClassVar[bool] = True

    def __init__(
        self,
        steps: int = 400,
        placement: str = "content",
        loss: str = "squared",
        bits: tuple[int, int, int, int] = (0, 6, 6, 6),
        progressive: bool = True,
        seed: int = 0,
    ) -> None:
        if placement not in ("content", "random") or loss not in ("squared", "published"):
            raise InputError(
                f"placement={placement!r}, loss={loss!r}: give 'content' or 'random', and 'squared' or 'published'."
            )
        if steps < 1 or len(bits) != 4 or bits[0] not in (0, *range(6, 17)) or not all(1 <= b <= 12 for b in bits[1:]):
            raise InputError(
                f"steps={steps}, bits={bits}: give 1 step or more, 0 or 6..16 bits for places, 1..12 for others."
            )
        self.steps, self.placement, self.loss = steps, placement, loss
        self.bits, self.progressive, self.seed = bits, progressive, seed

    def encode(
        self, image: Tensor, *, bits: int = 8, budget: Budget | None = None, progress: Progress | None = None
    ) -> Container:
        """See `foveate.compress.codec.Codec`; one Gaussian for 50 pixels without a budget."""
        _, channels, height, width = image.shape
        names = ["head", *(f"level-{i}" for i in range(LEVELS))]
        empty = Container(self.slug, width, height, channels, dict.fromkeys(names, b""))
        aim = plan(budget, height * width, len(empty.to_bytes()) + 8, lambda room: self._affordable(room, image))
        loss = squared if self.loss == "squared" else published
        fit = Fit(image[0], AXES, MODE, torch.Generator().manual_seed(self.seed), loss)
        random = self.placement == "random"
        first, uniform = (1.0, 1.0) if random else (0.5, UNIFORM)
        coded = fit_coded(fit, aim, self.steps, first, self._quantiser, self._bytes, uniform, progress)
        return Container(self.slug, width, height, channels, self.pack(coded), bits)

    def decode(self, container: Container, size: Size | None = None, window: Window | None = None) -> Tensor:
        """See `foveate.compress.codec.Codec`."""
        height, width = container.height, container.width
        coded, total = self.unpack(container)
        splats = widened(coded.splats(height, width), total)
        return supersampled(splats, AXES, MODE, frame(height, width, size, window))[None]

    def pack(self, coded: Quantised) -> dict[str, bytes]:
        """Sections of a file."""
        quantisers = [*coded.scale.step, *coded.scale.offset, *coded.colour.step, *coded.colour.offset]
        head = varint(len(coded)) + bytes([coded.bits[0], coded.scale.bits, coded.bits[1], coded.colour.bits])
        head += np.array(quantisers, "<f4").tobytes()
        sections, models, start = {"head": head}, _models(coded), 0
        for level, end in enumerate(level_ends(len(coded))):
            part = coded.select(np.arange(start, end))
            part = part.select(sort_places(part.places))
            coder = Encoder()
            top = 2 ** coded.bits[0] - 1
            put_places(coder, part.places, (top, top), coded.bits[0] - _GROUP)
            for column, model in zip(_columns(part), models, strict=True):
                coder.put_adaptive(column, model)
            sections[f"level-{level}"], start = coder.finish(), end
        return sections

    def unpack(self, container: Container) -> tuple[Quantised, int]:
        """Gaussians of a file, as many levels as it holds, and how many there were.

        Raises: BitstreamError when a section makes no sense, or not even the first level is there.
        """
        head = container.section("head")
        total = head.varint(most=container.width * container.height, least=1)
        bits = [head.byte() for _ in range(4)]
        if not 6 <= bits[0] <= 16 or not all(1 <= b <= 12 for b in bits[1:]):
            raise head.error(f"numbers of {bits} bits")
        channels = 1 if container.channels < 3 else 3
        values = torch.from_numpy(head.array("<f4", 4 + 2 * channels).astype(np.float32))
        head.end()
        if (values.abs() > 1e3).any():
            raise head.error("a quantiser out of range")
        scale = Affine(values[:2], values[2:4], bits[1])
        colour = Affine(values[4 : 4 + channels], values[4 + channels :], bits[3])
        nothing = [np.zeros((0, n), np.int64) for n in (2, 2, 1, channels)]
        empty = Quantised(nothing[0], nothing[1], nothing[2], nothing[3], scale, colour, (bits[0], bits[2]))
        parts, models, start = [empty], _models(empty), 0
        for level, end in enumerate(level_ends(total)):
            name = f"level-{level}"
            if level and name in container.missing:
                break
            parts.append(_read(container.section(name), end - start, empty, models, name))
            start = end
        return empty.coded(*(np.concatenate([getattr(part, name) for part in parts]) for name in _CODES)), total

    def _quantiser(self, fit: Fit) -> Quantiser:
        return Quantiser(fit, self._widths(fit.grid.height, fit.grid.width), self.progressive)

    def _widths(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Bits, those of a place chosen."""
        place = self.bits[0] or min(max(ceil(log2(5 * max(height, width))), 6), 16)
        return place, self.bits[1], self.bits[2], self.bits[3]

    def _bytes(self, coded: Quantised) -> int:
        return sum(map(len, self.pack(coded).values()))

    def _affordable(self, room: float, image: Tensor) -> float:
        _, channels, height, width = image.shape
        place, scale, angle, colour = self._widths(height, width)
        count = 8 * room / 45
        for _ in range(4):
            heights = max(1.5, place + log2(2.7 / max(count, 1)))
            count = 8 * (room - 40) / (place + heights + 2 * (scale - 1.2) + angle + channels * (colour - 1.2))
        return count


def level_ends(total: int) -> list[int]:
    """How many Gaussians each level and those before it hold.

    >>> level_ends(1000), level_ends(3)
    ([32, 63, 125, 250, 500, 1000], [1, 2, 3])
    """
    return sorted({ceil(total / 2 ** (LEVELS - 1 - level)) for level in range(LEVELS)})


def widened(splats: Splats, total: int) -> Splats:
    """The first of `total` Gaussians, as wide as closes the gaps of the others."""
    present = len(splats.centres)
    if present == total:
        return splats
    shapes = torch.cat([splats.shapes[:, :2] * sqrt(present / total), splats.shapes[:, 2:]], 1)
    return splats._replace(shapes=shapes)


def published(drawn: Tensor, target: Tensor) -> Tensor:
    """Gradient of the paper's loss, mean |d| + 0.1 (1 - SSIM). Shape: [C, H, W] -> [C, H, W]."""
    leaf = drawn.detach().requires_grad_()
    loss = (leaf - target).abs().mean()
    if min(target.shape[1:]) >= 11:
        loss = loss + 0.1 * (1 - ssim(leaf[None], target[None]).mean())
    (found,) = torch.autograd.grad(loss, leaf)
    return found


def _columns(part: Quantised) -> list[Ints]:
    """What is coded adaptively: shapes, then one channel and the differences of the others to it."""
    first, *others = np.roll(part.colours, -1, 1).T
    mask = (1 << part.colour.bits) - 1
    return [*part.scales.T, *part.angles.T, first, *((other - first) & mask for other in others)]


def _models(coded: Quantised) -> list[Adaptive]:
    """Tables for `_columns`; they learn from level to level."""
    widths = [coded.scale.bits] * 2 + [coded.bits[1]] + [coded.colour.bits] * coded.colours.shape[1]
    return [Adaptive(1 << width) for width in widths]


def _read(fields: Reader, count: int, like: Quantised, models: list[Adaptive], name: str) -> Quantised:
    """A level."""
    coder, top = Decoder(fields.rest(), f"image-gs section {name!r}"), 2 ** like.bits[0] - 1
    places = get_places(coder, count, (top, top), like.bits[0] - _GROUP, fields)
    columns = [coder.get_adaptive(count, model) for model in models]
    coder.end()
    mask = (1 << like.colour.bits) - 1
    paint = np.stack([columns[3], *((other + columns[3]) & mask for other in columns[4:])], 1)
    codes = (places, np.stack(columns[:2], 1), columns[2][:, None], np.roll(paint, 1, 1))
    return like.coded(*codes)
