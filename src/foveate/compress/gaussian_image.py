"""GaussianImage: a picture is a plain sum of coloured Gaussians, quantised while they are fitted.

Zhang et al. 2024, "GaussianImage: 1000 FPS Image Representation and Compression by 2D Gaussian Splatting",
arXiv:2403.08551.

    out(p) = sum_n c_n exp(-(p - mu_n)^T Sigma_n^-1 (p - mu_n) / 2),  terms below 1/255 left out,  Sigma = L L^T

Nothing is sorted or blended, opacity is part of the colour: 8 numbers for each Gaussian, in 56 bits:

    centre   2 x 16   half-precision floats x of mu = (tanh(x) + 1) / 2 of width and height
    shape    3 x 6    log l11, asinh(l21 / l22), log l22, each by a learned uniform quantiser
    colour   2 x 3    residual vector quantisation, two codebooks of 8 words (by default 32, in 2 x 5)

The fit (`foveate.compress.gaussian_fit`) is followed by steps in which what is drawn is quantised and gradients pass
straight through. Codewords are learned like the Gaussians and get their best values at the end, for the picture is
linear in them; the paper's, which follow the colours by a moving average, end 2 dB lower after as few steps. Shapes are
quantised in logarithms, unlike in the paper, because places chosen by content make them of very unlike sizes.

Entropy coding (the default) stores the same Gaussians in about 40 bits. As their order says nothing they are sorted
by height, and of the heights only the number of Gaussians at each is coded, which spares log2 N! bits; the rest is
coded with adaptive tables. Decoding draws; there is no network.
"""

import warnings
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from foveate.compress.codec import Progress, Size, Window
from foveate.compress.container import Container
from foveate.compress.entropy import Decoder, Encoder, Ints
from foveate.compress.fields import Reader, varint
from foveate.compress.gaussian_bits import get_places, put_places, sort_places
from foveate.compress.gaussian_coding import fit_coded, plan
from foveate.compress.gaussian_fit import CHOLESKY, Fit, Splats, best_colours, frame, psnr, supersampled
from foveate.compress.quantisers import Affine, ResidualVQ
from foveate.engine.budget import Budget
from foveate.errors import InputError
from foveate.ops.gaussians import render

MODE = "cut"
FIRST = 0.25
"""Share of the Gaussians that are there from the beginning."""

_EDGE = 4.0  # largest |x|: tanh(4) is 0.9993


@dataclass(frozen=True, eq=False)
class Quantised:
    """Gaussians as a file holds them.

    Attributes:
        keys: half-precision floats of the centres as whole numbers in their order, [N, 2].
        shapes: codes [N, 3].
        colours: codes [N, M].
        scale: quantiser of the shapes.
        words: codebooks [M, B, C].
    """

    keys: Ints
    shapes: Ints
    colours: Ints
    scale: Affine
    words: Tensor

    def __len__(self) -> int:
        return len(self.keys)

    def splats(self, height: int, width: int) -> Splats:
        """What is drawn."""
        vq = ResidualVQ(self.words)
        centres = _centres(_from_keys(self.keys), height, width)
        shapes = _factors(self.scale.values(torch.from_numpy(self.shapes)))
        return Splats(centres, shapes, vq.values(torch.from_numpy(self.colours)))

    def select(self, index: npt.NDArray[np.intp]) -> "Quantised":
        """Those of an index."""
        return replace(self, keys=self.keys[index], shapes=self.shapes[index], colours=self.colours[index])


