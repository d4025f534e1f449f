"""The codec of predictive sparse decomposition: patches as few whole multiples of learned atoms.

A picture is turned to luminance and two colour differences (these at half size where steps are coarse), every plane is
cut into patches of 8x8, and a patch is rebuilt as

    patch  =  mean  +  step * sum_j z_j atom_j          z_j whole, most of them 0

Encoding is amortised, then iterative: the predictor guesses the codes, a few steps of FISTA improve them, and rounds of
coordinate descent over whole numbers make the best of  |y - step z B|^2 + lambda bits(z).  The one knob is the step.

Decoding is arithmetic on whole numbers (atoms are multiples of 2^-14) until the last scaling, so that it gives the same
pixels everywhere. Section "y" holds the luminance and section "c" the colour; a file cut off between them decodes to
grey. Each is an entropy-coded stream: means by differences, numbers of atoms, gaps between their places, magnitudes,
signs, all but the last with adaptive tables and contexts that the decoder knows (`_walk`, which writes and reads).
"""

import json
import os
from functools import lru_cache
from math import log2
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from foveate.compress.codec import Progress, Size, Window
from foveate.compress.container import Container
from foveate.compress.entropy import Adaptive, Decoder, Encoder, Ints, Table
from foveate.compress.fields import varint
from foveate.compress.predictive_sparse_decomposition import FLOOR, Predictor, fista
from foveate.compress.search import smallest
from foveate.engine.budget import Budget
from foveate.errors import BitstreamError, BudgetError, InputError, WeightsError
from foveate.ops.threads import in_parts
from foveate.weights import FOLDER

SLUG = "predictive-sparse-decomposition"
SIDE = 8
_ONE = 2**14  # what an atom's samples are multiples of
_FINEST, _COARSEST = 1 / 16, 512.0  # steps in 8-bit levels
_HALVED = 4.0  # from this step on, colour is coded at half size
_NAMES = {"weight": "linear.weight", "bias": "linear.bias", "gain": "gain"}  # in the file: in the predictor
_COIN = Table.from_counts([1, 1])
_Floats = npt.NDArray[np.float64]


class Dictionary(NamedTuple):
    """Atoms [m, 64] in whole multiples of 2^-14, the most used first, and the predictor of their codes."""

    atoms: Ints
    predictor: Predictor


