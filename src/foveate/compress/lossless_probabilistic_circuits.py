"""Lossless compression with probabilistic circuits: every bit by an exact conditional of a tractable model.

Liu, Mandt, Van den Broeck 2022, arXiv:2111.11632.

An arithmetic coder needs P(x_i | x_1 .. x_{i-1}) for every variable of a patch. A hidden Chow-Liu tree
(`foveate.compress.circuit`) gives it exactly, and in coding order at the cost of a few messages instead of a pass.

    pixels -> residuals     foveate.compress.blended_prediction, a byte each
    residuals -> bits       foveate.compress.circuit_coding, patches of 4x4 given two pixels around them

The paper models raw pixels of whole small pictures, or latents of a flow. Here a fixed predictor stands in for the
flow, and pictures of any size are patches in sequence, each conditioned on what is decoded around it: evidence costs a
circuit no more than its own pass. Three circuits are shipped, for grey, photographs and small pictures; the encoder
tries those that fit and names the best in the file.

All of it is whole-number arithmetic in one order, with whole numbers read from the weights, so that files decode to the
same pixels on any machine and number of threads. Pictures are cut into strips of 128 rows that know nothing of each
other: these are coded side by side, and a window decodes only the strips it lies in.

Samples of 16 bits are two bytes: the upper ones are a picture of 8 bits; the lower ones are mostly noise, for which
`foveate.compress.low_bytes` is enough. Float samples are four bytes in the same manner, and exact too.
"""

import json
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from foveate.compress import low_bytes
from foveate.compress.blended_prediction import to_pixels, to_symbols
from foveate.compress.circuit_coding import FixedCircuit
from foveate.compress.codec import Progress, Size, Window
from foveate.compress.container import Container
from foveate.compress.entropy import Ints
from foveate.compress.fields import Reader, varint
from foveate.engine.budget import Budget
from foveate.errors import InputError, WeightsError
from foveate.ops.threads import in_parts
from foveate.weights import FOLDER

SLUG = "lossless-probabilistic-circuits"
CIRCUITS = ("grey", "photo", "thumbnail")
"""What is shipped; the place in it is what a file names."""

STRIP = 128
_TENSORS = ("places", "parents", "prior", "transitions", "emissions")
_ONE = 0x3F800000  # the bits of 1.0
S = TypeVar("S")
T = TypeVar("T")


