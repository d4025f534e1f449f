"""Pixels to residuals and back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.compress.blended_prediction import to_pixels, to_symbols
from foveate.data import pictures


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 3]),
    st.integers(1, 12),
    st.integers(1, 12),
    st.sampled_from([2, 256]),
)
def test_pixels_come_back(seed: int, channels: int, height: int, width: int, levels: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, levels, (channels, height, width)) * (255 // (levels - 1))
    pixels = pixels.astype(np.uint8)
    assert np.array_equal(to_pixels(to_symbols(pixels)), pixels)


def test_flat_pictures_and_slopes_leave_nothing_but_the_start() -> None:
    flat = to_symbols(np.full((3, 9, 11), 77, np.uint8)).reshape(3, -1)
    assert flat[:, 0].tolist() == [77, 128, 128]
    assert (flat[:, 1:] == 128).all()
    slope = np.add.outer(2 * np.arange(20), 3 * np.arange(30))[None].astype(np.uint8)
    assert (np.abs(to_symbols(slope)[0, 6:, 6:].astype(int) - 128) <= 1).all()


def test_a_symbol_depends_on_nothing_to_come() -> None:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (3, 8, 8)).astype(np.uint8)
    changed = pixels.copy()
    changed[:, 4, 5:] ^= 255
    changed[:, 5:] ^= 255
    first, second = to_symbols(pixels), to_symbols(changed)
    assert np.array_equal(first[:, :4], second[:, :4])
    assert np.array_equal(first[:, 4, :5], second[:, 4, :5])
    assert not np.array_equal(first[:, 4, 5:], second[:, 4, 5:])


def test_a_prediction_is_the_weighted_mean_of_the_rules() -> None:
    """Grey, from the definition, where no edge is near."""
    pixels = np.random.default_rng(1).integers(100, 140, (1, 7, 9)).astype(np.uint8)
    p = pixels[0].astype(int)

    def rules(y: int, x: int) -> list[int]:
        w, n, nw, ne, ww, nn = p[y, x - 1], p[y - 1, x], p[y - 1, x - 1], p[y - 1, x + 1], p[y, x - 2], p[y - 2, x]
        return [
            *(4 * w, 4 * n, 4 * (w + n - nw), 4 * (w + ne - n), 2 * (w + n) + ne - nw, 4 * (2 * n - nn)),
            *(4 * (2 * w - ww), 4 * (n + ne - p[y - 2, x + 1]), 2 * (w + ne), 4 * (w + nw - p[y - 1, x - 2])),
        ]

    y, x = 5, 5
    near = {(0, -1): 2, (-1, 0): 2, (-1, -1): 1, (-1, 1): 1, (0, -2): 1, (-2, 0): 1}
    weights = []
    for r in range(10):
        error = sum(k * (4 * p[y + dy, x + dx] - rules(y + dy, x + dx)[r]) ** 2 for (dy, dx), k in near.items())
        weights.append(2**28 // (int(error) + 16) + 1)
    mean = sum(int(g) * k for g, k in zip(rules(y, x), weights, strict=True)) / (4 * sum(weights))
    assert to_symbols(pixels)[0, y, x] == (p[y, x] - np.floor(mean + 0.5) + 128) % 256


def test_residuals_of_a_photograph_say_less_than_those_of_the_median_predictor() -> None:
    pixels = (pictures.samples()["astronaut"][:1, 60:156, 180:276] * 255).round().byte().numpy()

    def bits(symbols: np.ndarray) -> float:
        shares = np.bincount(symbols.reshape(-1).astype(int) % 256) / symbols.size
        return float(-(shares[shares > 0] * np.log2(shares[shares > 0])).sum())

    p = np.pad(pixels[0].astype(int), 1, mode="edge")
    w, n, nw = p[1:-1, :-2], p[:-2, 1:-1], p[:-2, :-2]
    median = np.clip(w + n - nw, np.minimum(w, n), np.maximum(w, n))
    assert bits(to_symbols(pixels)) < bits(pixels[0] - median) - 0.05


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 9), (3, 9, 1)])
def test_the_picture_given_is_left_alone(shape: tuple[int, int, int]) -> None:
    pixels = np.full(shape, 9, np.uint8)
    pixels.flags.writeable = False
    assert to_symbols(pixels).shape == shape
    assert (pixels == 9).all()
