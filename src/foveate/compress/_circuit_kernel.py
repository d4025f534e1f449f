"""The loop of `foveate.compress.circuit_coding` over patches, in whole numbers, for one core.

A message is a row of M numbers 1 .. 2^15 - 1. `t` holds the product of those that meet at a node, brought back to 15
bits after each factor.
"""

from typing import Any

import numpy as np
from numba import njit

from foveate.compress.circuit import DOWN, UP

_START = 2**31  # of the coder's state; where the decoder must end
_SYMBOLS = 256


@njit(nogil=True, cache=True, error_model="numpy")
def excess(largest: int) -> int:
    """Bits above 15."""
    bits = 0
    for step in (16, 8, 4, 2, 1):
        if largest >> step:
            largest >>= step
            bits += step
    return bits + 1 - 15


@njit(nogil=True, cache=True, error_model="numpy")
def rescale(t: Any) -> None:
    largest = t[0]
    for z in range(t.size):
        largest = max(largest, t[z])
    shift = excess(largest)
    if shift >= 0:
        for z in range(t.size):
            t[z] = max(t[z] >> shift, 1)
    else:
        for z in range(t.size):
            t[z] <<= -shift


@njit(nogil=True, cache=True, error_model="numpy")
def factor(t: Any, message: Any, first: bool) -> bool:
    if first:
        for z in range(t.size):
            t[z] = message[z]
    else:
        for z in range(t.size):
            t[z] *= message[z]
        rescale(t)
    return False


@njit(nogil=True, cache=True, error_model="numpy")
def through(t: Any, matrix: Any, out: Any) -> None:
    out[:] = 0
    for z in range(t.size):
        for y in range(t.size):
            out[y] += t[z] * matrix[z, y]
    rescale(out)


@njit(nogil=True, cache=True, error_model="numpy")
def weigh(t: Any) -> None:
    """Make a message sum to 2^14."""
    total, largest = np.int64(0), 0
    for z in range(t.size):
        total += t[z]
        if t[z] > t[largest]:
            largest = z
    inverse, left = (np.int64(1) << 44) // total, 1 << 14
    for z in range(t.size):
        t[z] = (t[z] * inverse) >> 30
        left -= t[z]
    t[largest] += left


@njit(nogil=True, cache=True, error_model="numpy")
def dot(t: Any, row: Any) -> int:
    total: Any = np.int32(0)
    for z in range(t.size):
        total += np.int32(t[z] * row[z])
    return total


@njit(nogil=True, cache=True, error_model="numpy")
def write(notes: Any, count: int, words: Any) -> int:
    state, used = np.int64(_START), 0
    for i in range(count - 1, -1, -1):
        low, frequency = np.int64(notes[i, 0]), np.int64(notes[i, 1])
        if state >= frequency << 33:
            words[used] = state & 0xFFFFFFFF
            used += 1
            state >>= 32
        state = ((state // frequency) << 30) + state % frequency + low
    words[used], words[used + 1] = state & 0xFFFFFFFF, state >> 32
    used += 2
    words[:used] = words[:used][::-1].copy()
    return used


@njit(nogil=True, cache=True, error_model="numpy")
def run(
    symbols: Any,
    words: Any,
    decode: bool,
    side: int,
    places: Any,
    evidence: Any,
    program: Any,
    parents: Any,
    starts: Any,
    children: Any,
    prior: Any,
    up: Any,
    down: Any,
    emitted: Any,
    cumulative: Any,
) -> int:
    _, height, width = symbols.shape
    count, states = parents.size, prior.size
    known = np.zeros(count, np.int64)
    rising, falling = np.zeros((count, states), np.int32), np.zeros((count, states), np.int32)
    heard = np.zeros(count, np.bool_)
    t = np.zeros(states, np.int32)
    notes = np.zeros((0 if decode else symbols.size, 2), np.int32)
    noted, used, state = 0, 2, np.int64(0)
    if decode:
        if words.size < 2 or words[0] >> 31:
            return -1
        state = (np.int64(words[0]) << 32) + words[1]
    for corner_y in range(0, height, side):
        for corner_x in range(0, width, side):
            heard[:] = False
            for i in range(count):
                y, x = corner_y + places[i, 1], corner_x + places[i, 2]
                known[i] = -1
                if parents[i] < 0:
                    falling[i] = prior
                if evidence[i] and 0 <= y < height and 0 <= x < width:
                    known[i] = symbols[places[i, 0], y, x]
            for step in range(len(program)):
                what, node = program[step]
                at = parents[node] if what == DOWN else node
                first = True
                if known[at] >= 0:
                    first = factor(t, emitted[places[at, 0], known[at]], first)
                if what != UP:
                    first = factor(t, falling[at], first)
                for place in range(starts[at], starts[at + 1]):
                    child = children[place]
                    if heard[child] and not (what == DOWN and child == node):
                        first = factor(t, rising[child], first)
                if what == UP:
                    heard[node] = not first
                    if not first:
                        through(t, up[node], rising[node])
                    continue
                if what == DOWN:
                    weigh(t)
                    through(t, down[node], falling[node])
                    continue
                channel, y, x = places[node, 0], corner_y + places[node, 1], corner_x + places[node, 2]
                if y >= height or x >= width:
                    continue
                weigh(t)
                rows = cumulative[channel]
                if decode:
                    slot = state & 0x3FFFFFFF
                    low, high = 0, _SYMBOLS
                    while high - low > 1:
                        middle = (low + high) >> 1
                        if dot(t, rows[middle]) <= slot:
                            low = middle
                        else:
                            high = middle
                    begin = dot(t, rows[low])
                    frequency = dot(t, rows[low + 1]) - begin
                    state = frequency * (state >> 30) + slot - begin
                    if state < _START:
                        if used >= words.size:
                            return -1
                        state = (state << 32) + words[used]
                        used += 1
                    symbols[channel, y, x] = low
                else:
                    low = symbols[channel, y, x]
                    begin = dot(t, rows[low])
                    notes[noted, 0], notes[noted, 1] = begin, dot(t, rows[low + 1]) - begin
                    noted += 1
                known[node] = low
    if decode:
        return used if state == _START else -1
    return write(notes, noted, words)
