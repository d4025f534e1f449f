"""The file that every codec writes: a header, a table of sections, and the sections.

    magic (4)  version (1)  header length (2)  |  mode (1)  method  width  height  sections  {name, length, crc32}*
    |  crc32 of all that (4)  |  section 1  |  section 2  |  ...

Byte by byte in docs/container.md. The header's checksum covers the table, and the table holds every section's length
and checksum, so that one number vouches for the whole file. As all of it comes first, a file that was cut off can
still be told from a damaged one: the sections that arrived whole are usable, which is what a progressive codec needs.

Sizes are bounded before anything is allocated. A checksum finds accidents, not forgeries: what a codec reads out of a
section is checked again, by `foveate.compress.fields.Reader`.
"""

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self
from zlib import crc32

from foveate.compress.fields import Reader, varint
from foveate.data.decode import MAX_PIXELS
from foveate.errors import BitstreamError, InputError

MAGIC = b"\x8fFOV"
VERSION = 1
MAX_SECTIONS = 255
MAX_BYTES = 2**31
"""Longest section, and longest file."""

_FIXED = struct.Struct("<4sBH")
_DEPTHS = (8, 16, 32)
_METHOD = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,14}")
_FRESH = "get a fresh copy"


@dataclass(frozen=True)
class Container:
    """A compressed picture: what it is, how it was coded, and the codec's sections in order.

    Args:
        method: slug of the codec's system, e.g. "gaussian-image".
        width, height: of the picture, in pixels.
        channels: 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha.
        sections: the codec's payload by name (a letter or digit, then up to 14 of a-z 0-9 _ -), in file order.
        bits: per sample of the picture: 8, 16, or 32 for float.
        missing: names of the sections that a file cut off does not hold; only `read(..., allow_prefix=True)` gives any.

    Raises: InputError when a value does not fit the file format.

    >>> data = Container("demo", 6, 4, 3, {"base": b"abc", "fine": b"defg"}).to_bytes()
    >>> len(data), Container.read(data).sections["fine"]
    (47, b'defg')
    >>> Container.read(data[:-1], allow_prefix=True).missing
    ('fine',)
    """

    method: str
    width: int
    height: int
    channels: int
    sections: Mapping[str, bytes] = field(repr=False)
    bits: int = 8
    missing: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problem = _problem(self.method, self.width, self.height, self.channels, self.bits, list(self.sections))
        if problem:
            raise InputError(f"This cannot be put into a file: {problem}.")
        object.__setattr__(self, "sections", dict(self.sections))

    @property
    def complete(self) -> bool:
        """Whether all sections are there."""
        return not self.missing

    def section(self, name: str) -> Reader:
        """Open a section for reading.

        Raises: BitstreamError when the file does not hold it.
        """
        if name not in self.sections:
            raise BitstreamError(f"A {self.method} file without its section {name!r} cannot be decoded; {_FRESH}.")
        return Reader(self.sections[name], f"{self.method} section {name!r}")

    def with_sections(self, **sections: bytes) -> Self:
        """A copy with sections replaced, or added at the end."""
        return replace(self, sections={**self.sections, **sections})

    def to_bytes(self) -> bytes:
        """The file. Its length is the rate: 8 * len / (width * height) bits per pixel, header and all.

        Raises: InputError when sections are missing, or too long.
        """
        if self.missing:
            raise InputError(f"The sections {', '.join(self.missing)} are missing; a file is written with all of them.")
        body = bytearray([self.channels | _DEPTHS.index(self.bits) << 4])
        body += _text(self.method) + varint(self.width) + varint(self.height) + bytes([len(self.sections)])
        for name, data in self.sections.items():
            body += _text(name) + varint(len(data)) + crc32(data).to_bytes(4, "little")
        head = _FIXED.pack(MAGIC, VERSION, len(body)) + body
        total = len(head) + 4 + sum(map(len, self.sections.values()))
        if total > MAX_BYTES:
            raise InputError(f"A file of {total} bytes is above the limit of {MAX_BYTES}; cut the picture into parts.")
        return b"".join([head, crc32(head).to_bytes(4, "little"), *self.sections.values()])

    @classmethod
    def read(cls, data: bytes, allow_prefix: bool = False) -> Self:
        """Check a file and take it apart; nothing is decoded.

        Args:
            data: the file.
            allow_prefix: accept a file cut off behind its header, with the sections that are whole; their names are
                missing from `sections` and listed in `missing` otherwise.

        Raises: BitstreamError when it is not a foveate file, was made by a newer foveate, or is truncated, damaged or
            impossible.
        """
        data = bytes(data)
        method, width, height, channels, bits, table, start = _header(data)
        end = start + sum(length for _, length, _ in table)
        if len(data) > end:
            raise BitstreamError(f"The file holds {len(data)} bytes, its header promises {end}: damaged; {_FRESH}.")
        if len(data) < end and not allow_prefix:
            raise BitstreamError(f"The file is truncated: {len(data)} of {end} bytes are there; {_FRESH}.")
        sections: dict[str, bytes] = {}
        for name, length, checksum in table:
            if start + length > len(data):
                break
            sections[name] = data[start : start + length]
            if crc32(sections[name]) != checksum:
                raise BitstreamError(f"The file is damaged: section {name!r} fails its checksum; {_FRESH}.")
            start += length
        missing = tuple(name for name, _, _ in table[len(sections) :])
        return cls(method, width, height, channels, sections, bits, missing)


