"""Coding by circuits in whole numbers: exact, near the likelihood, safe against what nobody encoded."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")

from foveate.compress.circuit import HiddenChowLiuTree
from foveate.compress.circuit_coding import FixedCircuit, _fifteen_bits
from foveate.errors import BitstreamError, InputError

PLACES = np.array([(c, y, x) for y in (-1, 0, 1) for x in (-1, 0, 1, 2) if y < 0 or x < 2 for c in (0, 1)])
INSIDE = (PLACES[:, 1:] >= 0).all(1)


def model(states: int = 5, seed: int = 0) -> HiddenChowLiuTree:
    random = np.random.default_rng(seed)
    parents = [-1, *(int(random.integers(0, node)) for node in range(1, len(PLACES)))]
    made = HiddenChowLiuTree(parents, states, 256, PLACES[:, 0], seed)
    distance = np.abs(np.arange(256) - 128) / np.geomspace(0.5, 40, states)[:, None]
    with torch.no_grad():
        made.emissions.add_(torch.from_numpy(-distance))
        made.transitions.add_(4 * torch.eye(states))
    return made


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.clip(random.laplace(128, random.uniform(1, 9, (2, height, width))), 0, 255).astype(np.uint8)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 50), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_symbols_come_back(seed: int, height: int, width: int, wild: bool) -> None:
    circuit = FixedCircuit.of(model(seed=seed), PLACES)
    symbols = noise(height, width, seed)
    if wild:
        symbols = np.random.default_rng(seed).integers(0, 256, symbols.shape).astype(np.uint8)
    data = circuit.encode(symbols)
    assert np.array_equal(circuit.decode(data, height, width), symbols)


def test_the_length_is_the_likelihood_given_what_is_around() -> None:
    made = model()
    symbols = noise(40, 60)
    padded = np.pad(symbols, ((0, 0), (1, 2), (1, 2)))
    within = np.pad(np.ones((40, 60), bool), ((1, 2), (1, 2)))
    ys, xs = (a.reshape(-1, 1) + 1 for a in np.mgrid[0:40:2, 0:60:2])
    x = torch.from_numpy(padded[PLACES[:, 0], ys + PLACES[:, 1], xs + PLACES[:, 2]])
    known = torch.from_numpy(within[ys + PLACES[:, 1], xs + PLACES[:, 2]])
    with torch.no_grad():
        bits = float((made(x, known & ~torch.from_numpy(INSIDE)) - made(x, known)).sum() / np.log(2))
    assert 8 * len(FixedCircuit.of(made, PLACES).encode(symbols)) == pytest.approx(bits, rel=5e-3, abs=64)


def test_evidence_shortens_the_code() -> None:
    """Each symbol repeats its neighbour on the left, which only evidence tells the first of a patch."""
    made = HiddenChowLiuTree([-1, 0], 2, 256, [0, 0])
    with torch.no_grad():
        made.prior.zero_()
        made.transitions.copy_(torch.tensor([[9.0, 0.0], [0.0, 9.0]]).expand(2, 2, 2))
        made.emissions.fill_(-20)
        made.emissions[0, 0, 7] = made.emissions[0, 1, 9] = 0
    symbols = np.repeat(np.random.default_rng(0).choice([7, 9], (1, 400, 1)), 40, 2).astype(np.uint8)
    alone = HiddenChowLiuTree([-1], 2, 256, [0])
    with torch.no_grad():
        alone.prior.zero_()
        alone.emissions.copy_(made.emissions)
    given = FixedCircuit.of(made, [(0, 0, -1), (0, 0, 0)]).encode(symbols)
    assert len(given) < len(FixedCircuit.of(alone, [(0, 0, 0)]).encode(symbols)) / 8


def test_certain_symbols_cost_next_to_nothing_and_impossible_ones_16_bits() -> None:
    made = HiddenChowLiuTree([-1], 2, 256, [0])
    with torch.no_grad():
        made.emissions.fill_(-50)
        made.emissions[0, :, 128] = 0
    circuit = FixedCircuit.of(made, [(0, 0, 0)])
    assert circuit.emissions[0, 0, 128] == 2**16 - 255
    assert len(circuit.encode(np.full((1, 50, 200), 128, np.uint8))) == 8 + 4
    assert len(circuit.encode(np.full((1, 50, 200), 5, np.uint8))) == pytest.approx(20_000, abs=12)


@settings(deadline=None, max_examples=40)
@given(st.binary(max_size=200))
def test_what_nobody_encoded_is_refused(data: bytes) -> None:
    with pytest.raises(BitstreamError, match="damaged"):
        FixedCircuit.of(model(), PLACES).decode(data, 30, 30)


def test_a_short_stream_does_not_keep_a_large_picture_busy() -> None:
    circuit = FixedCircuit.of(model(), PLACES)
    data = circuit.encode(noise(4, 4))
    for wrong in (data[:-4], data + bytes(4), data[:-1], b""):
        with pytest.raises(BitstreamError):
            circuit.decode(wrong, 4, 4)
    with pytest.raises(BitstreamError):
        circuit.decode(data, 2000, 3000)


def test_rounding_to_fifteen_bits() -> None:
    rows = np.array([[40000, 1, 20001], [1, 1, 2], [0, 32767, 3]])
    assert _fifteen_bits(rows).tolist() == [[20000, 1, 10000], [8192, 8192, 16384], [1, 32767, 3]]


def test_tables_that_do_not_fit_are_refused() -> None:
    circuit = FixedCircuit.of(model(), PLACES)
    parts = {name: getattr(circuit, name) for name in ("places", "parents", "prior", "transitions", "emissions")}
    wrong = {
        "transitions": circuit.transitions[:, :, :-1],
        "emissions": circuit.emissions + 1,
        "prior": circuit.prior.astype(np.float32),
        "places": circuit.places[1:],
    }
    for name, table in wrong.items():
        with pytest.raises(InputError, match="circuit"):
            FixedCircuit(**{**parts, name: table})
