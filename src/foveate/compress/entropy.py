"""Entropy coding: symbols to bits and back at the cost of -log2 p each, the same on every machine.

constriction's range coder does the coding; this file makes the probabilities. A `Table` is a distribution in fixed
point: whole frequencies that sum to 2^16, made from whole numbers by whole-number arithmetic. Handed over as
multiples of 2^-16 they pass through constriction's own fixed point without a rounding, so encoder and decoder agree to
the bit whatever machine, thread count or library made the numbers. Never derive a table from a float that was computed
on the decoder's side; derive an index into `scales.gaussian_tables` from integers.

    static       coder.put(symbols, table)                        one table for all
    per symbol   coder.put_indexed(symbols, tables, index)        a table per symbol, out of a few (scale bins)
                 coder.put_each(symbols, frequencies)             a distribution of its own for every symbol
    adaptive     coder.put_adaptive(symbols, model, context)      learned as it goes, nothing sent beforehand

The decoder asks in the same order: `get`, `get_indexed`, `get_each`, `get_adaptive`, then `end`. A symbol outside a
table with an escape costs the escape and a varint, so nothing is ever clipped.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from foveate.compress.fields import Reader, signed, varint
from foveate.errors import BitstreamError, InputError, MissingExtraError

PRECISION = 16
TOTAL = 2**PRECISION
MAX_ALPHABET = 2**14
Ints = npt.NDArray[np.int64]


def quantise(counts: npt.ArrayLike) -> Ints:
    """Frequencies near the proportions of counts, each at least 1, that sum to 2^16.

    Args:
        counts: whole numbers from 0, at most 2^40; all zero stands for all equal.

    Shape: [..., K] -> [..., K], each row for itself, K from 1 to 2^14.
    Raises: InputError for other counts.

    >>> quantise([3, 0, 1]).tolist()
    [49151, 1, 16384]
    """
    given = np.asarray(counts)
    if given.dtype.kind not in "iu" or given.ndim < 1 or not 1 <= given.shape[-1] <= MAX_ALPHABET:
        raise InputError(f"counts are whole numbers [..., 1 to {MAX_ALPHABET}], got {given.dtype} {given.shape}.")
    whole = given.astype(np.int64)
    if whole.size and (whole.min() < 0 or whole.max() > 2**40):
        raise InputError(f"counts lie within 0 to 2^40, got {whole.min()} to {whole.max()}.")
    sums = whole.sum(-1, keepdims=True)
    if not sums.all():
        whole = np.where(sums == 0, 1, whole)
        sums = whole.sum(-1, keepdims=True)
    frequencies = 1 + whole * (TOTAL - whole.shape[-1]) // sums
    rows = frequencies.reshape(-1, whole.shape[-1])
    rows[np.arange(len(rows)), rows.argmax(-1)] += TOTAL - rows.sum(-1)
    return frequencies


@dataclass(frozen=True, eq=False)
class Table:
    """A distribution over whole numbers lowest .. lowest + K - 1, in fixed point.

    Args:
        frequencies: K whole numbers of at least 1 that sum to 2^16; with an escape, one more, the last.
        lowest: the smallest symbol.
        escape: whether the last frequency stands for every symbol outside.
    """

    frequencies: Ints
    lowest: int = 0
    escape: bool = False
    _model: list[Any] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        values = np.asarray(self.frequencies)
        if values.dtype.kind not in "iu" or values.ndim != 1 or not self.escape < values.size <= MAX_ALPHABET:
            raise InputError(f"a table has 1 to {MAX_ALPHABET} whole frequencies, got {values.dtype} {values.shape}.")
        if values.min() < 1 or values.sum() != TOTAL:
            raise InputError(f"a table's frequencies are at least 1 and sum to {TOTAL}; make them with quantise.")
        object.__setattr__(self, "frequencies", values.astype(np.int64))

    @property
    def size(self) -> int:
        """Number of symbols with a frequency of their own."""
        return self.frequencies.size - self.escape

    @classmethod
    def from_counts(cls, counts: npt.ArrayLike, lowest: int = 0, escape: bool = False) -> Self:
        """A table in proportion to counts [K]; an escape gets the least frequency."""
        given = np.asarray(counts)
        return cls(quantise(np.append(given, [0]) if escape else given), lowest, escape)

    @classmethod
    def from_symbols(cls, symbols: npt.ArrayLike) -> Self:
        """The table that codes these very symbols in the fewest bits; send it along by `to_bytes`."""
        values = _flat(symbols)
        lowest = int(values.min()) if values.size else 0
        if values.size and int(values.max()) - lowest >= MAX_ALPHABET:
            raise InputError(f"symbols from {lowest} to {values.max()} are more than {MAX_ALPHABET}; give an escape.")
        return cls(quantise(np.bincount(values - lowest, minlength=1)), lowest)

    def bits(self, symbols: npt.ArrayLike) -> float:
        """What symbols cost in bits: the sum of -log2 p, escapes without what follows them."""
        return float(PRECISION * _flat(symbols).size - np.log2(self.frequencies[self.places(_flat(symbols))]).sum())

    def places(self, symbols: Ints) -> Ints:
        """Symbols as places 0 .. K - 1 in the table, the escape's for those outside.

        Raises: InputError for a symbol outside a table without an escape.
        """
        places = symbols - self.lowest
        outside = (places < 0) | (places >= self.size)
        if not outside.any():
            return places
        if not self.escape:
            odd = int(symbols[outside][0])
            span = f"{self.lowest} to {self.lowest + self.size - 1}"
            raise InputError(f"the table has symbols {span}, got {odd}; make the table with escape=True.")
        return np.where(outside, self.size, places)

    def to_bytes(self) -> bytes:
        """The table as side information: about one byte for a rare symbol, two for a frequent one."""
        head = varint(self.frequencies.size, int(self.escape)) + signed(self.lowest)
        return head + varint(*(self.frequencies - 1).tolist())

    @classmethod
    def read(cls, fields: Reader) -> Self:
        """Read what `to_bytes` gave. Raises: BitstreamError when it makes no sense."""
        count = fields.varint(most=min(MAX_ALPHABET, fields.left), least=1)
        escape, lowest = fields.varint(most=1), fields.signed(most=2**31)
        values = np.array([1 + fields.varint(most=TOTAL) for _ in range(count)], np.int64)
        if values.sum() != TOTAL or count <= escape:
            raise fields.error(f"a table whose {count} frequencies sum to {values.sum()}")
        return cls(values, lowest, bool(escape))

    def model(self) -> Any:
        """constriction's model of the table, made once."""
        if not self._model:
            self._model.append(_constriction().stream.model.Categorical(_shares(self.frequencies), perfect=False))
        return self._model[0]


