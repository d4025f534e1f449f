"""What latents decoded already say about those to come: a table for each out of a learned few.

A Gaussian whose scale the hyperprior tells is a coarse guess. Latents are coded in groups of eight channels, and the
magnitudes of the group before, at the same place and at the four around it, sharpen the guess:

    here = sum of min(|k|, 15) over the group before       around = sum of here over the four neighbours
    context = min(digits(here), 6) * 8 + min(digits(around), 7)            digits: number of binary digits
    table   = learned[i / 4, context]  for table numbers i below 48, the Gaussian table of number i from there on

All is whole numbers. (The paper codes under the Gaussians alone; this saves about a tenth of the bits, and costs the
decoder a few additions per latent.)
"""

from collections.abc import Iterator

import numpy as np

from foveate.compress.entropy import Decoder, Encoder, Ints, Table, quantise
from foveate.compress.scales import gaussian_tables

GROUP, FINE, STEP = 8, 48, 4
HERE, AROUND = 7, 8
REACH = 24
"""Learned tables know symbols up to this magnitude."""

COUNT = FINE // STEP * HERE * AROUND


def tables(frequencies: Ints) -> list[Table]:
    """The learned tables, then the Gaussian ones. Shape: frequencies [COUNT, 2 REACH + 2], the last for escapes."""
    return [*(Table(row, -REACH, escape=True) for row in frequencies), *gaussian_tables()]


def write(coder: Encoder, symbols: Ints, numbers: Ints, known: list[Table]) -> None:
    """Code latents [M, H, W] with their table numbers [M, H, W]."""
    for group, chosen in _groups(symbols, numbers):
        coder.put_indexed(symbols[group], known, chosen)


def read(coder: Decoder, numbers: Ints, known: list[Table]) -> Ints:
    """Decode latents [M, H, W] of table numbers [M, H, W]."""
    symbols = np.zeros(numbers.shape, np.int64)
    for group, chosen in _groups(symbols, numbers):
        symbols[group] = coder.get_indexed(known, chosen).reshape(chosen.shape)
    return symbols


def count(symbols: Ints, numbers: Ints) -> Ints:
    """How often each table would have met each symbol, escapes last. Shape: -> [COUNT, 2 REACH + 2]."""
    found = np.zeros((COUNT, 2 * REACH + 2), np.int64)
    for group, chosen in _groups(symbols, numbers):
        learned = chosen < COUNT
        values = symbols[group][learned]
        places = np.where(abs(values) > REACH, 2 * REACH + 1, values + REACH)
        np.add.at(found, (chosen[learned], places), 1)
    return found


def learn(counts: Ints) -> Ints:
    """Frequencies from counts: symmetric, rare contexts drawn to what their scale does on average."""
    even = counts.astype(float)
    even[:, :-1] += even[:, -2::-1]
    by_scale = even.reshape(FINE // STEP, -1, even.shape[1])
    usual = by_scale.sum(1, keepdims=True) + 0.05
    smooth = by_scale + 8 * usual / usual.sum(-1, keepdims=True)
    return quantise((smooth / smooth.sum(-1, keepdims=True) * 2**30).astype(np.int64)).reshape(counts.shape)


def _groups(symbols: Ints, numbers: Ints) -> Iterator[tuple[slice, Ints]]:
    """Each group of channels and the tables of its latents; `symbols` need to be known up to the group before."""
    before = np.zeros((1, *numbers.shape[1:]), np.int64)
    for first in range(0, len(numbers), GROUP):
        group = slice(first, first + GROUP)
        here = np.minimum(np.abs(before), 15).sum(0)
        wide = np.pad(here, 1)
        around = wide[:-2, 1:-1] + wide[2:, 1:-1] + wide[1:-1, :-2] + wide[1:-1, 2:]
        context = np.minimum(_digits(here), HERE - 1) * AROUND + np.minimum(_digits(around), AROUND - 1)
        number = numbers[group]
        yield group, np.where(number < FINE, number // STEP * (HERE * AROUND) + context, COUNT + number)
        before = symbols[group]


def _digits(values: Ints) -> Ints:
    return np.frexp(values.astype(np.float64))[1].astype(np.int64)
