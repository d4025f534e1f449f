"""Alpha beside a codec that knows only colour: lossless, rows differenced, then bzip2.

A flat plane of any size takes some 50 bytes. What the bytes unpack to is bounded by the picture's size beforehand.
"""

import bz2
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveate.compress.container import Container

SECTION = "alpha"
_TYPES: dict[int, np.dtype[Any]] = {8: np.dtype("u1"), 16: np.dtype("<u2")}


def pack(alpha: Tensor, bits: int) -> bytes:
    """Compress a plane [1, 1, H, W] in 0..1 to 8 or 16 bits a sample (16 for float pictures)."""
    kind = _TYPES[min(bits, 16)]
    values = (alpha[0, 0].double() * np.iinfo(kind).max).round().numpy().astype(kind)
    return bz2.compress(np.diff(values, axis=0, prepend=kind.type(0)).tobytes())


def unpack(container: Container) -> Tensor:
    """The plane [1, 1, H, W] of a container in 0..1; opaque where a file cut off does not hold it.

    Raises: BitstreamError when the section holds something else.
    """
    h, w = container.height, container.width
    if SECTION in container.missing:
        return torch.ones(1, 1, h, w)
    kind = _TYPES[min(container.bits, 16)]
    size = h * w * kind.itemsize
    section = container.section(SECTION)
    try:
        unpacker = bz2.BZ2Decompressor()
        raw = unpacker.decompress(section.rest(), size)
        while not (unpacker.eof or unpacker.needs_input or len(raw) > size):
            raw += unpacker.decompress(b"", 1)
    except (OSError, ValueError) as error:
        raise section.error("no bzip2 stream") from error
    if len(raw) != size or not unpacker.eof or unpacker.unused_data:
        raise section.error(f"it holds no alpha of {w}x{h} pixels")
    values = np.frombuffer(raw, kind).reshape(h, w).cumsum(0, dtype=kind)
    return torch.from_numpy(np.divide(values, np.iinfo(kind).max, dtype=np.float32))[None, None]
