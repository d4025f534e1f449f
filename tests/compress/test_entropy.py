"""Entropy coding: exact, near the entropy, and the same tables everywhere."""

from math import erf, sqrt
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("constriction")

from foveate.compress.entropy import TOTAL, Adaptive, Decoder, Encoder, Table, quantise
from foveate.compress.fields import Reader
from foveate.compress.scales import SCALES, gaussian_tables, scale_index
from foveate.errors import BitstreamError, InputError, MissingExtraError

COUNTS = st.lists(st.integers(0, 10**6), min_size=1, max_size=40)


@settings(deadline=None, max_examples=50)
@given(COUNTS, st.integers(-50, 50), st.booleans(), st.data())
def test_symbols_come_back_from_any_table(counts: list[int], lowest: int, escape: bool, data: st.DataObject) -> None:
    table = Table.from_counts(counts, lowest, escape)
    assert table.frequencies.sum() == TOTAL
    span = st.integers(-(10**6), 10**6) if escape else st.integers(lowest, lowest + len(counts) - 1)
    symbols = data.draw(st.lists(span, max_size=60))
    coder = Encoder()
    coder.put(symbols, table)
    stream = coder.finish()
    decoder = Decoder(stream)
    assert decoder.get(len(symbols), table).tolist() == symbols
    decoder.end()
    back = Table.read(Reader(table.to_bytes(), "test"))
    assert back.frequencies.tolist() == table.frequencies.tolist()
    assert (back.lowest, back.escape) == (lowest, escape)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 5), st.integers(0, 400))
def test_all_kinds_share_a_stream(seed: int, alphabet: int, contexts: int, count: int) -> None:
    random = np.random.default_rng(seed)
    symbols, index = random.integers(0, alphabet, count), random.integers(0, contexts, count)
    tables = [Table.from_counts(random.integers(0, 99, alphabet)) for _ in range(contexts)]
    rows = quantise(random.integers(0, 99, (count, alphabet + 1)))
    coder = Encoder()
    coder.put_indexed(symbols, tables, index)
    coder.put_adaptive(symbols, Adaptive(alphabet, contexts), index)
    coder.put_each(symbols, rows)
    coder.put_adaptive(symbols, alphabet)
    decoder = Decoder(coder.finish())
    assert (decoder.get_indexed(tables, index) == symbols).all()
    assert (decoder.get_adaptive(count, Adaptive(alphabet, contexts), index) == symbols).all()
    assert (decoder.get_each(rows) == symbols).all()
    assert (decoder.get_adaptive(count, alphabet) == symbols).all()
    decoder.end()


def test_the_size_is_the_entropy() -> None:
    symbols = np.random.default_rng(0).geometric(0.3, 20000).clip(0, 40)
    shares = np.bincount(symbols) / symbols.size
    entropy = -(shares[shares > 0] * np.log2(shares[shares > 0])).sum() * symbols.size
    table = Table.from_symbols(symbols)
    coder = Encoder()
    coder.put(symbols, table)
    size = 8 * len(coder.finish())
    assert entropy - 8 <= size <= 1.01 * entropy + 64
    assert abs(size - table.bits(symbols)) <= 40
    coder = Encoder()
    coder.put_adaptive(symbols, 41)
    assert 8 * len(coder.finish()) <= 1.02 * entropy + 64


def test_frequencies_are_exact_whole_numbers() -> None:
    assert quantise([[0, 0], [1, 3], [1, 10**9]]).tolist() == [[32768, 32768], [16384, 49152], [1, 65535]]
    with pytest.raises(InputError, match="whole numbers"):
        quantise([0.5, 0.5])
    with pytest.raises(InputError, match="sum to"):
        Table(np.array([1, 2]))
    with pytest.raises(InputError, match="escape=True"):
        Table.from_counts([1, 1]).places(np.array([2]))


def test_gaussian_tables_are_those_of_every_machine() -> None:
    """The checksum was taken where the tables were first made; whole-number arithmetic gives it everywhere."""
    tables = gaussian_tables()
    assert crc32(b"".join(table.frequencies.astype("<i8").tobytes() for table in tables)) == GAUSSIAN_CRC
    for index in (0, 30, 60):
        table, scale = tables[index], SCALES[index] / 4096
        places = np.arange(table.lowest, table.lowest + table.size)
        exact = [(erf((k + 0.5) / scale / sqrt(2)) - erf((k - 0.5) / scale / sqrt(2))) / 2 for k in places]
        assert np.abs(table.frequencies[:-1] / TOTAL - exact).max() < 0.0015


GAUSSIAN_CRC = 1156015289


def test_scales_choose_the_first_table_that_is_wide_enough() -> None:
    assert scale_index([1, SCALES[0], SCALES[0] + 1, SCALES[7], 2**40]).tolist() == [0, 0, 1, 7, len(SCALES) - 1]
    with pytest.raises(InputError, match="whole units"):
        scale_index([0.5])


def test_gaussian_residuals_cost_what_theory_says() -> None:
    random = np.random.default_rng(1)
    sigma = np.exp(random.uniform(np.log(0.2), np.log(100), 8000))
    residuals = np.round(random.normal(size=8000) * sigma).astype(np.int64)
    index = scale_index(np.round(sigma * 4096).astype(np.int64))
    coder = Encoder()
    coder.put_indexed(residuals, gaussian_tables(), index)
    stream = coder.finish()
    assert (Decoder(stream).get_indexed(gaussian_tables(), index) == residuals).all()
    upper, lower = (np.array([erf(v) for v in (residuals + h) / sigma / sqrt(2)]) for h in (0.5, -0.5))
    ideal = -np.log2(np.maximum((upper - lower) / 2, 1e-9)).sum()
    assert 8 * len(stream) < 1.01 * ideal + 64


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=60))
def test_rubbish_decodes_to_rubbish_or_is_refused(data: bytes) -> None:
    table = Table.from_counts([5, 1, 1], escape=True)
    decoder = Decoder(data)
    try:
        assert decoder.get(20, table).shape == (20,)
        assert decoder.get_adaptive(20, 7).max() < 7
        decoder.end()
    except BitstreamError:
        pass


def test_a_table_of_a_damaged_file_is_refused() -> None:
    for data in (b"", b"\x02\x00\x00\x01\x01", b"\x00\x00\x00", b"\x01\x01\x00\xff\xff\x03"):
        with pytest.raises(BitstreamError):
            Table.read(Reader(data, "test"))


def test_without_constriction_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "constriction", None)
    with pytest.raises(MissingExtraError, match=r"pip install foveate\[codec\]"):
        Encoder()