class Quantiser:
    """Quantisers of all that a Gaussian is, fitted to Gaussians.

    Args:
        fit: holds the Gaussians, and is told to learn the codewords.
        bits: of each number of a shape.
        stages, words: codebooks and words of each.
    """

    def __init__(self, fit: Fit, bits: int, stages: int, words: int) -> None:
        self.height, self.width = fit.grid.height, fit.grid.width
        _, shapes, colours = fit.splats
        self.scale = Affine.of(_logs(shapes), bits, outside=0.001)
        self.vq = ResidualVQ.of(colours, stages, words, fit.generator)
        fit.learn(self.vq.words, 0.02)
        self.pixels = self.height * self.width

    def __call__(self, splats: Splats) -> Splats:
        """Quantised Gaussians, with gradients."""
        halves = _reals(splats.centres.detach(), self.height, self.width).half().float()
        centres = splats.centres + (_centres(halves, self.height, self.width) - splats.centres).detach()
        return Splats(centres, _factors(self.scale(_logs(splats.shapes))), self.vq(splats.colours))

    def pull(self, splats: Splats) -> Splats:
        """Gradient of the commitment |c - c^|^2, weighted as the mean over Gaussians and the mean over pixels are."""
        colours = splats.colours
        away = (colours - self.vq.values(self.vq.codes(colours))) * (self.pixels / len(colours))
        return Splats(torch.zeros_like(splats.centres), torch.zeros_like(splats.shapes), away)

    def settle(self, fit: Fit, final: bool) -> Quantised:
        """The Gaussians as codes, in the end with the best codewords for them."""
        centres, shapes, colours = fit.splats
        keys = _to_keys(_reals(centres, self.height, self.width))
        codes = self.vq.codes(colours)
        coded = Quantised(keys, self.scale.codes(_logs(shapes)).numpy(), codes.numpy(), self.scale, self.vq.words)
        words = _best_words(coded, fit, 4) if final else coded.words
        return replace(coded, words=words.clamp(-6e4, 6e4).half().float())