@lru_cache(maxsize=1)
def dictionary() -> Dictionary:
    """The dictionary that comes with foveate (recipes/sparse_patches.py).

    Raises: WeightsError when it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(FOLDER / f"{SLUG}.safetensors")
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"the weights of {SLUG} cannot be read: {error}; install foveate anew.") from error
    predictor = Predictor(SIDE * SIDE, len(tensors["atoms"]))
    predictor.load_state_dict({key: tensors[name].float() for name, key in _NAMES.items()})
    return Dictionary(tensors["atoms"].numpy().astype(np.int64), predictor.eval())


def save_weights(atoms: Tensor, predictor: Predictor, order: Tensor, card: dict[str, Any], folder: Path) -> None:
    """Write dictionary and predictor, each to a temporary name first.

    Args:
        atoms: of unit norm, in the order to be kept. Shape: [m, 64].
        order: which of the predictor's codes is the code of each atom.
        card: how they were made.
    """
    from safetensors.torch import save_file

    state = predictor.state_dict()
    tensors = {name: state[key][order].half().contiguous() for name, key in _NAMES.items()}
    part = folder / f"{SLUG}.part"
    save_file({"atoms": (atoms * _ONE).round().to(torch.int16), **tensors}, part)
    os.replace(part, folder / f"{SLUG}.safetensors")
    part.write_text(json.dumps({"system": SLUG, **card}, indent=2) + "\n")
    os.replace(part, folder / f"{SLUG}.json")


class SparsePatches:
    """Compress pictures by sparse codes of their patches.

    Args:
        steps: of FISTA after the prediction.
        sweeps: rounds of coordinate descent over whole numbers.
        price: lambda of a bit, in squared steps; larger ones give smaller files of lower quality at the same step.

    Raises: InputError when one is negative.
    """

    slug: ClassVar[str] = SLUG
    planes: ClassVar[tuple[int, ...]] = (1, 3)
    units: ClassVar[tuple[str, ...]] = ("bytes",)
    any_size: ClassVar[bool] = False
    random_access: ClassVar[bool] = False

    def __init__(self, steps: int = 20, sweeps: int = 4, price: float = 0.12) -> None:
        if min(steps, sweeps, price) < 0:
            raise InputError(f"steps={steps}, sweeps={sweeps}, price={price} are 0 or more; change the negative one.")
        self.steps, self.sweeps, self.price = steps, sweeps, price

    def encode(
        self, image: Tensor, *, bits: int = 8, budget: Budget | None = None, progress: Progress | None = None
    ) -> Container:
        """See `foveate.compress.codec.Codec`; 12.5 levels of 255 is the step without a budget."""
        if budget is None:
            return self.at_step(image, 12.5, bits)

        def attempt(step: float, _: Progress) -> tuple[Container, float]:
            container = self.at_step(image, step, bits)
            return container, -float(len(container.to_bytes()))

        def report(share: float, _: float | None) -> bool | None:
            return progress(share, None) if progress else None

        try:  # the finest step whose file is small enough
            return smallest(attempt, -budget.amount, _FINEST, _COARSEST, report, close=budget.amount / 100)
        except BudgetError:
            least = -attempt(_COARSEST, lambda *_: None)[1]
            if least <= budget.amount:
                return self.at_step(image, _COARSEST, bits)
            message = f"{SLUG} needs at least {least:.0f} bytes for this picture, the budget is {budget}; give more."
            raise BudgetError(message) from None

    def encode_to(self, image: Tensor, quality: float, *, bits: int = 8, progress: Progress | None = None) -> Container:
        """The coarsest step that reaches a PSNR in dB."""
        from foveate.compress.verbs import measured

        def attempt(fineness: float, _: Progress) -> tuple[Container, float]:
            container = self.at_step(image, 1 / fineness, bits)
            return container, measured(self.decode(container), image, bits)

        return smallest(attempt, quality, 1 / _COARSEST, 1 / _FINEST, progress, SLUG)

    def at_step(self, image: Tensor, step: float, bits: int = 8) -> Container:
        """Compress at a step, in levels of 255."""
        units = max(1, round(256 * step))
        height, width = image.shape[2:]
        halved = units >= 256 * _HALVED
        sections = {"head": varint(units, int(halved))}
        luminance, *colour = _to_planes(image[0].double().numpy() * 255, halved)
        sections["y"] = self._encoded([luminance], units)
        if colour:
            sections["c"] = self._encoded(colour, units)
        return Container(SLUG, width, height, image.shape[1], sections, bits)

    def _encoded(self, planes: list[_Floats], units: int) -> bytes:
        stream = _Writer()
        for plane in planes:
            patches, grid = _cut(plane)
            means = np.rint(8 * 256 / units * patches.mean(1)).astype(np.int64)
            codes = self._codes(patches - means[:, None] * (units / 2048), units / 256)
            _walk(stream, *grid, means, codes)
        return stream.coder.finish()

    def _codes(self, patches: _Floats, step: float) -> Ints:
        """Whole codes [P, m] of patches [P, 64] without their means, in levels of 255."""
        atoms, predictor = dictionary()
        y, basis = torch.from_numpy(patches).float(), torch.from_numpy(atoms / _ONE).float()
        with torch.no_grad():
            spread = y.square().mean(1, keepdim=True).sqrt() + 255 * FLOOR
            start = predictor(y / spread) * spread
            soft = fista(y, basis, step, start=start, steps=self.steps)
        gram = (basis @ basis.T).contiguous().numpy()
        codes = (soft / step).round().numpy().astype(np.int32)
        left = ((y - torch.from_numpy(codes).float() * step @ basis) @ basis.T / step).contiguous().numpy()
        refine = _kernel()
        in_parts(lambda i, j: refine(codes, left, gram, np.float32(self.price), self.sweeps, i, j), len(codes))
        return codes.astype(np.int64)

    def decode(self, container: Container, size: Size | None = None, window: Window | None = None) -> Tensor:
        """See `foveate.compress.codec.Codec`; without its section "c", a file in colour gives grey."""
        head = container.section("head")
        units, halved = head.varint(least=1, most=2**17), bool(head.varint(most=1))
        head.end()
        height, width = container.height, container.width
        planes = self._decoded(container, "y", [(height, width)], units)
        if container.channels == 3:
            small = (-(-height // 2), -(-width // 2)) if halved else (height, width)
            if "c" in container.missing:
                planes *= 3
            else:
                colour = self._decoded(container, "c", [small, small], units)
                planes = _to_rgb(planes[0], *(_doubled(c, height, width) if halved else c for c in colour))
        whole = torch.from_numpy(np.stack(planes)[None] / 255).float().clamp(0, 1)
        x, y, w, h = window or (0, 0, width, height)
        return whole[..., y : y + h, x : x + w]

    def _decoded(self, container: Container, name: str, sizes: list[tuple[int, int]], units: int) -> list[_Floats]:
        atoms = dictionary().atoms
        stream = _Reader(Decoder(container.section(name).rest(), f"{SLUG} section {name!r}"))
        planes = []
        for height, width in sizes:
            rows, columns = -(-height // SIDE), -(-width // SIDE)
            means, codes = np.zeros(rows * columns, np.int64), np.zeros((rows * columns, len(atoms)), np.int64)
            _walk(stream, rows, columns, means, codes)
            # Whole numbers below 2^53 all along: exact in any order of summation.
            values = (codes.astype(np.float64) @ atoms.astype(np.float64) + means[:, None] * (_ONE // 8)) * units
            patches = values / (256 * _ONE)
            tiled = patches.reshape(rows, columns, SIDE, SIDE).swapaxes(1, 2).reshape(rows * SIDE, columns * SIDE)
            planes.append(tiled[:height, :width])
        stream.coder.end()
        return planes


class _Writer:
    """Put symbols into a stream, and give them back."""

    def __init__(self) -> None:
        self.coder = Encoder()

    def adaptive(self, values: Ints, model: Adaptive, context: Ints) -> Ints:
        self.coder.put_adaptive(values, model, context)
        return values

    def plain(self, values: Ints, table: Table) -> Ints:
        self.coder.put(values, table)
        return values


class _Reader:
    """Take symbols out of a stream, whatever is in the arrays that are passed."""

    def __init__(self, coder: Decoder) -> None:
        self.coder = coder

    def adaptive(self, values: Ints, model: Adaptive, context: Ints) -> Ints:
        return self.coder.get_adaptive(values.size, model, context)

    def plain(self, values: Ints, table: Table) -> Ints:
        return self.coder.get(values.size, table)


def _walk(stream: _Writer | _Reader, rows: int, columns: int, means: Ints, codes: Ints) -> None:
    """Write means [P] and codes [P, m], or fill them from the stream: one order for both."""
    atoms = codes.shape[1]
    model = Adaptive(21, 9)
    differences = np.diff(means.reshape(rows, columns), axis=1, prepend=0)
    differences[:, 0] = np.diff(differences[:, 0], prepend=0)
    above = np.zeros(columns, np.int64)
    for row in differences:
        row[:] = _numbers(stream, np.where(row >= 0, 2 * row, -2 * row - 1), model, np.minimum(_class(above), 8))
        above = row.copy()
        row[:] = np.where(row % 2 == 0, row >> 1, -(row >> 1) - 1)
    differences[:, 0] = differences[:, 0].cumsum()
    means[:] = differences.cumsum(1).reshape(-1)

    model = Adaptive(atoms + 1, 10)
    counts = (codes != 0).sum(1).reshape(rows, columns)
    above = np.full(columns, -1)
    for row in counts:
        row[:] = stream.adaptive(row, model, np.where(above < 0, 9, np.minimum(_class(above), 8)))
        above = row
    counts = counts.reshape(-1)

    member = np.repeat(np.arange(counts.size), counts)
    rank = np.arange(member.size) - np.repeat(counts.cumsum() - counts, counts)
    place = np.nonzero(codes)[1] if isinstance(stream, _Writer) else np.zeros(member.size, np.int64)
    model, last = Adaptive(atoms, 45), np.full(counts.size, -1)
    for layer in range(int(counts.max())):
        here = np.flatnonzero(rank == layer)
        owner = member[here]
        context = 9 * np.minimum(_class(counts[owner] - layer), 5) - 9 + _class(last[owner] + 1)
        last[owner] += 1 + stream.adaptive(place[here] - last[owner] - 1, model, np.minimum(context, 44))
        if (last >= atoms).any():
            raise BitstreamError(f"The file is damaged ({SLUG}: an atom beyond the last); get a fresh copy.")
        place[here] = last[owner]
    values = codes[member, place]
    context = 5 * np.minimum(_class(place), 7) + np.minimum(_class(counts[member]), 5) - 1
    magnitudes = _numbers(stream, np.abs(values) - 1, Adaptive(21, 40), context)
    signs = stream.plain((values < 0).astype(np.int64), _COIN)
    codes[member, place] = (magnitudes + 1) * (1 - 2 * signs)


def _numbers(stream: _Writer | _Reader, values: Ints, model: Adaptive, context: Ints) -> Ints:
    """Numbers from 0 below 2^20: the number of binary digits by an adaptive table, the digits after the first as is."""
    digits = stream.adaptive(_class(values), model, context)
    result = np.where(digits > 0, 1 << np.maximum(digits - 1, 0), 0)
    for more in range(int(digits.max(initial=0)) - 1, 0, -1):
        having = np.flatnonzero(digits > more)
        bit = stream.plain(values[having] >> (more - 1) & 1, _COIN)
        result[having] |= bit << (more - 1)
    return result


def _class(values: Ints) -> Ints:
    """Number of binary digits; 0 for 0 and for what is not there yet."""
    return np.frexp(np.maximum(values, 0).astype(np.float64))[1].astype(np.int64)


def _cut(plane: _Floats) -> tuple[_Floats, tuple[int, int]]:
    """Patches [P, 64] of a plane, its edges repeated to whole patches, and (rows, columns) of patches."""
    rows, columns = -(-plane.shape[0] // SIDE), -(-plane.shape[1] // SIDE)
    beyond = ((0, rows * SIDE - plane.shape[0]), (0, columns * SIDE - plane.shape[1]))
    whole = np.pad(plane, beyond, mode="edge")
    patches = whole.reshape(rows, SIDE, columns, SIDE).swapaxes(1, 2).reshape(-1, SIDE * SIDE)
    return np.ascontiguousarray(patches), (rows, columns)


def _to_planes(picture: _Floats, halved: bool) -> list[_Floats]:
    """[n, H, W] in 0..255 -> luminance, and for colour its differences to blue and red about 0 (BT.601, full range)."""
    if len(picture) == 1:
        return [picture[0]]
    r, g, b = picture
    y = 0.299 * r + 0.587 * g + 0.114 * b
    colour = [(b - y) / 1.772, (r - y) / 1.402]
    return [y, *(_half(c) if halved else c for c in colour)]


def _to_rgb(y: _Floats, cb: _Floats, cr: _Floats) -> list[_Floats]:
    r, b = y + 1.402 * cr, y + 1.772 * cb
    return [r, (y - 0.299 * r - 0.114 * b) / 0.587, b]


def _half(plane: _Floats) -> _Floats:
    even = np.pad(plane, ((0, plane.shape[0] % 2), (0, plane.shape[1] % 2)), mode="edge")
    return (even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]) / 4


def _doubled(plane: _Floats, height: int, width: int) -> _Floats:
    """Twice the size, each sample three parts the nearest and one part the next."""
    for axis in (0, 1):
        before = np.concatenate([plane.take([0], axis), plane.take(range(plane.shape[axis] - 1), axis)], axis)
        after = np.concatenate([plane.take(range(1, plane.shape[axis]), axis), plane.take([-1], axis)], axis)
        pair = np.stack([0.75 * plane + 0.25 * before, 0.75 * plane + 0.25 * after], axis + 1)
        plane = pair.reshape(-1, plane.shape[1]) if axis == 0 else pair.reshape(len(plane), -1)
    return plane[:height, :width]


@lru_cache(maxsize=1)
def _kernel() -> Any:
    """Coordinate descent over whole codes, compiled when first used."""
    from numba import njit

    fixed = 4.5  # bits for a place and a sign
    costs = np.array([0.0] + [fixed + 2 * log2(v) for v in range(1, 256)], np.float32)

    @njit(nogil=True, cache=True, fastmath=True)
    def refine(codes: Any, left: Any, gram: Any, price: Any, sweeps: int, first: int, last: int) -> None:
        for p in range(first, last):
            for _ in range(sweeps):
                changed = False
                for j in range(codes.shape[1]):
                    wish = codes[p, j] + left[p, j]
                    near = int(np.rint(wish))
                    best, least = 0, wish * wish
                    for value in (near, near - (1 if near > 0 else -1)):
                        if value != 0:
                            cost = (value - wish) ** 2 + price * costs[min(abs(value), 255)]
                            if cost < least:
                                best, least = value, cost
                    if best != codes[p, j]:
                        change = best - codes[p, j]
                        for i in range(codes.shape[1]):
                            left[p, i] -= change * gram[j, i]
                        codes[p, j] = best
                        changed = True
                if not changed:
                    break

    return refine
