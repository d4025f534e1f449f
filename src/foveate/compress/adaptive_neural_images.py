"""Adaptive neural images: a picture as a small network of 4-bit weights, its beginning a smaller network of its own.

Hoshikawa, Conde, Ohashi, Irie 2024, "Extreme Compression of Adaptive Neural Images", arXiv:2405.16807.

    (x, y) -> colour,   fitted to one picture;   bits per pixel = weights * bits / (height * width)

Rounding the weights of a fitted network ruins it below 8 bits; fitting it on with rounded weights keeps 4 bits usable
(`neural_codes`, `neural_fit`), and networks of multiplicative filters bear it better than those of sines in sines
(`foveate.layers.implicit.NeuralImage` has both). The filters are not trained and follow from a rule: they cost nothing.

One file serves many receivers. Its levels are networks of a quarter, a half, three quarters and all of the width, each
the first rows and columns of the next, with a head of its own, and all are fitted at once. A section holds what a level
adds to those before it: a file cut off decodes to the widest level that arrived whole (`--prefix`), `narrowed` makes a
smaller file without fitting anything again, and a receiver short of time decodes a narrow level of a whole file.

A level is drawn at any size, in exact arithmetic (`neural_decode`).
"""

import itertools
import math
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from foveate.compress import neural_codes
from foveate.compress.codec import Progress, Size, Window
from foveate.compress.container import Container
from foveate.compress.fields import varint
from foveate.compress.gaussian_fit import pace
from foveate.compress.neural_codes import Codes
from foveate.compress.neural_decode import render
from foveate.compress.neural_fit import fit, quantise
from foveate.compress.neural_streams import Source, Writer
from foveate.compress.search import smallest
from foveate.engine.budget import Budget
from foveate.errors import InputError
from foveate.layers.implicit import NeuralImage
from foveate.meter.quality import psnr

FREE = 0.5
"""Share of the steps, or seconds, before weights are rounded."""

WIDEST, DEEPEST, LEVELS = 256, 8, 8
_KINDS = ("fourier", "siren")
_TOP = 16
"""A head holds the largest frequency in whole parts of one over this."""

SPREAD = 0.12
"""Largest frequency of a filter for each channel: few channels cannot fill a wide band. In no case do products of all
filters go beyond what pixels can show."""

_DENSE = 16
"""Weights that a byte of a level stands for at most: what a forged head may promise."""


