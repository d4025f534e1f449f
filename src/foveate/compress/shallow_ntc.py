"""Shallow decoders for a learned codec: compute is spent at the encoder, where there is time for it.

Yang, Mandt 2023, Computationally-Efficient Neural Image Compression with Shallow Decoders (first called
Asymmetrically-powered Neural Image Compression with Shallow Decoders), arXiv:2304.06244.

A synthesis of one or two transposed convolutions (`foveate.compress.transforms`) makes as good pictures as a deep one,
if the latents y are good. An analysis network proposes them; then they are improved for this very picture, by

    minimise over y, z   bits(y, z) + lambda pixels |x - g(y_hat)|^2 / 3        by stochastic Gumbel annealing

with all weights fixed, and coded under the mean-scale hyperprior (`foveate.compress.hyperprior`). One network serves
all rates: a level of 0 to 20 picks the gains that scale latents before rounding, and between levels lambda is moved
until the file has the wished size or the picture the wished error.

Decoding is in whole numbers from the first byte to the last (`foveate.compress.whole`). A file has the sections

    head   level, 0 for the two-layer synthesis or 1 for the JPEG-like one
    side   side latents, one table for each channel
    main   (latents - mean) / step of the 16x16 blocks that the picture has (`foveate.compress.latent_contexts`)
"""

import math
import time
from collections.abc import Callable
from functools import cache, lru_cache
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.compress import latent_contexts
from foveate.compress.codec import Progress, Size, Window
from foveate.compress.container import Container
from foveate.compress.entropy import Decoder, Encoder, Ints, Table
from foveate.compress.fields import varint
from foveate.compress.hyperprior import TOP
from foveate.compress.sga import Rounding, anneal
from foveate.compress.transform_coder import (
    BETWEEN,
    LEVELS,
    SLUG,
    Agreed,
    TransformCoder,
    Trial,
    blocks,
    price,
    shipped,
)
from foveate.compress.transforms import FACTOR, JpegLike, TwoLayer
from foveate.compress.whole import MOST, UNIT, Layer, whole_sequence, whole_synthesis
from foveate.engine.budget import Budget
from foveate.errors import BitstreamError, BudgetError, InputError

MIDDLE = 10
SYNTHESES = ("two-layer", "linear")
_SIDE = 4 * FACTOR
_STRIP = 16  # rows of blocks that are rendered at a time
_LARGEST = 2**20  # magnitude of a latent in steps that a file may hold
_SAVED = 1.08  # by how much a file may be too large before annealing
_GAIN = 0.35  # dB that annealing is counted on to bring when a quality is asked


class Code(NamedTuple):
    """A coded picture: its symbols, and what follows from them."""

    level: int
    synthesis: int
    side: Tensor
    main: Tensor
    tables: Tensor
    latents: Tensor


class Scene(NamedTuple):
    """A picture to be coded, what the analysis proposes for it, and which synthesis it is for."""

    image: Tensor
    y: Tensor
    z: Tensor


class Aim(NamedTuple):
    """What annealing steers lambda to: a share of the bits without it, or a mean squared error in levels of 255."""

    bits: float = 0.0
    error: float = 0.0


class Machine(NamedTuple):
    """The parts of a decoder, in float to learn by and in whole numbers to decode by."""

    coder: TransformCoder
    synthesis: TwoLayer | JpegLike
    agreed: Agreed
    tables: list[Table]
    describe: Layer
    render: Layer


@lru_cache(maxsize=2)
def machine(synthesis: int) -> Machine:
    """The shipped networks, with one of the `SYNTHESES`."""
    coder, linear, agreed = shipped()
    chosen = linear if synthesis else coder.synthesis
    assert isinstance(chosen, TwoLayer | JpegLike)
    tables = latent_contexts.tables(agreed.main_tables.numpy().astype(np.int64) + 1)
    return Machine(coder, chosen, agreed, tables, whole_sequence(coder.prior.up), whole_synthesis(chosen))


