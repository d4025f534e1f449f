"""The codec of the quantised global autoencoder: windows of a picture as global tokens, as many as each deserves.

Elsner et al. 2024, "Quantised Global Autoencoder: A Holistic Approach to Representing Visual Data", arXiv:2407.11913.

The network (`foveate.compress.global_tokens`) takes squares of one size. A picture of any size is covered by windows of
32x32 that share a margin with their neighbours, where they are cross-faded; small pictures are continued by their edge.
A window is C tokens of K words. As training has sorted them by importance, a prefix of t tokens is a coarser window,
and every window keeps its own t of `LEVELS`, the one that minimises

    squared error + price * bits        bits by the coder's tables, one for each token's place; price the one knob

Section "head" holds margin and t of each window, by adaptive tables whose context is the window before in the direction
in which there are fewer windows. Sections "t0" to
"t3" hold the tokens up to the 4th, 16th, 32nd and last; a file cut off between them is a coarser picture.

Words are chosen in single precision and drawn in double, rounded to 2^-16 in the end, so that neither the number of
threads nor what is decoded together shows.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.compress.codec import Progress, Size, Window
from foveate.compress.container import Container
from foveate.compress.entropy import TOTAL, Adaptive, Decoder, Encoder, Ints, Table
from foveate.compress.fields import varint
from foveate.compress.global_tokens import GlobalAutoencoder
from foveate.compress.search import smallest
from foveate.engine.budget import Budget
from foveate.errors import BudgetError, InputError, WeightsError
from foveate.weights import FOLDER

SLUG = "quantised-global-autoencoder"
LEVELS = (2, 4, 8, 16, 24, 32, 48, 64)
"""Numbers of tokens that a window may keep."""

PRICE = 0.005
"""Of a bit, in squared error of samples in 0..1; without a budget."""

_PARTS = (0, 4, 16, 32, 64)  # section i holds tokens _PARTS[i] to _PARTS[i + 1]
_LEAST, _MOST = 1e-6, 100.0  # prices
_BATCH, _FINE = 64, 2**16
_WINDOWS = 2**21  # in a picture


class Trained(NamedTuple):
    """A network in single and in double precision, and tables of its tokens."""

    network: GlobalAutoencoder
    exact: GlobalAutoencoder
    tables: tuple[Table, ...]


@lru_cache(maxsize=1)
def trained() -> Trained:
    """What comes with foveate (recipes/global_tokens.py).

    Raises: WeightsError when it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((FOLDER / f"{SLUG}.json").read_text())["config"]
        tensors = load_file(FOLDER / f"{SLUG}.safetensors")
        counts = tensors.pop("counts")
        networks = [GlobalAutoencoder(**config).to(dtype).eval() for dtype in (torch.float32, torch.float64)]
        for network in networks:
            network.load_state_dict(tensors)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"the weights of {SLUG} cannot be read: {error}; install foveate anew.") from error
    tables = tuple(Table.from_counts(row) for row in 16 * counts.numpy().astype(np.int64) + 1)
    return Trained(networks[0], networks[1], tables)


