"""PNG written from top to bottom, in memory that does not grow with the picture.

PNG stores each row as a filter byte and the difference, modulo 256, of every byte x from a prediction out of its
neighbours a (left), b (above) and c (above left) (PNG specification, third edition, section 9):

    0 None: 0    1 Sub: a    2 Up: b    3 Average: floor((a + b) / 2)    4 Paeth: the one of a, b, c nearest a + b - c

As in the specification's heuristic, a row takes the filter with the least sum of |signed difference|. The sums are
estimated on every fifth byte, and only the chosen filter is applied in full: predictions come from unfiltered
neighbours, so whole strips of rows go through numpy at once.
"""

import struct
import zlib
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOR_TYPE = {1: 0, 2: 4, 3: 2, 4: 6}
_STRIP = 1 << 22  # bytes filtered at once
_CHUNK = 1 << 18  # bytes in an IDAT chunk
MAX_SIDE = 2**31 - 1

Bytes = npt.NDArray[np.uint8]


class PngStream:
    """Write a PNG to an open binary file, rows first to last.

    Args:
        file: where the bytes go; it is neither sought nor closed.
        height, width: size in pixels.
        channels: 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA.
        bits: 8 or 16 per sample.
        icc: ICC profile to embed.
        exif: EXIF block, with or without its "Exif" prefix.
        level: zlib level 1..9; 6 makes files 4 % smaller than 4 and takes two and a half times as long.
    """

    def __init__(
        self,
        file: BinaryIO,
        height: int,
        width: int,
        channels: int,
        bits: int = 8,
        icc: bytes | None = None,
        exif: bytes | None = None,
        level: int = 4,
    ) -> None:
        self._file = file
        self._step = channels * bits // 8
        self._above = np.zeros((1, width * self._step), np.uint8)
        self._zlib = zlib.compressobj(level, zlib.DEFLATED, 15, 9, zlib.Z_FILTERED)
        self._pending = bytearray()
        file.write(_SIGNATURE)
        self._chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, _COLOR_TYPE[channels], 0, 0, 0))
        if icc:
            self._chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc))
        if exif:
            self._chunk(b"eXIf", exif.removeprefix(b"Exif\0\0"))

    def rows(self, pixels: npt.NDArray[Any]) -> None:
        """Append rows, an array [h, W, channels] of uint8 or uint16 as `bits` says."""
        step = max(1, _STRIP // self._above.shape[1])
        for y in range(0, len(pixels), step):
            strip = np.ascontiguousarray(pixels[y : y + step])
            if strip.dtype != np.uint8:
                strip = strip.astype(">u2")
            rows = strip.view(np.uint8).reshape(len(strip), -1)
            self._pending += self._zlib.compress(_filtered(rows, self._above, self._step).data)
            self._above = rows[-1:].copy()
            self._flush(_CHUNK)

    def close(self) -> None:
        """Write what is left and the end of the PNG."""
        self._pending += self._zlib.flush()
        self._flush(1)
        self._chunk(b"IEND", b"")

    def _flush(self, least: int) -> None:
        if len(self._pending) >= least:
            self._chunk(b"IDAT", bytes(self._pending))
            self._pending.clear()

    def _chunk(self, kind: bytes, data: bytes) -> None:
        check = zlib.crc32(data, zlib.crc32(kind))
        self._file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check))


def _filtered(rows: Bytes, above: Bytes, step: int) -> Bytes:
    """Filter rows [h, n] that follow the row above [1, n]; pixels are `step` bytes. Returns [h, 1 + n]."""
    framed = np.zeros((rows.shape[0] + 1, rows.shape[1] + step), np.uint8)  # zeros to the left, as PNG defines
    framed[0, step:], framed[1:, step:] = above[0], rows
    x, a, b, c = framed[1:, step:], framed[1:, :-step], framed[:-1, step:], framed[:-1, :-step]
    few = slice(None), slice(None, None, 5)  # 5 shares no factor with a pixel's bytes, so every sample has its say
    rests = [x[few] - _predict(kind, a[few], b[few], c[few]) for kind in range(5)]
    best = np.argmin([np.abs(rest.view(np.int8).astype(np.int16)).sum(axis=1) for rest in rests], axis=0)
    out = np.empty((rows.shape[0], rows.shape[1] + 1), np.uint8)
    out[:, 0] = best
    for kind in np.unique(best):
        mine = best == kind
        out[mine, 1:] = x[mine] - _predict(int(kind), a[mine], b[mine], c[mine])
    return out


def _predict(kind: int, a: Bytes, b: Bytes, c: Bytes) -> Bytes:
    if kind == 0:
        return np.zeros_like(a)
    if kind == 1:
        return a
    if kind == 2:
        return b
    if kind == 3:
        return (a >> 1) + (b >> 1) + (a & b & 1)
    wide_a, wide_b, wide_c = a.astype(np.int16), b.astype(np.int16), c.astype(np.int16)
    from_a, from_b = np.abs(wide_b - wide_c), np.abs(wide_a - wide_c)
    from_c = np.abs(wide_a + wide_b - 2 * wide_c)
    return np.where((from_a <= from_b) & (from_a <= from_c), a, np.where(from_b <= from_c, b, c))
