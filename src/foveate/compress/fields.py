"""Numbers in and out of a section: what a codec writes beside its entropy-coded symbols.

`Reader` takes nothing on trust. It refuses to read past the end, and a count that the remaining bytes cannot hold is
refused before memory is asked for, so that a forged file costs no more than its own size.

    varint  a whole number from 0, seven bits a byte, low ones first, the top bit set on all bytes but the last
    signed  a whole number as varint of 2n for n >= 0 and -2n - 1 below
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from foveate.errors import BitstreamError

_LIMIT = 2**63 - 1


def varint(*values: int) -> bytes:
    """Write whole numbers from 0 to 2^63 - 1, smaller ones in fewer bytes.

    >>> varint(5, 300).hex()
    '05ac02'
    """
    out = bytearray()
    for value in values:
        rest = int(value)
        if not 0 <= rest <= _LIMIT:
            raise ValueError(f"a varint holds 0 to 2^63 - 1, got {value!r}")
        while rest > 127:
            out.append(rest & 127 | 128)
            rest >>= 7
        out.append(rest)
    return bytes(out)


def signed(*values: int) -> bytes:
    """Write whole numbers of either sign, small ones in few bytes.

    >>> signed(0, -1, 64).hex()
    '00018001'
    """
    return varint(*(2 * int(v) if v >= 0 else -2 * int(v) - 1 for v in values))


class Reader:
    """Read fields one after another.

    Args:
        data: the bytes.
        name: what they are, for messages.

    Raises: every method raises BitstreamError when the field is not there or out of bounds.

    >>> fields = Reader(varint(300) + b"\\x07", "example")
    >>> fields.varint(), fields.byte(), fields.end()
    (300, 7, None)
    """

    def __init__(self, data: bytes, name: str) -> None:
        self._data, self._name, self._at = data, name, 0

    @property
    def left(self) -> int:
        """Bytes not yet read."""
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        if not 0 <= count <= self.left:
            raise self.error(f"{count} bytes are wanted and {self.left} are left")
        self._at += count
        return self._data[self._at - count : self._at]

    def rest(self) -> bytes:
        """All bytes that are left."""
        return self.take(self.left)

    def byte(self) -> int:
        """The next byte, 0 to 255."""
        return self.take(1)[0]

    def varint(self, most: int = _LIMIT, least: int = 0) -> int:
        """The next varint, within bounds."""
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
            if shift > 63:
                raise self.error("a number has no end")
        if not least <= value <= most:
            raise self.error(f"{value} is not within {least} to {most}")
        return value

    def signed(self, most: int = _LIMIT) -> int:
        """The next signed number, its magnitude within bounds."""
        value = self.varint()
        number = value >> 1 if value % 2 == 0 else -(value >> 1) - 1
        if abs(number) > most:
            raise self.error(f"{number} is not within -{most} to {most}")
        return number

    def array(self, dtype: str, count: int) -> npt.NDArray[Any]:
        """The next `count` numbers of a little-endian NumPy type such as "<u2" or "<f4"; floats must be finite."""
        kind = np.dtype(dtype)
        if count < 0 or count * kind.itemsize > self.left:
            raise self.error(f"{count} numbers of {kind.itemsize} bytes are wanted and {self.left} bytes are left")
        values = np.frombuffer(self.take(count * kind.itemsize), kind)
        if kind.kind == "f" and not np.isfinite(values).all():
            raise self.error("it holds NaN or infinite values")
        return values

    def number(self, dtype: str) -> Any:
        """The next number of a little-endian NumPy type, as Python's int or float."""
        return self.array(dtype, 1)[0].item()

    def text(self) -> str:
        """The next text: a length byte, then that many ASCII characters."""
        raw = self.take(self.byte())
        if not raw.isascii():
            raise self.error(f"{raw!r} is no name")
        return raw.decode("ascii")

    def end(self) -> None:
        """Refuse what is left over."""
        if self.left:
            raise self.error(f"{self.left} bytes too many")

    def error(self, problem: str) -> BitstreamError:
        """An error that says where the problem was met; a codec raises it for values that make no sense."""
        return BitstreamError(f"The file is damaged ({self._name}: {problem}); get a fresh copy.")
