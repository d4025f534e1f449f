"""The lower bytes of deep samples."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("constriction")

from foveate.compress import low_bytes
from foveate.errors import BitstreamError


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3]), st.integers(1, 9), st.integers(1, 9), st.integers(8, 32))
def test_samples_come_back(seed: int, channels: int, height: int, width: int, bits: int) -> None:
    samples = np.random.default_rng(seed).integers(0, 2**bits, (channels, height, width))
    assert np.array_equal(low_bytes.decode(low_bytes.encode(samples), samples >> 8), samples)


def test_each_kind_of_depth_is_recognised() -> None:
    eight = np.random.default_rng(0).integers(0, 256, (1, 40, 50))
    smooth = np.add.outer(37 * np.arange(40), 11 * np.arange(50))[None] + 900
    assert [low_bytes.encode(x)[0] for x in (eight << 8, eight * 257, smooth)] == [0, 1, 2]
    assert len(low_bytes.encode(eight * 257)) < 12
    assert len(low_bytes.encode(smooth)) < 300


def test_senseless_streams_are_refused() -> None:
    data = low_bytes.encode(np.random.default_rng(0).integers(0, 2**16, (1, 6, 6)))
    upper = np.zeros((1, 6, 6), np.int64)
    for wrong in (b"", b"\x03" + data[1:], data + b"\xff" * 40):
        with pytest.raises(BitstreamError, match="damaged"):
            low_bytes.decode(wrong, upper)
