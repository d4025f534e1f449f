"""Symbols to bits and back by a hidden Chow-Liu tree in whole numbers: the same on every machine.

A `FixedCircuit` models the symbols of a small patch and, as evidence, those around it that are decoded already. The
patches of a picture are coded from left to right and from the top; in each, evidence goes in (what lies outside the
picture is summed out), then variable after variable is coded with its exact conditional, by a walk of messages through
the tree (`foveate.compress.circuit.walk`). Encoder and decoder are one loop.

Floats would round differently elsewhere, so nothing is one. A message is M whole numbers 1 .. 2^15 - 1, a row of
transitions or emissions is M or S whole numbers that sum to 2^16; their products are below 2^31, summed exactly and
shifted back to 15 bits. For coding, the states' weights are made to sum to 2^14, so that

    frequency of x  =  sum_z w(z) E(x | z)        of  2^30  in all, at least 2^14

exactly, for all of it is whole; the decoder finds x by bisection of the cumulative sums. The bits are range asymmetric
numeral systems (rANS) with a 64-bit state and 32-bit words: last in, first out, so the encoder notes what it codes and
writes it backwards.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from foveate.compress.blended_prediction import Bytes
from foveate.compress.circuit import HiddenChowLiuTree, Tree, coding_order, walk
from foveate.compress.entropy import TOTAL, quantise
from foveate.errors import BitstreamError, InputError

ALPHABET = 256


@dataclass(frozen=True, eq=False)
class FixedCircuit:
    """A circuit in whole numbers.

    Args:
        places: channel, row and column of each variable from the patch's first pixel; evidence lies above or to the
            left of it. Shape: [D, 3].
        parents: of the tree, -1 at the root. Shape: [D].
        prior: of the root's states. Shape: [M], as the next two whole and of sum 2^16 in the last axis.
        transitions: from the parent's state to the node's. Shape: [D, M, M].
        emissions: of the channel. Shape: [channels, M, 256].

    Raises: InputError when they do not fit together.
    """

    places: npt.NDArray[Any]
    parents: npt.NDArray[Any]
    prior: npt.NDArray[Any]
    transitions: npt.NDArray[Any]
    emissions: npt.NDArray[Any]
    _tables: list[Any] = field(default_factory=list, repr=False, init=False)

    def __post_init__(self) -> None:
        count, states = len(self.parents), len(self.prior)
        shapes = ((count, 3), (count, states, states), (self.places[:, 0].max() + 1, states, ALPHABET))
        if (self.places.shape, self.transitions.shape, self.emissions.shape) != shapes:
            raise InputError(f"a circuit of {count} variables and {states} states has tables of {shapes}.")
        for table in (self.prior, self.transitions, self.emissions):
            if table.dtype.kind not in "iu" or table.min() < 1 or (table.sum(-1, dtype=np.int64) != TOTAL).any():
                raise InputError(f"a circuit's tables are whole, at least 1 and sum to {TOTAL}, got {table.dtype}.")

    @property
    def side(self) -> int:
        """Rows and columns of a patch."""
        return int(self.places[:, 1].max()) + 1

    @property
    def channels(self) -> int:
        """Channels of the pictures it codes."""
        return int(self.emissions.shape[0])

    @classmethod
    def of(cls, model: HiddenChowLiuTree, places: npt.ArrayLike) -> "FixedCircuit":
        """Round a learned circuit, once and for all; a variable's emission table is its channel's."""
        prior, transitions, emissions = (
            quantise((p.detach().double().numpy() * 2**40).round().astype(np.int64)).astype(np.uint16)
            for p in model.probabilities()
        )
        return cls(np.asarray(places, np.int8), model.tree.parents.astype(np.int16), prior, transitions, emissions)

    def tables(self) -> tuple[Any, ...]:
        """What the loop reads, derived by whole-number arithmetic when first asked for."""
        if not self._tables:
            tree = Tree.of(self.parents)
            evidence: npt.NDArray[np.bool_] = np.any(self.places[:, 1:] < 0, axis=1)
            coded = [node for node in coding_order(tree) if not evidence[node]]
            program = np.array(walk(tree, coded, np.flatnonzero(evidence).tolist()), np.int64)
            starts = np.cumsum([0, *map(len, tree.children)])
            children = np.array([c for below in tree.children for c in below], np.int64)
            emitted = self.emissions.astype(np.int64)
            cumulative = np.zeros((self.channels, ALPHABET + 1, len(self.prior)), np.int32)
            cumulative[:, 1:] = emitted.cumsum(2).transpose(0, 2, 1)
            down = np.array(self.transitions, order="C")
            up = np.ascontiguousarray(down.transpose(0, 2, 1))
            places = self.places.astype(np.int64)
            prior, likely = _fifteen_bits(self.prior[None])[0], _fifteen_bits(emitted.transpose(0, 2, 1))
            structure = (places, evidence, program, tree.parents, starts, children)
            self._tables.append((*structure, prior, up, down, likely, cumulative))
        found: tuple[Any, ...] = self._tables[0]
        return found

    def encode(self, symbols: Bytes) -> bytes:
        """Code symbols [channels, H, W]."""
        words = np.zeros(symbols.size // 2 + 4, np.uint32)
        count = _kernel()(np.array(symbols, order="C"), words, False, self.side, *self.tables())
        return words[:count].astype("<u4").tobytes()

    def decode(self, data: bytes, height: int, width: int) -> Bytes:
        """Symbols [channels, height, width] out of what `encode` gave.

        Raises: BitstreamError when `encode` cannot have given it.
        """
        symbols = np.zeros((self.channels, height, width), np.uint8)
        words = np.frombuffer(data[: len(data) // 4 * 4], "<u4").astype(np.uint32)
        used = _kernel()(symbols, words, True, self.side, *self.tables())
        if used * 4 != len(data):
            raise BitstreamError("The file is damaged (circuit: its code makes no sense); get a fresh copy.")
        return symbols


def _fifteen_bits(values: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """Rows scaled by powers of two, so that the largest has 15 bits and none is 0."""
    whole = values.astype(np.int64)
    bits = np.frexp(whole.max(-1, keepdims=True).astype(np.float64))[1].astype(np.int64)
    shifted = np.where(bits > 15, whole >> np.maximum(bits - 15, 0), whole << np.maximum(15 - bits, 0))
    return np.ascontiguousarray(np.maximum(shifted, 1).astype(np.int32))


def _kernel() -> Any:
    from foveate.compress._circuit_kernel import run  # compiled when first used

    return run
