"""Proof of ScatterMoE: the baselines compute the same mixture, and the verdict can fail."""

import math

import pytest
import torch

from foveate.engine.route import Route
from foveate.meter import Comparison, count_flops
from foveate.proofs import ProofContext
from foveate.proofs.ops import scattermoe
from foveate.proofs.ops.scattermoe import (
    BASELINES,
    BLOCK,
    dense,
    mixture,
    padded_rows,
    saved_bytes,
    scattered,
    step,
    verdict,
)


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("name", BASELINES)
def test_every_way_computes_the_same_mixture(name, skewed):
    m = mixture(50, 8, 12, 6, 3, torch.Generator().manual_seed(1), skewed)
    torch.testing.assert_close(BASELINES[name](m), scattered(m))
    torch.testing.assert_close(step(BASELINES[name], m), step(scattered, m), atol=1e-6, rtol=1e-4)


def test_each_way_does_the_work_that_its_padding_says():
    m = mixture(300, 8, 12, 6, 2, torch.Generator().manual_seed(0), skewed=True)
    row, counts = 2 * 2 * 8 * 12, Route.of(m.expert, 6).counts
    blocks, capacity = padded_rows(counts)
    assert blocks == sum(math.ceil(c / BLOCK) * BLOCK for c in counts) > 600
    rows = {"block padding": blocks, "capacity": capacity, "loop and mask": 600, "dense": 6 * 300}
    with torch.no_grad():
        assert {name: count_flops(layer, m) / row for name, layer in BASELINES.items()} == rows
        assert count_flops(scattered, m) / row == 600


def test_scattermoe_keeps_hidden_values_only():
    m = mixture(64, 8, 12, 4, 2, torch.Generator().manual_seed(0))
    assert saved_bytes(scattered, m) == 2 * (64 * 2 * 12) * 4  # before and after the activation
    assert saved_bytes(BASELINES["block padding"], m) > saved_bytes(scattered, m)


def test_crowded_tokens_are_crowded_and_name_no_expert_twice():
    m = mixture(400, 4, 4, 8, 2, torch.Generator().manual_seed(0), skewed=True)
    counts = Route.of(m.expert, 8).counts
    assert counts[0] > 2 * counts[-1]
    assert (m.expert[:, 0] != m.expert[:, 1]).all()


@pytest.mark.parametrize(
    ("speedup", "kept", "crowding", "apart", "holds"),
    [
        (1.1, 0.6, 1.1, 1e-14, True),
        (0.99, 0.6, 1.1, 1e-14, False),
        (1.1, 0.76, 1.1, 1e-14, False),
        (1.1, 0.6, 1.3, 1e-14, False),
        (1.1, 0.6, 1.1, 1e-9, False),
    ],
)
def test_the_verdict_can_fail(speedup, kept, crowding, apart, holds):
    assert verdict(speedup, kept, crowding, apart) is holds


def test_a_wrong_gradient_is_found(monkeypatch):
    assert scattermoe.largest_error(ProofContext()) < 1e-12
    monkeypatch.setattr(scattermoe, "scattered", lambda m: dense(m) + 1e-6 * m.x)
    assert scattermoe.largest_error(ProofContext()) > 1e-9


def test_the_proof_reports_what_it_measured(monkeypatch):
    def timed(baseline, method, *_, **__):
        return Comparison(("a", "b"), ((0.3,), (0.2,)), None, (300, 200))

    monkeypatch.setattr(scattermoe, "compare", timed)
    monkeypatch.setattr(scattermoe, "SIZES", {"quick": (64, 8, 8)})
    evidence = scattermoe.prove(ProofContext(progress=False))
    assert evidence.measured_ratio == pytest.approx(1.5)
    assert not evidence.holds  # crowding is 1.5 in this stand-in
    assert [row.name for row in evidence.rows][-1] == "ScatterMoE, E=32, k=4"
    assert len(evidence.rows) == 9