class ShallowNTC:
    """Compress pictures by a learned transform with a shallow inverse.

    Args:
        steps: of annealing; 0 codes what the analysis proposes.
        synthesis: "two-layer" or "linear".
        seed: of annealing.

    Raises: InputError for other settings.
    """

    slug: ClassVar[str] = SLUG
    planes: ClassVar[tuple[int, ...]] = (3,)
    units: ClassVar[tuple[str, ...]] = ("bytes", "ms")
    any_size: ClassVar[bool] = False
    random_access: ClassVar[bool] = False

    def __init__(self, steps: int = 60, synthesis: str = "two-layer", seed: int = 0) -> None:
        if steps < 0 or synthesis not in SYNTHESES:
            kinds = " or ".join(map(repr, SYNTHESES))
            raise InputError(f"steps={steps}, synthesis={synthesis!r}: give 0 steps or more, and {kinds}.")
        self.steps, self.seed, self._kind = steps, seed, SYNTHESES.index(synthesis)

    def encode(
        self, image: Tensor, *, bits: int = 8, budget: Budget | None = None, progress: Progress | None = None
    ) -> Container:
        """See `foveate.compress.codec.Codec`; level 10 of 20 without a budget in bytes."""
        scene, clock = self._scene(image), _Clock(self.steps, progress)
        if budget is not None and budget.unit == "bytes":
            return self._to_size(scene, bits, budget.amount, clock)
        if budget is not None:
            clock = _Clock(None, progress, budget.amount / 1e3)
        return self._container(self._annealed(scene, MIDDLE, clock), scene, bits)

    def encode_to(self, image: Tensor, quality: float, *, bits: int = 8, progress: Progress | None = None) -> Container:
        """The smallest file found that reaches a PSNR in dB."""
        from foveate.compress.verbs import measured

        scene, clock = self._scene(image), _Clock(self.steps, progress)

        def reached(code: Code) -> float:
            return measured(self._pixels(code, scene), image, bits)

        enough = _first(lambda level: reached(self._plain(scene, level)) >= quality)
        start = _first(lambda level: reached(self._plain(scene, level)) >= quality - _GAIN) if self.steps else enough
        error = 255**2 * 10 ** (-quality / 10)
        best, most = None, 0.0
        for retry in range(4 if self.steps else 0):
            code = self._annealed(scene, min(start, LEVELS - 1), clock, Aim(error=error * 0.985), retry)
            most = max(most, dB := reached(code))
            if dB >= quality or clock.stopped:
                best = code
                break
            error *= 10 ** (-(quality - dB + 0.02) / 10)
        if best is None and enough < LEVELS:
            best = self._plain(scene, enough)
        if best is None:
            most = max(most, reached(self._plain(scene, LEVELS - 1)))
            raise BudgetError(f"{SLUG} reaches {most:.2f} dB at most here, asked {quality:g} dB; ask for less.")
        return self._container(best, scene, bits)

    def _to_size(self, scene: Scene, bits: int, limit: float, clock: "_Clock") -> Container:
        def packed(code: Code) -> tuple[Container, int]:
            container = self._container(code, scene, bits)
            return container, len(container.to_bytes())

        @cache
        def size_at(level: int) -> int:
            return packed(self._plain(scene, level))[1]

        def below(most: float) -> int:
            return max(_first(lambda level: size_at(level) > most) - 1, 0)

        fits, level = below(limit), below(_SAVED * limit)
        code = self._plain(scene, fits)
        container, least = packed(code)
        best = (self._error(code, scene), container) if least <= limit else None
        share = 0.995 * limit / size_at(level)
        for retry in range(4 if self.steps else 0):
            code = self._annealed(scene, level, clock, Aim(bits=share), retry)
            container, size = packed(code)
            least = min(least, size)
            if size <= limit and (best is None or self._error(code, scene) < best[0]):
                best = (self._error(code, scene), container)
            if clock.stopped or 0.97 * limit < size <= limit:
                break
            share *= limit / size * (0.99 if size > limit else 1.0)
        if best is None:
            raise BudgetError(f"{SLUG} needs at least {least} bytes here, the budget is {limit:.0f}; give more.")
        return best[1]

    def _scene(self, image: Tensor) -> Scene:
        coder = machine(self._kind).coder
        height, width = image.shape[2:]
        x = F.pad(image, (0, -width % _SIDE, 0, -height % _SIDE), mode="replicate")
        with torch.no_grad():
            y = coder.analysis(x - 0.5)
            return Scene(image, y, coder.prior.down(y))

    def _plain(self, scene: Scene, level: int) -> Code:
        """What the analysis proposes, rounded."""
        parts = machine(self._kind)
        side = (scene.z * UNIT / parts.agreed.side_steps[level][:, None, None]).round().long()
        return self._rounded(scene, scene.y, side, level)

    def _rounded(self, scene: Scene, y: Tensor, side: Tensor, level: int) -> Code:
        rows, columns = blocks(*scene.image.shape[2:])
        mean, tables = _described(self._kind, side, level, rows, columns)
        steps = machine(self._kind).agreed.steps[level][:, None, None].double()
        main = ((y[..., :rows, :columns].double() * UNIT - mean) / steps).round()
        return Code(level, self._kind, side, main.long(), tables, mean + main * steps)

    def _annealed(self, scene: Scene, level: int, clock: "_Clock", aim: Aim | None = None, retry: int = 0) -> Code:
        """Improve what the analysis proposes.

        Args:
            clock: when to end.
            aim: what lambda is to be steered to; else it is the level's.
            retry: later ones begin with lower temperatures, and differ.
        """
        plain = self._plain(scene, level)
        if not clock.begin(0.6 if retry else 0.0):
            return plain
        parts, agreed = machine(self._kind), machine(self._kind).agreed
        step, side_step, shift = (
            x[level][:, None, None] / UNIT for x in (agreed.steps, agreed.side_steps, agreed.shifts)
        )
        trial = Trial(parts.coder.prior, parts.synthesis, scene.image, step, side_step, shift)
        y, z = scene.y / step, scene.z / side_step
        multiplier = float(price(level / BETWEEN))
        with torch.no_grad():
            usual = trial(torch.round, y, z)[0]

        def loss(rounding: Rounding) -> Tensor:
            nonlocal multiplier
            bits, error = trial(rounding, y, z)
            value = bits / scene.image[0, 0].numel() + multiplier * error
            if aim is not None:
                short = float((aim.bits * usual / bits if aim.bits else error / aim.error).detach())
                multiplier *= min(max(short, 0.5), 2.0) ** 0.2
            clock.report(float(error.detach()))
            return value

        anneal(loss, (y, z), clock.share, seed=self.seed + retry)
        with torch.no_grad():
            code = self._rounded(scene, y * step, z.round().long(), level)
        return code if aim is not None else min(code, plain, key=lambda c: self._cost(c, scene))

    def _cost(self, code: Code, scene: Scene) -> float:
        bits = 8 * len(self._container(code, scene, 8).to_bytes()) / scene.image[0, 0].numel()
        return bits + float(price(code.level / BETWEEN)) * self._error(code, scene)

    def _error(self, code: Code, scene: Scene) -> float:
        return 255**2 * float(F.mse_loss(self._pixels(code, scene), scene.image))

    def _container(self, code: Code, scene: Scene, bits: int) -> Container:
        side, main = Encoder(), Encoder()
        for symbols, table in zip(code.side[0], machine(self._kind).agreed.tables(code.level), strict=True):
            side.put(symbols.numpy(), table)
        latent_contexts.write(main, code.main[0].numpy(), code.tables[0].numpy(), machine(self._kind).tables)
        head = varint(code.level, code.synthesis)
        sections = {"head": head, "side": side.finish(), "main": main.finish()}
        return Container(SLUG, scene.image.shape[3], scene.image.shape[2], 3, sections, bits)

    def _pixels(self, code: Code, scene: Scene) -> Tensor:
        height, width = scene.image.shape[2:]
        return _rendered(code.latents, code.synthesis, (0, 0, width, height))

    def decode(self, container: Container, size: Size | None = None, window: Window | None = None) -> Tensor:
        """See `foveate.compress.codec.Codec`; a window is rendered alone, after all symbols were read."""
        head = container.section("head")
        level, kind = head.varint(most=LEVELS - 1), head.varint(most=len(SYNTHESES) - 1)
        head.end()
        height, width = container.height, container.width
        rows, columns = blocks(height, width)
        tables = machine(kind).agreed.tables(level)
        grid = (-(-height // _SIDE), -(-width // _SIDE))
        stream, count = _reader(container, "side"), grid[0] * grid[1]
        side = torch.stack([_small(stream.get(count, table), "side") for table in tables]).view(1, -1, *grid)
        stream.end()
        mean, index = _described(kind, side, level, rows, columns)
        stream = _reader(container, "main")
        main = _small(latent_contexts.read(stream, index[0].numpy(), machine(kind).tables), "main")[None]
        stream.end()
        latents = mean + main * machine(kind).agreed.steps[level][:, None, None]
        return _rendered(latents, kind, window or (0, 0, width, height))


class _Clock:
    """Count annealing steps or seconds, report, and stop when asked to.

    Args:
        steps: of one annealing; None where seconds are counted.
        seconds: for all of it.
    """

    def __init__(self, steps: int | None, progress: Progress | None, seconds: float = math.inf) -> None:
        self._steps, self._progress, self._seconds = steps, progress, seconds
        self._began, self._now, self._first, self.stopped = time.perf_counter(), 0.0, 0.0, False

    def begin(self, first: float) -> bool:
        """Start an annealing from a share of its way; False when there is nothing to do."""
        self._first = first
        return not self.stopped and self._steps != 0

    def share(self, step: int) -> float:
        """Share of the way after `step` steps."""
        if self.stopped:
            return 1.0
        spent = (time.perf_counter() - self._began) / self._seconds
        self._now = max(self._first + (step / self._steps if self._steps else 0), spent)
        return self._now

    def report(self, error: float) -> None:
        """Tell the squared error in levels of 255 so far."""
        dB = 10 * math.log10(255**2 / max(error, 1e-9))
        self.stopped = self.stopped or bool(self._progress and self._progress(min(self._now, 1.0), dB))


def _first(holds: Callable[[int], bool]) -> int:
    """The lowest level for which something holds that then holds for all above; LEVELS when for none."""
    low, high = 0, LEVELS
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _described(synthesis: int, side: Tensor, level: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Means in whole units and table numbers, from whole side latents. Shape: [1, Z, h, w] -> [1, M, rows, columns]."""
    parts = machine(synthesis)
    z = side.double() * parts.agreed.side_steps[level][:, None, None]
    mean, index = parts.describe(z.clamp(-MOST, MOST))[..., :rows, :columns].chunk(2, 1)
    shifted = (index + parts.agreed.shifts[level][:, None, None] + UNIT // 2) / UNIT
    return mean, shifted.floor().clamp(0, TOP).long()


def _rendered(latents: Tensor, synthesis: int, window: Window) -> Tensor:
    """A window of the picture, in strips of blocks with one more block on every side, which is as far as they reach."""
    x, y, width, height = window
    render, strips = machine(synthesis).render, []
    left, right = max(x // FACTOR - 1, 0), (x + width - 1) // FACTOR + 2
    for top in range(y // FACTOR, (y + height - 1) // FACTOR + 1, _STRIP):
        first, begin = max(top - 1, 0), max(y, top * FACTOR)
        end = min(y + height, (top + _STRIP) * FACTOR)
        part = latents[..., first : top + _STRIP + 1, left:right].clamp(-MOST, MOST)
        pixels = render(part)[..., begin - first * FACTOR : end - first * FACTOR, x - left * FACTOR :][..., :width]
        strips.append((pixels + 0.5).clamp(0, 1).float())
    return torch.cat(strips, 2)


def _reader(container: Container, name: str) -> Decoder:
    return Decoder(container.section(name).rest(), f"{SLUG} section {name!r}")


def _small(values: Ints, name: str) -> Tensor:
    """Symbols as a tensor. Raises: BitstreamError for some beyond what any picture gives."""
    if values.size and max(-int(values.min()), int(values.max())) > _LARGEST:
        raise BitstreamError(f"The file is damaged ({SLUG} section {name!r}: a latent too large); get a fresh copy.")
    return torch.from_numpy(values)