class GaussianImage:
    """Compress a picture as a sum of Gaussians.

    Args:
        steps: of the fit, quantised ones included; ignored under a budget of seconds.
        entropy: code what is quantised; otherwise 56 bits for each Gaussian, which a decoder needs not unpack.
        bits: of each number of a shape, 1 to 8.
        stages: codebooks of the colours.
        words: in each, a power of 2; the paper's 8 or, from 500 Gaussians on, 32 when None.
        seed: of the random places.

    Raises: InputError when one is out of range.
    """

    slug: ClassVar[str] = "gaussian-image"
    planes: ClassVar[tuple[int, ...]] = (1, 3)
    units: ClassVar[tuple[str, ...]] = ("bytes", "gaussians", "ms")
    any_size: ClassVar[bool] = True
    random_access: ClassVar[bool] = True

    def __init__(
        self,
        steps: int = 400,
        entropy: bool = True,
        bits: int = 6,
        stages: int = 2,
        words: int | None = None,
        seed: int = 0,
    ) -> None:
        if steps < 1 or not 1 <= bits <= 8 or not 1 <= stages <= 8 or words not in (None, *(2**i for i in range(1, 9))):
            raise InputError(
                f"steps={steps}, bits={bits}, stages={stages}, words={words}: give at least 1 step, 1 to 8 bits, 1 to "
                "8 stages and 2, 4, 8, ... 256 words."
            )
        self.steps, self.entropy, self.bits = steps, entropy, bits
        self.stages, self.words, self.seed = stages, words, seed

    def encode(
        self, image: Tensor, *, bits: int = 8, budget: Budget | None = None, progress: Progress | None = None
    ) -> Container:
        """See `foveate.compress.codec.Codec`; one Gaussian for 50 pixels without a budget."""
        _, channels, height, width = image.shape
        if max(height, width) * 2.0**-11 > 1:
            warnings.warn(f"Places are rounded to half a pixel or more in {width}x{height} pixels.", stacklevel=2)
        empty = Container(self.slug, width, height, channels, {"head": b"", "gaussians": b""})
        header = len(empty.to_bytes()) + 8  # lengths and number of Gaussians take more bytes than those of nothing
        aim = plan(budget, height * width, header, lambda room: self._affordable(room, channels))
        fit = Fit(image[0], CHOLESKY, MODE, torch.Generator().manual_seed(self.seed))
        coded = fit_coded(fit, aim, self.steps, FIRST, self._quantiser, self._bytes, progress=progress)
        return Container(self.slug, width, height, channels, self.pack(coded), bits)

    def decode(self, container: Container, size: Size | None = None, window: Window | None = None) -> Tensor:
        """See `foveate.compress.codec.Codec`."""
        height, width = container.height, container.width
        splats = self.unpack(container).splats(height, width)
        return supersampled(splats, CHOLESKY, MODE, frame(height, width, size, window))[None]

    def pack(self, coded: Quantised) -> dict[str, bytes]:
        """Sections of a file."""
        coded = coded.select(sort_places(coded.keys))
        stages, words, _ = coded.words.shape
        head = varint(len(coded)) + bytes([self.entropy, coded.scale.bits, stages, words.bit_length() - 1])
        head += torch.cat([coded.scale.step, coded.scale.offset]).numpy().astype("<f4").tobytes()
        head += coded.words.numpy().astype("<f2" if self.entropy else "<f4").tobytes()
        return {"head": head, "gaussians": _code(coded) if self.entropy else _plain(coded)}

    def unpack(self, container: Container) -> Quantised:
        """Gaussians of a file. Raises: BitstreamError when a section makes no sense."""
        head = container.section("head")
        count = head.varint(most=container.width * container.height, least=1)
        entropy, bits, stages, log_words = (head.byte() for _ in range(4))
        if entropy > 1 or not 1 <= bits <= 8 or not 1 <= stages <= 8 or not 0 <= log_words <= 8:
            raise head.error(f"{bits} bits, {stages} codebooks of 2^{log_words} words")
        step, offset = torch.from_numpy(head.array("<f4", 6).astype(np.float32)).view(2, 3)
        if (step <= 0).any() or (offset.abs() > 100).any() or (step > 100).any():
            raise head.error(f"steps {step.tolist()} from {offset.tolist()}")
        channels = 1 if container.channels < 3 else 3
        size = stages * 2**log_words * channels
        words = torch.from_numpy(head.array("<f2" if entropy else "<f4", size).astype(np.float32))
        head.end()
        nothing = np.zeros((0, 0), np.int64)
        layout = Quantised(nothing, nothing, nothing, Affine(step, offset, bits), words.view(stages, -1, channels))
        return (_from_code if entropy else _from_plain)(container.section("gaussians"), count, layout)

    def _quantiser(self, fit: Fit) -> "Quantiser":
        return Quantiser(fit, self.bits, self.stages, self.words or _words(len(fit.splats.centres)))

    def _bytes(self, coded: Quantised) -> int:
        return sum(map(len, self.pack(coded).values()))

    def _affordable(self, room: float, channels: int) -> float:
        """Gaussians that fit into so many bytes: exactly, or a few more where entropy coding makes room."""
        count = 8 * room / 40
        for _ in range(4):
            words = self.words or _words(count)
            code = self.stages * (words.bit_length() - 1)
            left = 8 * (room - 28 - self.stages * words * channels * (2 if self.entropy else 4))
            if self.entropy:
                heights = max(1.5, np.log2(33000 / max(count, 1)))
                count = left / (13 + heights + 3 * (self.bits - 0.9) + 0.9 * code)
            else:
                count = left / (32 + 3 * self.bits + code)
        return count


def _words(count: float) -> int:
    """Words of a codebook that are worth their bytes."""
    return 32 if count >= 500 else 8


def _best_words(coded: Quantised, fit: Fit, rounds: int) -> Tensor:
    """Codewords that make the picture best while places, shapes and codes stay. Shape: -> [M, B, C]."""
    splats = coded.splats(fit.grid.height, fit.grid.width)
    conics, index = CHOLESKY.conic(splats.shapes), torch.from_numpy(coded.colours)
    shape = coded.words.shape
    start = index.new_tensor([m * shape[1] for m in range(shape[0])])

    def draw(words: Tensor) -> Tensor:
        return render(splats.centres, conics, words[index + start].sum(1), fit.grid, MODE)

    found = best_colours(draw, coded.words.flatten(0, 1), fit.target, rounds).view(shape)
    drawn = [psnr(draw(words.flatten(0, 1)), fit.target) for words in (found, coded.words)]
    return found if drawn[0] > drawn[1] else coded.words