@lru_cache(maxsize=len(CIRCUITS))
def circuit(name: str) -> FixedCircuit:
    """A circuit that comes with foveate (recipes/circuits.py): "grey", "photo" or "thumbnail".

    Raises: WeightsError when it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(FOLDER / f"{SLUG}-{name}.safetensors")
        return FixedCircuit(*(tensors[part] for part in _TENSORS))
    except (OSError, SafetensorError, KeyError, InputError) as error:
        raise WeightsError(f"the weights {SLUG}-{name} cannot be read: {error}; install foveate anew.") from error


def save_circuit(made: FixedCircuit, name: str, card: dict[str, Any], folder: Path) -> None:
    """Write a circuit and the card that says how it was made, each to a temporary name first."""
    from safetensors.numpy import save_file

    part = folder / f"{SLUG}-{name}.part"
    save_file({key: np.ascontiguousarray(getattr(made, key)) for key in _TENSORS}, part)
    os.replace(part, part.with_suffix(".safetensors"))
    part.write_text(json.dumps({"system": SLUG, **card}, indent=2) + "\n")
    os.replace(part, part.with_suffix(".json"))


class CircuitCodec:
    """Compress pictures without loss by probabilistic circuits.

    Args:
        name: the circuit to use, of `CIRCUITS`; the best of those that fit when None.

    Raises: InputError for an unknown name.
    """

    slug: ClassVar[str] = SLUG
    planes: ClassVar[tuple[int, ...]] = (1, 3)
    units: ClassVar[tuple[str, ...]] = ()
    any_size: ClassVar[bool] = False
    random_access: ClassVar[bool] = True

    def __init__(self, name: str | None = None) -> None:
        if name is not None and name not in CIRCUITS:
            raise InputError(f"there is no circuit {name!r}; use one of {', '.join(CIRCUITS)}.")
        self.name = name

    def encode(
        self, image: Tensor, *, bits: int = 8, budget: Budget | None = None, progress: Progress | None = None
    ) -> Container:
        """See `foveate.compress.codec.Codec`; it is lossless, so that there is nothing to steer or to stop."""
        strips = _cut(_whole(image, bits))
        _, channels, height, width = image.shape
        names = [name for name in CIRCUITS if circuit(name).channels == channels]
        if self.name is not None and self.name not in names:
            raise InputError(f"the circuit {self.name!r} is not made for {channels} channels; use {', '.join(names)}.")
        symbols = _each(to_symbols, [(strip >> (bits - 8)).astype(np.uint8) for strip in strips])
        trial = symbols[len(symbols) // 2]
        chosen = self.name or min(names, key=lambda name: len(circuit(name).encode(trial)))
        if progress:
            progress(0.2, None)
        upper = _packed(_each(circuit(chosen).encode, symbols))
        sections = {"circuit": bytes([CIRCUITS.index(chosen)]) + upper}
        for depth in range(bits - 16, -1, -8):
            sections[f"low{depth}"] = _packed(_each(low_bytes.encode, [strip >> depth for strip in strips]))
        if progress:
            progress(1.0, None)
        return Container(SLUG, width, height, channels, sections, bits)

    def decode(self, container: Container, size: Size | None = None, window: Window | None = None) -> Tensor:
        """See `foveate.compress.codec.Codec`."""
        x, y, w, h = window or (0, 0, container.width, container.height)
        first, last = y // STRIP, (y + h - 1) // STRIP
        count, bits = -(-container.height // STRIP), container.bits
        section = container.section("circuit")
        place = section.byte()
        if place >= len(CIRCUITS) or circuit(CIRCUITS[place]).channels != container.channels:
            raise section.error(f"a circuit {place} for {container.channels} channels")
        used, upper = circuit(CIRCUITS[place]), _unpacked(section, count)
        lower = [_unpacked(container.section(f"low{depth}"), count) for depth in range(bits - 16, -1, -8)]

        def strip(i: int) -> Ints:
            rows = min(STRIP, container.height - i * STRIP)
            samples = to_pixels(used.decode(upper[i], rows, container.width)).astype(np.int64)
            for data in lower:
                samples = low_bytes.decode(data[i], samples)
            return samples[..., x : x + w]

        whole = np.concatenate(_each(strip, range(first, last + 1)), 1)[:, y - first * STRIP :][:, :h]
        if bits == 32 and whole.max() > _ONE:
            raise section.error("a sample above 1")
        return _image(whole, bits)


def _each(fn: Callable[[S], T], items: Sequence[S]) -> list[T]:
    """fn of every item, on as many threads as PyTorch uses."""
    found: dict[int, T] = {}

    def run(start: int, stop: int) -> None:
        for i in range(start, stop):
            found[i] = fn(items[i])

    in_parts(run, len(items), least=1)
    return [found[i] for i in range(len(items))]


def _packed(parts: list[bytes]) -> bytes:
    return varint(*map(len, parts)) + b"".join(parts)


def _unpacked(section: Reader, count: int) -> list[bytes]:
    lengths = [section.varint(most=section.left) for _ in range(count)]
    parts = [section.take(length) for length in lengths]
    section.end()
    return parts


def _cut(whole: Ints) -> list[Ints]:
    return [whole[:, top : top + STRIP] for top in range(0, whole.shape[1], STRIP)]


def _whole(image: Tensor, bits: int) -> Ints:
    """Samples as whole numbers; of floats, their bits, which rise as they do."""
    if bits == 32:
        return image[0].contiguous().view(torch.int32).numpy().astype(np.int64) & 0x7FFFFFFF
    return (image[0].double() * (2**bits - 1)).round().long().numpy()


def _image(whole: Ints, bits: int) -> Tensor:
    if bits == 32:
        return torch.from_numpy(whole.astype(np.uint32).view(np.float32))[None]
    return torch.from_numpy(np.divide(whole, 2**bits - 1, dtype=np.float32))[None]
