"""Sets of places, entropy-coded: the order of Gaussians says nothing, so none is sent.

Places are pairs of whole numbers (x, y), sorted by y, then x. Both axes are cut into groups of 2^shift numbers.

    y   the number n of places in each group, then for each place the gap d to the one before it in its group (or to the
        group's beginning): k low bits as they are, 2^k the largest power of 2 up to 2^shift / n, and d >> k adaptively
    x   the group adaptively, the place in it as it is

Compared with a list in any order this spares about log2(N!) bits. Symbols of an adaptive table come with what they
depend on known beforehand, so that whole arrays are coded at once.
"""

import numpy as np
import numpy.typing as npt

from foveate.compress.entropy import Decoder, Encoder, Ints, Table
from foveate.compress.fields import Reader

_LENGTHS = 40
_MOST = 15
_PIECE = 12  # bits that are put at a time


def put_bits(coder: Encoder, values: Ints, width: int) -> None:
    """Whole numbers below 2^width as they are."""
    for low in range(0, width, _PIECE):
        count = min(_PIECE, width - low)
        coder.put(values >> low & (1 << count) - 1, _even(count))


def get_bits(coder: Decoder, count: int, width: int) -> Ints:
    """What `put_bits` put."""
    values = np.zeros(count, np.int64)
    for low in range(0, width, _PIECE):
        values |= coder.get(count, _even(min(_PIECE, width - low))) << low
    return values


def put_numbers(coder: Encoder, values: Ints) -> None:
    """Whole numbers from 0: their lengths in bits adaptively, the bits below the first as they are."""
    lengths = _lengths(values)
    coder.put_adaptive(lengths, _LENGTHS)
    _put_each(coder, values, np.maximum(lengths - 1, 0))


def get_numbers(coder: Decoder, count: int) -> Ints:
    """What `put_numbers` put."""
    lengths = coder.get_adaptive(count, _LENGTHS)
    return np.where(lengths > 0, 1 << np.maximum(lengths - 1, 0), 0) | _get_each(coder, np.maximum(lengths - 1, 0))


def sort_places(keys: Ints) -> npt.NDArray[np.intp]:
    """The order in which `put_places` wants them. Shape: [N, 2] -> [N]."""
    return np.lexsort((keys[:, 0], keys[:, 1]))


def put_places(coder: Encoder, keys: Ints, tops: tuple[int, int], shift: int) -> None:
    """Code sorted places.

    Args:
        keys: (x, y), from 0 to `tops`.
        shift: of the groups.

    Shape: keys [N, 2].
    """
    x, y = keys.T
    group = y >> shift
    members = np.bincount(group, minlength=(tops[1] >> shift) + 1)
    put_numbers(coder, members)
    before = np.concatenate([[0], y[:-1]])
    gaps = y - np.where(np.concatenate([[True], np.diff(group) > 0]), group << shift, before)
    low = _low_bits(members, shift)[group]
    high = gaps >> low
    coder.put_adaptive(np.minimum(high, _MOST), _MOST + 1)
    put_numbers(coder, high[high >= _MOST] - _MOST)
    _put_each(coder, gaps, low)
    coder.put_adaptive(x >> shift, (tops[0] >> shift) + 1)
    put_bits(coder, x, shift)


def get_places(coder: Decoder, count: int, tops: tuple[int, int], shift: int, fields: Reader) -> Ints:
    """What `put_places` put.

    Args:
        fields: the section, for its errors.

    Raises: BitstreamError when they are not `count`, or beyond the tops.
    """
    members = get_numbers(coder, (tops[1] >> shift) + 1)
    if members.max() > count or members.sum() != count:
        raise fields.error(f"places of {members.sum()} Gaussians for {count}")
    group = np.repeat(np.arange(members.size), members)
    low = _low_bits(members, shift)[group]
    high = coder.get_adaptive(count, _MOST + 1)
    high[high >= _MOST] += get_numbers(coder, int((high >= _MOST).sum()))
    if high.max() >> shift + 1:
        raise fields.error("a place outside the picture")
    gaps = (high << low) | _get_each(coder, low)
    total = gaps.cumsum()
    starts = members.cumsum() - members
    y = total - (total - gaps)[np.minimum(starts, count - 1)][group] + (group << shift)
    x = coder.get_adaptive(count, (tops[0] >> shift) + 1) << shift
    x |= get_bits(coder, count, shift)
    if x.max() > tops[0] or y.max() > tops[1]:
        raise fields.error("a place outside the picture")
    return np.stack([x, y], 1)


def _low_bits(members: Ints, shift: int) -> Ints:
    return np.maximum(_lengths((1 << shift) // np.maximum(members, 1)) - 1, 0)


def _lengths(values: Ints) -> Ints:
    """Bits of each number: 0 -> 0, 1 -> 1, 2 and 3 -> 2, ..."""
    powers = 1 << np.arange(_LENGTHS - 1, dtype=np.int64)
    return np.searchsorted(powers, values, side="right").astype(np.int64)


def _put_each(coder: Encoder, values: Ints, widths: Ints) -> None:
    for width in np.unique(widths):
        put_bits(coder, values[widths == width], int(width))


def _get_each(coder: Decoder, widths: Ints) -> Ints:
    values = np.zeros(widths.size, np.int64)
    for width in np.unique(widths):
        members = widths == width
        values[members] = get_bits(coder, int(members.sum()), int(width))
    return values


def _even(width: int) -> Table:
    return Table.from_counts(np.ones(1 << width, np.int64))
