"""Contexts of latents: what is written comes back, only what is known is used, learned tables fit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("constriction")

from foveate.compress import latent_contexts as lc
from foveate.compress.entropy import TOTAL, Decoder, Encoder
from foveate.compress.scales import gaussian_tables


def _some(seed: int, shape: tuple[int, int, int] = (20, 3, 5)) -> tuple[np.ndarray, np.ndarray]:
    """Latents of a scale that varies from place to place, and table numbers that know half of it."""
    random = np.random.default_rng(seed)
    numbers = random.integers(0, 70, shape)
    loud = random.integers(0, 12, shape[1:])
    return np.rint(random.normal(0, 0.11 * 2.0 ** ((numbers + loud) / 8))).astype(np.int64), numbers


@pytest.fixture(scope="module")
def known() -> list:
    return lc.tables(lc.learn(sum(lc.count(*_some(seed, (40, 8, 8))) for seed in range(100, 110))))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 99), far=st.integers(-(2**40), 2**40))
def test_what_is_written_comes_back(known: list, seed: int, far: int) -> None:
    symbols, numbers = _some(seed)
    symbols[seed % 20, 1, 2] = far
    coder = Encoder()
    lc.write(coder, symbols, numbers, known)
    decoder = Decoder(coder.finish())
    assert np.array_equal(lc.read(decoder, numbers, known), symbols)
    decoder.end()


def test_a_context_is_the_group_before() -> None:
    symbols, numbers = np.zeros((24, 3, 3), np.int64), np.full((24, 3, 3), 5)
    symbols[3, 1, 1] = -20  # counts as 15: four digits here, around the neighbours
    chosen = [tables % (lc.HERE * lc.AROUND) for _, tables in lc._groups(symbols, numbers)]
    assert not chosen[0].any()
    expected = np.zeros((3, 3), int)
    expected[1, 1] = 4 * lc.AROUND
    expected[[0, 2, 1, 1], [1, 1, 0, 2]] = 4
    assert (chosen[1] == expected).all()
    assert not chosen[2].any()


def test_wide_scales_keep_their_gaussians() -> None:
    numbers = np.full((8, 1, 1), lc.FINE)
    ((_, chosen),) = lc._groups(np.zeros_like(numbers), numbers)
    assert (chosen == lc.COUNT + lc.FINE).all()
    assert lc.count(np.ones_like(numbers), numbers).sum() == 0


def test_learned_frequencies_are_even_and_follow_the_counts() -> None:
    counts = np.zeros((lc.COUNT, 2 * lc.REACH + 2), np.int64)
    counts[7, lc.REACH] = 900
    counts[7, lc.REACH + 1] = 100
    frequencies = lc.learn(counts)
    assert (frequencies.sum(1) == TOTAL).all()
    assert frequencies[7, lc.REACH] / TOTAL == pytest.approx(0.9, abs=0.01)
    assert frequencies[7, lc.REACH + 1] / TOTAL == pytest.approx(0.05, abs=0.005)
    assert abs(frequencies[:, lc.REACH - 1] - frequencies[:, lc.REACH + 1]).max() <= 1
    assert frequencies[8, lc.REACH] / TOTAL > 0.8  # never seen: as its scale is elsewhere


def test_contexts_save_bits(known: list) -> None:
    symbols, numbers = _some(5, (40, 8, 8))
    ours, gaussian = Encoder(), Encoder()
    lc.write(ours, symbols, numbers, known)
    gaussian.put_indexed(symbols, gaussian_tables(), numbers)
    assert len(ours.finish()) < 0.95 * len(gaussian.finish())
