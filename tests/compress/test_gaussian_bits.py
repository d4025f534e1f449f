import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.compress.fields import Reader
from foveate.errors import BitstreamError

pytest.importorskip("constriction")
from foveate.compress import gaussian_bits as bits
from foveate.compress.entropy import Decoder, Encoder

SEEDS = st.integers(0, 2**32 - 1)


def there_and_back(keys, tops, shift):
    coder = Encoder()
    bits.put_places(coder, keys, tops, shift)
    data = coder.finish()
    decoder = Decoder(data)
    found = bits.get_places(decoder, len(keys), tops, shift, Reader(b"", "test"))
    decoder.end()
    return found, len(data)


@given(st.integers(1, 300), st.integers(1, 5000), st.integers(1, 40000), st.integers(0, 12), SEEDS)
@settings(deadline=None, max_examples=40)
def test_places_come_back_sorted(count, width, height, shift, seed):
    rng = np.random.default_rng(seed)
    keys = np.stack([rng.integers(0, width, count), (height * rng.random(count) ** 3).astype(np.int64)], 1)
    keys = keys[bits.sort_places(keys)]
    found, _ = there_and_back(keys, (width - 1, height - 1), shift)
    assert np.array_equal(found, keys)


@given(st.lists(st.integers(0, 2**38), max_size=30), st.integers(39, 41))
@settings(deadline=None, max_examples=40)
def test_numbers_of_any_length(values, width):
    array, coder = np.array(values, np.int64), Encoder()
    bits.put_numbers(coder, array)
    bits.put_bits(coder, array, width)
    decoder = Decoder(coder.finish())
    assert bits.get_numbers(decoder, len(values)).tolist() == values
    assert bits.get_bits(decoder, len(values), width).tolist() == values


def test_a_set_is_cheaper_than_a_list_by_the_order():
    rng, count = np.random.default_rng(0), 5000
    keys = rng.integers(0, 2**16, (count, 2))
    _, size = there_and_back(keys[bits.sort_places(keys)], (2**16 - 1, 2**16 - 1), 10)
    order = math.lgamma(count + 1) / math.log(2) / count
    assert 32 - order < 8 * size / count < 32 - order + 0.35


def test_what_cannot_be_is_refused():
    coder = Encoder()
    bits.put_places(coder, np.array([[15, 5], [4, 15]]), (15, 15), 2)
    data = coder.finish()
    for count, tops in ((3, (15, 15)), (1, (15, 15)), (2, (15, 14)), (2, (14, 15))):
        with pytest.raises(BitstreamError):
            bits.get_places(Decoder(data), count, tops, 2, Reader(b"", "test"))
