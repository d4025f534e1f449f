"""Named columns of small numbers to sections and back, coded with tables that are learned on the way, or in plain bits.

Columns of one name are alike, and what was learned from them in one section serves in the next.
"""

import numpy as np
import numpy.typing as npt

from foveate.compress.entropy import Adaptive, Decoder, Encoder, Ints
from foveate.compress.fields import Reader


class Writer:
    """Take columns, give sections.

    Args:
        entropy: code them; else every number takes its bits.
    """

    def __init__(self, entropy: bool) -> None:
        self._entropy = entropy
        self._models: dict[str, Adaptive] = {}
        self._coder, self._bits = Encoder() if entropy else None, list[npt.NDArray[np.uint8]]()

    def put(self, column: Ints, name: str, bits: int) -> None:
        """Add numbers from 0 to 2^bits - 1."""
        if self._coder is not None:
            self._coder.put_adaptive(column, self._models.setdefault(name, Adaptive(1 << bits)))
        else:
            self._bits.append((column[:, None] >> np.arange(bits)[::-1] & 1).ravel().astype(np.uint8))

    def finish(self) -> bytes:
        """The section so far; what follows begins another."""
        data = self._coder.finish() if self._coder else np.packbits(np.concatenate(self._bits)).tobytes()
        self._coder, self._bits = Encoder() if self._entropy else None, []
        return data


class Source:
    """Give back columns in the order in which a `Writer` took them. Raises: BitstreamError from every method."""

    def __init__(self, entropy: bool) -> None:
        self._entropy = entropy
        self._models: dict[str, Adaptive] = {}

    def begin(self, section: Reader, name: str) -> None:
        """Go on with a section."""
        self._section, self._at = section, 0
        self._coder = Decoder(section.rest(), name) if self._entropy else None
        self._bits = np.unpackbits(section.array("<u1", section.left)).astype(np.int64)

    def get(self, count: int, name: str, bits: int) -> Ints:
        """The next numbers."""
        if self._coder is not None:
            return self._coder.get_adaptive(count, self._models.setdefault(name, Adaptive(1 << bits)))
        part = self._bits[self._at : self._at + count * bits].reshape(-1, bits)
        self._at += count * bits
        if len(part) < count:
            raise self._section.error(f"{count} numbers are wanted and {len(part)} are left")
        return part @ (1 << np.arange(bits, dtype=np.int64)[::-1])

    def end(self) -> None:
        """Refuse a section that holds more."""
        if self._coder is not None:
            self._coder.end()
        elif len(self._bits) - self._at > 7:
            raise self._section.error(f"{len(self._bits) - self._at} bits too many")