class AdaptiveNeuralImages:
    """Compress a picture as a neural image of several widths.

    Args:
        kind: "fourier", multiplicative filters, or "siren".
        bits: of the weights between layers, 2 to 8.
        shares: widths of the levels, as ascending shares of the widest.
        depths: matrices between layers, of all levels or of each.
        width: of the widest level; chosen by the budget when None.
        steps: of the fit; 300 and one for every 150 pixels when None; ignored under a budget of seconds.
        entropy: code the weights; otherwise each takes its bits.
        seed: of first weights and of pixels looked at.

    Raises: InputError when one is out of range.
    """

    slug: ClassVar[str] = "adaptive-neural-images"
    planes: ClassVar[tuple[int, ...]] = (1, 3)
    units: ClassVar[tuple[str, ...]] = ("bytes", "ms")
    any_size: ClassVar[bool] = True
    random_access: ClassVar[bool] = True

    def __init__(
        self,
        kind: str = "fourier",
        bits: int = 4,
        shares: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0),
        depths: int | tuple[int, ...] = 3,
        width: int | None = None,
        steps: int | None = None,
        entropy: bool = True,
        seed: int = 0,
    ) -> None:
        deep = (depths,) * len(shares) if isinstance(depths, int) else tuple(depths)
        ascend = all(a < b for a, b in itertools.pairwise((0.0, *shares))) and list(deep) == sorted(deep)
        if not ascend or not 1 <= len(shares) <= LEVELS or shares[-1] != 1 or len(deep) != len(shares):
            raise InputError(
                f"shares={shares}, depths={depths}: give 1 to {LEVELS} shares that ascend to 1, and a depth for each "
                "that does not descend."
            )
        if kind not in _KINDS or not 2 <= bits <= 8 or not 1 <= deep[0] <= deep[-1] <= DEEPEST:
            raise InputError(
                f"kind={kind!r}, bits={bits}, depths={depths}: give 'fourier' or 'siren', 2 to 8 bits and depths of "
                f"1 to {DEEPEST}."
            )
        if (width is not None and not 1 <= width <= WIDEST) or (steps is not None and steps < 1):
            raise InputError(f"width={width}, steps={steps}: give a width of 1 to {WIDEST}, and at least 1 step.")
        self.kind, self.bits, self.shares, self.depths = kind, bits, shares, deep
        self.width, self.steps, self.entropy, self.seed = width, steps, entropy, seed

    def encode(
        self, image: Tensor, *, bits: int = 8, budget: Budget | None = None, progress: Progress | None = None
    ) -> Container:
        """See `foveate.compress.codec.Codec`; 0.3 bits per pixel without a budget of bytes."""
        _, channels, height, width = image.shape
        by_size = budget is not None and budget.unit == "bytes"
        limit = budget.amount if budget is not None and by_size else max(0.3 * height * width / 8, 300)
        seconds = 0.95 * budget.amount / 1000 if budget is not None and not by_size else None
        generator = torch.Generator().manual_seed(self.seed)
        net = self._network(image, self.width or self._affordable(image, limit), generator)
        self._fit(net, image[0], seconds, generator, progress)
        while True:
            sections = self.pack(net, quantise(net, image[0], self.bits))
            container = Container(self.slug, width, height, channels, sections, bits)
            if not by_size or len(container.to_bytes()) <= limit or not neural_codes.thin(net, self.bits):
                return container

    def encode_to(self, image: Tensor, quality: float, *, bits: int = 8, progress: Progress | None = None) -> Container:
        """See `foveate.compress.codec.Codec`: the narrowest network that reaches a PSNR, by bisection."""
        peak = 2 ** min(bits, 16) - 1

        def attempt(amount: float, report: Progress) -> tuple[Container, float]:
            codec = AdaptiveNeuralImages(
                self.kind, self.bits, self.shares, self.depths, round(amount), self.steps, self.entropy, self.seed
            )
            container = codec.encode(image, bits=bits, progress=report)
            return container, float(psnr((codec.decode(container) * peak).round() / peak, image))

        return smallest(attempt, quality, 2, self.width or WIDEST, progress, self.slug, tries=8, close=0.1)

    def decode(
        self, container: Container, size: Size | None = None, window: Window | None = None, level: int | None = None
    ) -> Tensor:
        """See `foveate.compress.codec.Codec`.

        Args:
            level: of those the file holds, from 0; the widest when None.

        Raises: InputError for another level.
        """
        net, present = self.unpack(container)
        if level is not None and not 0 <= level < present:
            raise InputError(f"level={level} is not in this file, which holds levels 0 to {present - 1}.")
        chosen = present - 1 if level is None else level
        return render(net, container.height, container.width, chosen, size, window)[None]

    def narrowed(self, container: Container, level: int) -> Container:
        """The file of a level: the one given without what wider levels add.

        Raises: InputError for a level that the file does not hold.
        """
        present = container.section("head").rest()[-1]
        if not 0 <= level < present - len(container.missing):
            raise InputError(f"level={level} is not in this file, which holds {present - len(container.missing)}.")
        sections = {name: container.sections[name] for name in map(_section, range(level + 1))}
        head = container.sections["head"][:-1] + bytes([level + 1])
        return replace(container, sections={"head": head, **sections}, missing=())

    def pack(self, net: NeuralImage, codes: dict[str, Codes]) -> dict[str, bytes]:
        """Sections of a file: a head, and what each level adds."""
        head = bytes([_KINDS.index(net.kind), self.entropy, self.bits]) + varint(round(net.top * _TOP))
        head += varint(len(net.levels), *itertools.chain(*net.levels)) + bytes([len(net.levels)])
        out = Writer(self.entropy)
        sections, owners = {"head": head}, neural_codes.owners(net)
        for level in range(len(net.levels)):
            count = 0
            for name, (values, steps) in codes.items():
                own, depth = owners[name] == level, neural_codes.bits_of(name, self.bits)
                out.put(steps[owners[name].amin(-1) == level].numpy(), f"{name} steps", 8)
                out.put(values[own].numpy() + 2 ** (depth - 1) - 1, name, depth)
                count += int(own.sum())
            sections[_section(level)] = out.finish().ljust(-(-count // _DENSE), b"\0")
        return sections

    def unpack(self, container: Container) -> tuple[NeuralImage, int]:
        """The network of a file, and how many of its levels the file holds.

        Raises: BitstreamError when a section makes no sense, or not even the first level is there.
        """
        head = container.section("head")
        kind, entropy, bits = (head.byte() for _ in range(3))
        top, count = head.varint(most=2**20, least=1) / _TOP, head.varint(most=LEVELS, least=1)
        levels = [(head.varint(most=WIDEST, least=1), head.varint(most=DEEPEST, least=1)) for _ in range(count)]
        present = head.byte()
        head.end()
        steps = itertools.pairwise(levels)
        if kind > 1 or entropy > 1 or not 2 <= bits <= 8 or not 1 <= present <= count:
            raise head.error(f"kind {kind}, coding {entropy}, {bits} bits, {present} of {count} levels")
        if any(b[i] < a[i] for a, b in steps for i in (0, 1)):
            raise head.error(f"levels {levels}")
        while present > 1 and _section(present - 1) in container.missing:
            present -= 1
        sections = [container.section(_section(level)) for level in range(present)]
        with torch.device("meta"):
            plan = NeuralImage(levels, 1 if container.channels < 3 else 3, _KINDS[kind])
        owners = neural_codes.owners(plan)
        for level, section in enumerate(sections):
            added = sum(int((own == level).sum()) for own in owners.values())
            if added > _DENSE * section.left:
                raise section.error(f"{added} weights in {section.left} bytes")
        net = NeuralImage(levels, 1 if container.channels < 3 else 3, _KINDS[kind], top)
        codes = {
            name: Codes(torch.zeros_like(own), torch.zeros(own.shape[:-1], dtype=torch.long))
            for name, own in owners.items()
        }
        stored = Source(bool(entropy))
        for level, section in enumerate(sections):
            stored.begin(section, f"{self.slug} section {_section(level)!r}")
            for name, (values, numbers) in codes.items():
                own, first = owners[name] == level, owners[name].amin(-1) == level
                depth = neural_codes.bits_of(name, bits)
                numbers[first] = torch.from_numpy(stored.get(int(first.sum()), f"{name} steps", 8))
                found = stored.get(int(own.sum()), name, depth)
                values[own] = torch.from_numpy(found) - (2 ** (depth - 1) - 1)
            stored.end()
        neural_codes.put(net, codes)
        return net, present

    def _network(self, image: Tensor, width: int, generator: torch.Generator | None = None) -> NeuralImage:
        pixels = max(image.shape[2:]) / (4 * (self.depths[-1] + 1))
        top = max(1, round(min(pixels, SPREAD * width) * _TOP)) / _TOP
        levels = [(math.ceil(share * width), depth) for share, depth in zip(self.shares, self.depths, strict=True)]
        return NeuralImage(levels, image.shape[1], self.kind, top, generator)

    def _affordable(self, image: Tensor, limit: float) -> int:
        """The largest width whose file is expected to keep within so many bytes."""
        low, high = 1, WIDEST + 1
        while high - low > 1:
            middle = (low + high) // 2
            with torch.device("meta"):
                expected = neural_codes.rate(self._network(image, middle), self.bits, self.entropy) / 8
            low, high = (middle, high) if expected + 90 + 16 * len(self.shares) <= limit else (low, middle)
        return low

    def _fit(
        self,
        net: NeuralImage,
        target: Tensor,
        seconds: float | None,
        generator: torch.Generator,
        progress: Progress | None,
    ) -> None:
        """Train with weights as they are, then with rounded ones."""
        steps = self.steps or 300 + target[0].numel() // 150
        for start, share, bits in ((0.0, FREE, None), (FREE, 1 - FREE, self.bits)):
            clock = pace(max(1, round(share * steps)), None if seconds is None else share * seconds)

            def report(done: float, dB: float, start: float = start, share: float = share) -> bool:
                return bool(progress and progress(start + share * done, dB))

            if fit(net, target, clock, generator, bits, report):
                return


def _section(level: int) -> str:
    return f"level-{level}"
