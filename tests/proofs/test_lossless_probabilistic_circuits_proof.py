"""Proof of lossless compression with circuits: its parts measure what they say, and the verdict can fail."""

import numpy as np
import pytest
import torch

from foveate.proofs import ProofContext
from foveate.proofs.compress import lossless_probabilistic_circuits as proof

FINE = proof.Found(
    saved=3.0,
    growth=1.0,
    longest_walk=3.0,
    error=1e-12,
    bits={"independent": 4.0, "circuit": 1.3, "network": 1.3, "zlib": 2.0, "lzma": 1.9, "png": 2.1},
    overhead=1.01,
    speedup=5.0,
    lossless=True,
    beaten=[True, True],
)


@pytest.mark.parametrize(
    "broken",
    [
        {"saved": 2.6},
        {"growth": 1.2},
        {"longest_walk": 3.1},
        {"error": 1e-6},
        {"bits": FINE.bits | {"independent": 1.4}},
        {"bits": FINE.bits | {"network": 1.2}},
        {"bits": FINE.bits | {"lzma": 1.2}},
        {"overhead": 1.03},
        {"speedup": 4.9},
        {"lossless": False},
        {"beaten": [True, False]},
    ],
)
def test_the_verdict_needs_all_of_it(broken: dict) -> None:
    assert proof.verdict(FINE)
    assert not proof.verdict(FINE._replace(**broken))


def test_the_network_sees_only_what_is_decoded() -> None:
    torch.manual_seed(0)
    network = proof.Network(9, 32)
    x = torch.randint(0, proof.LEVELS, (1, 9))
    with torch.no_grad():
        first = network(x)
        for pixel in range(9):
            changed = x.clone()
            changed[0, pixel] = (x[0, pixel] + 5) % proof.LEVELS
            same = (network(changed) == first).all(-1)[0]
            assert same[: pixel + 1].all()
            assert pixel == 8 or not same[pixel + 1 :].all()


def test_decoding_pixel_by_pixel_gives_the_distributions_of_one_pass() -> None:
    torch.manual_seed(0)
    network = proof.Network(9, 32)
    x = torch.randint(0, proof.LEVELS, (5, 9), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.allclose(network.decoder(x)(), network(x)[:, -1].softmax(1), atol=1e-5)
        p = network(x).softmax(-1).gather(2, x.long()[..., None])
        assert torch.allclose(network.bits(x), -p.log2().sum((1, 2)), atol=1e-4)


def test_nodes_are_counted_in_balanced_trees() -> None:
    _, nodes = proof._cost()
    assert sorted(nodes) == [2**levels for levels in proof.TREES]
    for count, (naive, partial, walked) in nodes.items():
        assert naive == count**2
        assert count < partial < count * np.log2(count)
        assert 2 * count < walked <= 3 * count


def test_training_and_test_patches_come_from_different_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    slope = {name: torch.linspace(0, 1, 80).expand(3, 40, 80) for name in proof.NAMES}
    monkeypatch.setattr(proof.pictures, "samples", lambda: slope)
    for left in (True, False):
        found = proof._draw(np.random.default_rng(0), 30, left)
        assert found.shape == (30, 64)
        assert ((found < 8) == left).all()


def test_without_data_there_are_photographs_all_the_same() -> None:
    assert list(proof._sets(ProofContext())) == ["photographs"]