def header_length(data: bytes) -> int:
    """Bytes before the first section of a file.

    Raises: BitstreamError as `Container.read`.
    """
    return _header(data)[-1]


def _header(data: bytes) -> tuple[str, int, int, int, int, list[tuple[str, int, int]], int]:
    if data[:4] != MAGIC[: len(data)] or not data:
        start = f"begins with {data[:4]!r}" if data else "is empty"
        raise BitstreamError(f"Not a foveate file: it {start}, expected {MAGIC!r}; compress a picture to make one.")
    if len(data) < _FIXED.size:
        raise BitstreamError(f"The file is truncated: only {len(data)} bytes are there; {_FRESH}.")
    _, version, length = _FIXED.unpack_from(data)
    if version != VERSION:
        raise BitstreamError(f"The file is of version {version}, this foveate reads {VERSION}; install a newer one.")
    start = _FIXED.size + length + 4
    if len(data) < start:
        raise BitstreamError(f"The file is truncated: {len(data)} of {start} bytes of its header are there; {_FRESH}.")
    if crc32(data[: start - 4]) != int.from_bytes(data[start - 4 : start], "little"):
        raise BitstreamError(f"The file is damaged: the header fails its checksum; {_FRESH}.")
    body = Reader(data[_FIXED.size : start - 4], "header")
    mode = body.byte()
    method, width, height, count = body.text(), body.varint(), body.varint(), body.byte()
    table = [(body.text(), body.varint(MAX_BYTES), body.number("<u4")) for _ in range(count)]
    body.end()
    channels, depth = mode & 15, mode >> 4
    bits = _DEPTHS[depth] if depth < len(_DEPTHS) else 0
    problem = _problem(method, width, height, channels, bits, [name for name, _, _ in table])
    if not problem and start + sum(size for _, size, _ in table) > MAX_BYTES:
        problem = f"sections of more than {MAX_BYTES} bytes"
    if problem:
        raise BitstreamError(f"The file is refused: {problem}; {_FRESH}.")
    return method, width, height, channels, bits, table, start


def _problem(method: str, width: int, height: int, channels: int, bits: int, names: list[str]) -> str:
    if not _METHOD.fullmatch(method):
        return f"a method called {method!r}"
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        return f"a picture of {width}x{height} pixels (1 to {MAX_PIXELS} are possible)"
    if channels not in (1, 2, 3, 4) or bits not in _DEPTHS:
        return f"{channels} channels of {bits} bits (1 to 4 of 8, 16 or 32)"
    if len(names) > MAX_SECTIONS or len(set(names)) < len(names):
        return f"{len(names)} sections, {len(set(names))} different names (at most {MAX_SECTIONS}, each once)"
    return next((f"a section called {name!r}" for name in names if not _NAME.fullmatch(name)), "")


def _text(text: str) -> bytes:
    return bytes([len(text)]) + text.encode("ascii")