def _logs(factors: Tensor) -> Tensor:
    """(l11, l21, l22) in the numbers that are quantised."""
    l11, l21, l22 = factors.unbind(1)
    return torch.stack([l11.log(), torch.asinh(l21 / l22), l22.log()], 1)


def _factors(logs: Tensor) -> Tensor:
    l11, l22 = logs[:, 0].exp(), logs[:, 2].exp()
    return torch.stack([l11, logs[:, 1].sinh() * l22, l22], 1)


def _reals(centres: Tensor, height: int, width: int) -> Tensor:
    """x with mu = (tanh(x) + 1) / 2 of width and height."""
    share = 2 * centres / centres.new_tensor([width, height]) - 1
    return torch.atanh(share.clamp(-1 + 1e-6, 1 - 1e-6)).clamp(-_EDGE, _EDGE)


def _centres(reals: Tensor, height: int, width: int) -> Tensor:
    return (torch.tanh(reals) + 1) * reals.new_tensor([width, height]) / 2


def _to_keys(reals: Tensor) -> Ints:
    """Half-precision floats as whole numbers in the same order, 0 and -0 alike."""
    pattern = (reals.half() + 0.0).numpy().view(np.int16).astype(np.int64)
    return np.where(pattern < 0, -(pattern & 0x7FFF), pattern) + _SPAN


def _from_keys(keys: Ints) -> Tensor:
    signed = keys - _SPAN
    pattern = np.where(signed < 0, -signed | 0x8000, signed).astype(np.uint16)
    return torch.from_numpy(pattern.view(np.float16).astype(np.float32))


_SPAN = 0x4400
_TOP, _SHIFT = 2 * _SPAN, 10
"""The half-precision float 4, the key of +4, and the bits of a mantissa, which make a group of places an octave."""


def _plain(coded: Quantised) -> bytes:
    """Every number in its bits, one kind after the other."""
    fields = zip((coded.keys, coded.shapes, coded.colours), _widths(coded), strict=True)
    bits = [(values.ravel()[:, None] >> np.arange(width - 1, -1, -1) & 1).ravel() for values, width in fields]
    return np.packbits(np.concatenate(bits).astype(np.uint8)).tobytes()


def _from_plain(section: Reader, count: int, layout: Quantised) -> Quantised:
    sizes = [(c, w) for c, w in zip((2, 3, len(layout.words)), _widths(layout), strict=True)]
    total = count * sum(columns * width for columns, width in sizes)
    stream = np.unpackbits(section.array("<u1", -(-total // 8)), count=total)
    section.end()
    found, at = [], 0
    for columns, width in sizes:
        part = stream[at : at + count * columns * width].reshape(count, columns, width).astype(np.int64)
        found.append(part @ (1 << np.arange(width - 1, -1, -1, dtype=np.int64)))
        at += part.size
    if found[0].max() > _TOP:
        raise section.error("a place outside the picture")
    return replace(layout, keys=found[0], shapes=found[1], colours=found[2])


def _widths(coded: Quantised) -> tuple[int, int, int]:
    return 16, coded.scale.bits, coded.words.shape[1].bit_length() - 1


def _code(coded: Quantised) -> bytes:
    coder = Encoder()
    put_places(coder, coded.keys, (_TOP, _TOP), _SHIFT)
    for column in coded.shapes.T:
        coder.put_adaptive(column, 1 << coded.scale.bits)
    for column in coded.colours.T:
        coder.put_adaptive(column, coded.words.shape[1])
    return coder.finish()


def _from_code(section: Reader, count: int, layout: Quantised) -> Quantised:
    coder = Decoder(section.rest(), "gaussian-image section 'gaussians'")
    keys = get_places(coder, count, (_TOP, _TOP), _SHIFT, section)
    shapes = [coder.get_adaptive(count, 1 << layout.scale.bits) for _ in range(3)]
    colours = [coder.get_adaptive(count, layout.words.shape[1]) for _ in layout.words]
    coder.end()
    return replace(layout, keys=keys, shapes=np.stack(shapes, 1), colours=np.stack(colours, 1))