def save_weights(network: GlobalAutoencoder, counts: Tensor, card: dict[str, Any], folder: Path = FOLDER) -> None:
    """Write a network in half precision, how often each word was chosen, and a card; under temporary names first.

    Args:
        network: its configuration is `card["config"]`.
        counts: of each word of each token, [C, K].
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.half().contiguous() for name, value in network.state_dict().items()}
    part = folder / f"{SLUG}.part"
    save_file({**tensors, "counts": counts.to(torch.int32)}, part)
    os.replace(part, folder / f"{SLUG}.safetensors")
    part.write_text(json.dumps({"system": SLUG, **card}, indent=2) + "\n")
    os.replace(part, folder / f"{SLUG}.json")


@dataclass(frozen=True)
class Cover:
    """Windows of `size` x `size` over a picture, row by row, neighbours sharing at least 2 `margin` pixels.

    Raises: InputError for more windows than there is room for, which only a very thin picture has.

    >>> Cover(32, 60, 32, 2).columns
    (0, 28)
    """

    height: int
    width: int
    size: int
    margin: int

    def __post_init__(self) -> None:
        count = (self._gaps(self.height) + 1) * (self._gaps(self.width) + 1)
        if count > _WINDOWS:
            raise InputError(f"{self.width}x{self.height} pixels are {count} windows, above {_WINDOWS}; cut it up.")

    @property
    def rows(self) -> tuple[int, ...]:
        """Where windows begin, from the top."""
        return self._starts(self.height)

    @property
    def columns(self) -> tuple[int, ...]:
        """Where windows begin, from the left."""
        return self._starts(self.width)

    def cut(self, picture: Tensor) -> Tensor:
        """All windows; beyond a small picture its edge goes on. Shape: [n, H, W] -> [rows columns, n, size, size]."""
        below, beside = max(0, self.size - self.height), max(0, self.size - self.width)
        wide = F.pad(picture[None], (0, beside, 0, below), mode="replicate")[0]
        return torch.stack([wide[:, y : y + self.size, x : x + self.size] for y in self.rows for x in self.columns])

    def shares(self, starts: Sequence[int]) -> Tensor:
        """What share of a pixel along one axis each window gives: ramps where windows overlap; they sum to 1.

        Shape: [windows, size] in float64.
        """
        at = torch.arange(self.size, dtype=torch.float64) + 0.5
        ramps = []
        for i, start in enumerate(starts):
            ramp = torch.ones_like(at)
            if i:
                ramp = (at / max(1, starts[i - 1] + self.size - start)).clamp_max(1)
            if i + 1 < len(starts):
                ramp = torch.minimum(ramp, (self.size - at) / max(1, start + self.size - starts[i + 1]))
            ramps.append(ramp)
        total = torch.zeros(starts[-1] + self.size, dtype=torch.float64)
        for start, ramp in zip(starts, ramps, strict=True):
            total[start : start + self.size] += ramp
        return torch.stack([r / total[s : s + self.size] for s, r in zip(starts, ramps, strict=True)])

    def _starts(self, length: int) -> tuple[int, ...]:
        gaps = self._gaps(length)
        return tuple(i * (length - self.size) // max(1, gaps) for i in range(gaps + 1))

    def _gaps(self, length: int) -> int:
        return ceil(max(0, length - self.size) / (self.size - 2 * self.margin))


class Plan(NamedTuple):
    """A picture's tokens, and what each level of each window costs and leaves.

    Attributes:
        cover: its windows.
        codes: [N, C] int64.
        lost: squared error, [N, levels].
        bits: [N, levels].
    """

    cover: Cover
    codes: Ints
    lost: Tensor
    bits: Tensor


class QuantisedGlobalAutoencoder:
    """Compress pictures by global tokens of overlapping windows, at 0.03 to 0.5 bits per pixel.

    Args:
        margin: pixels of a window's edge that are cross-faded with the next window's, 0 to 8; more of them hide seams
            better and need more windows.

    Raises: InputError for another margin.
    """

    slug: ClassVar[str] = SLUG
    planes: ClassVar[tuple[int, ...]] = (3,)
    units: ClassVar[tuple[str, ...]] = ("bytes",)
    any_size: ClassVar[bool] = False
    random_access: ClassVar[bool] = True

    def __init__(self, margin: int = 2) -> None:
        if margin not in range(9):
            raise InputError(f"margin is a whole number from 0 to 8, got {margin!r}.")
        self.margin = margin

    def encode(
        self, image: Tensor, *, bits: int = 8, budget: Budget | None = None, progress: Progress | None = None
    ) -> Container:
        """See `foveate.compress.codec.Codec`; at `PRICE` without a budget."""
        plan = self.plan(image, progress)
        if budget is None:
            return self.at_price(plan, PRICE, bits)

        def attempt(price: float, _: Progress) -> tuple[Container, float]:
            container = self.at_price(plan, price, bits)
            return container, -float(len(container.to_bytes()))

        try:  # the lowest price whose file is small enough
            return smallest(attempt, -budget.amount, _LEAST, _MOST, tries=16, close=budget.amount / 200)
        except BudgetError:
            least = -attempt(_MOST, lambda *_: None)[1]
            if least <= budget.amount:
                return self.at_price(plan, _MOST, bits)
            message = f"{SLUG} needs at least {least:.0f} bytes for this picture, the budget is {budget}; give more."
            raise BudgetError(message) from None

    def encode_to(self, image: Tensor, quality: float, *, bits: int = 8, progress: Progress | None = None) -> Container:
        """The highest price that reaches a PSNR in dB."""
        from foveate.compress.verbs import measured

        plan = self.plan(image, None)

        def attempt(thrift: float, _: Progress) -> tuple[Container, float]:
            container = self.at_price(plan, 1 / thrift, bits)
            return container, measured(self.decode(container), image, bits)

        return smallest(attempt, quality, 1 / _MOST, 1 / _LEAST, progress, SLUG)

    @torch.inference_mode()
    def plan(self, image: Tensor, progress: Progress | None = None) -> Plan:
        """Choose words, and try every level of every window; when stopped, windows not tried count as average."""
        network, _, tables = trained()
        cover = Cover(image.shape[2], image.shape[3], network.size, self.margin)
        windows = cover.cut(image[0].float())
        codes = torch.cat([network.encode(part) for part in windows.split(_BATCH)])
        down, across = cover.shares(cover.rows), cover.shares(cover.columns)
        lost = torch.zeros(len(codes), len(LEVELS))
        for start in range(0, len(codes), _BATCH):
            index = torch.arange(start, min(start + _BATCH, len(codes)))
            share = down[index // len(across), :, None] * across[index % len(across), None]
            for i, level in enumerate(LEVELS):
                missed = (network.decode(codes[index], level).clamp(0, 1) - windows[index]).square().sum(1)
                lost[index, i] = (missed * share).sum((1, 2)).float()
            done = start + len(index)
            if progress and progress(done / len(codes), None):
                lost[done:] = lost[:done].mean(0)
                break
        price = torch.tensor(np.stack([np.log2(TOTAL / table.frequencies) for table in tables]), dtype=torch.float32)
        spent = price.gather(1, codes.T).cumsum(0)[[level - 1 for level in LEVELS]].T
        return Plan(cover, codes.numpy(), lost, spent)

    def at_price(self, plan: Plan, price: float, bits: int = 8) -> Container:
        """The file in which a bit is worth so much squared error."""
        level = (plan.lost + price * plan.bits).argmin(1).numpy().astype(np.int64)
        coder = Encoder()
        model, context = _model()
        for line in _lines(level, plan.cover):
            coder.put_adaptive(line, model, np.broadcast_to(context, line.shape))
            context = line
        sections = {"head": varint(plan.cover.margin) + coder.finish()}
        for name, first, last in _parts():
            kept, place = _present(level, first, last)
            coder = Encoder()
            coder.put_indexed(plan.codes[:, first:last][kept], trained().tables, place)
            sections[name] = coder.finish()
        return Container(SLUG, plan.cover.width, plan.cover.height, 3, sections, bits)

    @torch.inference_mode()
    def decode(self, container: Container, size: Size | None = None, window: Window | None = None) -> Tensor:
        """See `foveate.compress.codec.Codec`; without the later of its sections, a file gives a coarser picture."""
        cover, codes, kept = self._read(container)
        x, y, w, h = window or (0, 0, container.width, container.height)
        rows, columns = _touched(cover.rows, cover.size, y, h), _touched(cover.columns, cover.size, x, w)
        index = (rows[:, None] * len(cover.columns) + columns).reshape(-1)
        down, across = cover.shares(cover.rows), cover.shares(cover.columns)
        # Windows reach over the edge of what is asked for: room for a whole one on either side.
        canvas = torch.zeros(3, h + 2 * cover.size, w + 2 * cover.size, dtype=torch.float64)
        network = trained().exact
        for part in np.split(index, range(_BATCH, len(index), _BATCH)):
            drawn = network.decode(torch.from_numpy(codes[part].astype(np.int64)), torch.from_numpy(kept[part]))
            for one, place in zip(drawn.clamp(0, 1), part.tolist(), strict=True):
                i, j = divmod(place, len(cover.columns))
                top, left = cover.rows[i] - y + cover.size, cover.columns[j] - x + cover.size
                where = canvas[:, top : top + cover.size, left : left + cover.size]
                where += one * down[i, :, None] * across[j]
        inside = canvas[None, :, cover.size : cover.size + h, cover.size : cover.size + w]
        return ((inside * _FINE).round() / _FINE).float()

    def _read(self, container: Container) -> tuple[Cover, Ints, Ints]:
        """Windows, their tokens [N, C] and how many of them are there [N]."""
        network, _, tables = trained()
        head = container.section("head")
        cover = Cover(container.height, container.width, network.size, head.varint(most=8))
        level = np.zeros(len(cover.rows) * len(cover.columns), np.int64)
        coder = Decoder(head.rest(), f"{SLUG} section 'head'")
        model, context = _model()
        for line in _lines(level, cover):
            line[:] = context = coder.get_adaptive(line.size, model, np.broadcast_to(context, line.shape))
        coder.end()
        codes: Any = np.zeros((level.size, network.tokens), np.int16)
        most = network.tokens
        for name, first, last in _parts():
            if name in container.missing and first > 0:
                most = first
                break
            kept, place = _present(level, first, last)
            coder = Decoder(container.section(name).rest(), f"{SLUG} section {name!r}")
            codes[:, first:last][kept] = coder.get_indexed(tables, place)
            coder.end()
        return cover, codes, np.minimum(np.array(LEVELS)[level], most)


def _parts() -> list[tuple[str, int, int]]:
    """Name, first and last token of every section."""
    return [(f"t{i}", first, last) for i, (first, last) in enumerate(pairwise(_PARTS))]


def _present(level: Ints, first: int, last: int) -> tuple[npt.NDArray[np.bool_], Ints]:
    """Which tokens first..last - 1 of each window are there [N, last - first], and the places of those that are."""
    kept = np.arange(first, last) < np.array(LEVELS)[level][:, None]
    return kept, first + np.nonzero(kept)[1].astype(np.int64)


def _model() -> tuple[Adaptive, Ints]:
    """What is learned about levels, and the context of the first line, which has none before."""
    return Adaptive(len(LEVELS), len(LEVELS) + 1), np.array([len(LEVELS)])


def _lines(level: Ints, cover: Cover) -> Ints:
    """Levels as few long lines, a view."""
    grid = level.reshape(len(cover.rows), len(cover.columns))
    return grid if grid.shape[0] <= grid.shape[1] else grid.T


def _touched(starts: Sequence[int], size: int, first: int, length: int) -> Ints:
    """Windows along one axis that reach into first .. first + length - 1."""
    begins = np.array(starts)
    return np.flatnonzero((begins < first + length) & (begins + size > first))