_BYTES = Table(np.full(256, TOTAL // 256))


class Encoder:
    """Put symbols in, take bytes out. `finish` ends the stream."""

    def __init__(self) -> None:
        self._coder = _constriction().stream.queue.RangeEncoder()

    def put(self, symbols: npt.ArrayLike, table: Table) -> None:
        """Code symbols of any shape with one table."""
        values = _flat(symbols)
        places = table.places(values)
        if table.frequencies.size > 1 and values.size:
            self._coder.encode(places.astype(np.int32), table.model())
        if table.escape:
            self._overflow(values[places == table.size])

    def put_indexed(self, symbols: npt.ArrayLike, tables: Sequence[Table], index: npt.ArrayLike) -> None:
        """Code symbol i with tables[index[i]]; grouped by table, in the order of the tables."""
        values = _flat(symbols)
        for place, members in _groups(_flat(index), len(tables), values.size):
            self.put(values[members], tables[place])

    def put_each(self, symbols: npt.ArrayLike, frequencies: npt.ArrayLike) -> None:
        """Code symbol i with frequencies[i]. Shape: symbols [n], frequencies [n, K] from `quantise`, K >= 2."""
        values = _flat(symbols)
        if values.size:
            self._coder.encode(values.astype(np.int32), _family(), _rows(frequencies, values.size))

    def put_adaptive(
        self, symbols: npt.ArrayLike, model: "Adaptive | int", context: npt.ArrayLike | None = None
    ) -> None:
        """Code symbols 0 .. alphabet - 1 with tables learned from the symbols before.

        Args:
            model: what was learned so far, and learns on; or the size of an alphabet, to start anew.
            context: for each symbol which of the model's tables; the first when None.
        """
        values, model, chosen = _flat(symbols), Adaptive.of(model), _context(context, np.size(symbols))
        if values.size and not 0 <= values.min() <= values.max() < model.alphabet:
            raise InputError(f"the alphabet has {model.alphabet} symbols, got {values.min()} to {values.max()}.")
        for part in model.parts(values.size):
            self.put_indexed(values[part], model, chosen[part])
            model.learn(values[part], chosen[part])

    def finish(self) -> bytes:
        """The stream. Zero bytes at its end are left out; the decoder reads zeros there anyway."""
        return self._coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")

    def _overflow(self, values: Ints) -> None:
        rest = np.where(values >= 0, 2 * values, -2 * values - 1).astype(np.uint64)
        while rest.size:
            more = rest > 127
            self.put((rest & 127) + np.where(more, 128, 0).astype(np.uint64), _BYTES)
            rest = rest[more] >> np.uint64(7)


class Decoder:
    """Take symbols out in the order in which they were put in.

    Args:
        data: what `Encoder.finish` gave.
        name: of the section, for messages.

    Raises: every method raises BitstreamError when the stream cannot have been made by the same calls.
    """

    def __init__(self, data: bytes, name: str = "stream") -> None:
        self._name = name
        words = np.frombuffer(data + bytes(-len(data) % 4), "<u4").astype(np.uint32)
        self._coder = _constriction().stream.queue.RangeDecoder(words)

    def get(self, count: int, table: Table) -> Ints:
        """The next `count` symbols."""
        if table.frequencies.size == 1 or count == 0:
            places = np.zeros(count, np.int64)
        else:
            places = self._decode(table.model(), count)
        if not table.escape:
            return places + table.lowest
        escaped = places == table.size
        values = places + table.lowest
        values[escaped] = self._overflow(int(escaped.sum()))
        return values

    def get_indexed(self, tables: Sequence[Table], index: npt.ArrayLike) -> Ints:
        """The next symbols, one for each entry of `index`."""
        chosen = _flat(index)
        values = np.empty(chosen.size, np.int64)
        for place, members in _groups(chosen, len(tables), chosen.size):
            values[members] = self.get(members.size, tables[place])
        return values

    def get_each(self, frequencies: npt.ArrayLike) -> Ints:
        """The next symbols, one for each row of frequencies [n, K]."""
        rows = _rows(frequencies, None)
        return self._decode(_family(), rows) if len(rows) else np.zeros(0, np.int64)

    def get_adaptive(self, count: int, model: "Adaptive | int", context: npt.ArrayLike | None = None) -> Ints:
        """The next `count` symbols of `put_adaptive`, with an equal model and the same context."""
        values, model, chosen = np.empty(count, np.int64), Adaptive.of(model), _context(context, count)
        for part in model.parts(count):
            values[part] = self.get_indexed(model, chosen[part])
            model.learn(values[part], chosen[part])
        return values

    def end(self) -> None:
        """Refuse a stream that holds more."""
        if not self._coder.maybe_exhausted():
            raise self._error("more is in it than was asked for")

    def _decode(self, model: Any, what: Any) -> Ints:
        try:
            return self._coder.decode(model, what).astype(np.int64)
        except (AssertionError, ValueError) as error:
            raise self._error("its code makes no sense") from error

    def _overflow(self, count: int) -> Ints:
        values, pending = np.zeros(count, np.int64), np.arange(count)
        for shift in range(0, 63, 7):
            if not pending.size:
                return np.where(values % 2 == 0, values >> 1, -(values >> 1) - 1)
            byte = self.get(pending.size, _BYTES)
            values[pending] |= (byte & 127) << shift
            pending = pending[byte > 127]
        raise self._error("a number has no end")

    def _error(self, problem: str) -> BitstreamError:
        return BitstreamError(f"The file is damaged ({self._name}: {problem}); get a fresh copy.")


class Adaptive(Sequence[Table]):
    """Distributions learned from the symbols coded so far, one for each context.

    Args:
        alphabet: number of symbols, from 0.
        contexts: number of distributions.
    """

    def __init__(self, alphabet: int, contexts: int = 1) -> None:
        if not (1 <= alphabet <= MAX_ALPHABET and contexts >= 1):
            raise InputError(f"an alphabet has 1 to {MAX_ALPHABET} symbols, got {alphabet} in {contexts} contexts.")
        self.alphabet = alphabet
        self._counts = np.ones((contexts, alphabet), np.int64)
        self._used = self._counts.copy()
        self._seen, self._left = 0, 0
        self._tables: dict[int, Table] = {}

    @classmethod
    def of(cls, model: "Adaptive | int") -> "Adaptive":
        """The model itself, or a new one for an alphabet."""
        return model if isinstance(model, Adaptive) else cls(model)

    def parts(self, count: int) -> Iterator[slice]:
        """Cut `count` symbols where the tables are renewed: whenever a quarter more has been seen, 32 at least."""
        start = 0
        while start < count:
            if self._left == 0:
                self._used, self._tables = self._counts.copy(), {}
                self._left = max(32, self._seen // 4)
            stop = min(count, start + self._left)
            yield slice(start, stop)
            start = stop

    def learn(self, symbols: Ints, context: Ints) -> None:
        """Take symbols into account: one seen weighs as much as 32 that were only possible."""
        np.add.at(self._counts, (context, symbols), 32)
        self._seen += symbols.size
        self._left -= symbols.size

    def __len__(self) -> int:
        return len(self._counts)

    def __getitem__(self, context: Any) -> Any:
        if context not in self._tables:
            self._tables[context] = Table(quantise(self._used[context]))
        return self._tables[context]


def _context(context: npt.ArrayLike | None, count: int) -> Ints:
    return np.zeros(count, np.int64) if context is None else _flat(context)


def _groups(index: Ints, tables: int, count: int) -> Iterator[tuple[int, npt.NDArray[np.intp]]]:
    """Each table that is used, and which symbols use it."""
    if index.size != count or (count and not 0 <= index.min() <= index.max() < tables):
        raise InputError(f"each of {count} symbols needs an index below {tables}, got {index.size} indices.")
    order = np.argsort(index, kind="stable")
    ends = np.bincount(index, minlength=1).cumsum() if count else np.zeros(0, np.int64)
    start = 0
    for place, end in enumerate(ends.tolist()):
        if end > start:
            yield place, order[start:end]
        start = end


def _rows(frequencies: npt.ArrayLike, count: int | None) -> npt.NDArray[np.float64]:
    rows = np.asarray(frequencies)
    if rows.ndim != 2 or rows.shape[1] < 2 or count not in (None, len(rows)) or (rows.sum(-1) != TOTAL).any():
        raise InputError(f"frequencies are [symbols, 2 or more] and sum to {TOTAL}, got {rows.shape}; use quantise.")
    return _shares(rows)


def _shares(frequencies: Ints) -> npt.NDArray[np.float64]:
    return frequencies / TOTAL  # exact: whole numbers below 2^17 by a power of two


def _flat(values: npt.ArrayLike) -> Ints:
    given = np.asarray(values)
    if given.size and given.dtype.kind not in "iu":
        raise InputError(f"symbols are whole numbers, got {given.dtype}; round them first.")
    return given.reshape(-1).astype(np.int64)


@lru_cache(maxsize=1)
def _family() -> Any:
    return _constriction().stream.model.Categorical(perfect=False)


def _constriction() -> ModuleType:
    try:
        import constriction  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError as error:
        raise MissingExtraError("Entropy coding needs constriction; run `pip install foveate[codec]`.") from error
    return constriction
