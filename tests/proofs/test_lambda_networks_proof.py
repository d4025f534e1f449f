"""The proof of LambdaNetworks: baselines are right, digits are digits, and the verdict can fail."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.meter import Comparison, stored_bytes
from foveate.proofs import ProofContext
from foveate.proofs.encode import lambda_networks as proof


def test_the_proof_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    once = Comparison(("a", "b"), ((0.2,), (0.1,)), None, (None, None))
    monkeypatch.setattr(proof, "compare", lambda *_, **__: once)
    monkeypatch.setattr(proof, "MAPS", {"quick": (4, 8)})
    monkeypatch.setattr(proof, "STEPS", {"quick": 2})
    monkeypatch.setattr(proof, "TESTED", 20)
    monkeypatch.setattr(proof, "AT", 8)
    evidence = proof.prove(ProofContext(progress=False))
    names = [row.name for row in evidence.rows]
    assert names[:3] == ["attention, 4 x 4", "attention, fused, 4 x 4", "lambda layer, 4 x 4"]
    plain, _, ours = (row.metrics["stored_mb"] for row in evidence.rows[3:6])
    assert evidence.measured_ratio == pytest.approx(plain / ours)
    assert evidence.rows[-1].metrics["parameters"] == 14_995_592


def test_both_attentions_are_the_same_and_one_keeps_its_weights() -> None:
    plain, fused = proof.Attention(fused=False), proof.Attention(fused=True)
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(1, proof.DIM, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), fused(x), atol=1e-5, rtol=1e-4)
    weights = 4 * proof.HEADS * 256**2
    assert stored_bytes(plain, x) - stored_bytes(fused, x) > 0.7 * weights


def test_growth_is_that_of_the_two_largest_maps() -> None:
    assert proof.growth({4: 5.0, 8: 1.0, 16: 16.0}) == pytest.approx(2.0)
    assert proof.growth({4: 5.0, 8: 1.0, 16: 4.0}) == pytest.approx(1.0)


def test_digits_move_and_differ() -> None:
    pictures, labels = proof.digits(0, "cpu")(200)
    assert pictures.shape == (200, 1, proof.SIDE, proof.SIDE)
    assert set(labels.tolist()) == set(range(10))
    means = torch.stack([pictures[labels == n].mean(0).flatten() for n in range(10)])
    assert torch.pdist(means).min() > 1
    again, _ = proof.digits(0, "cpu")(200)
    assert torch.equal(again, pictures)
    other, _ = proof.digits(1, "cpu")(200)
    assert not torch.equal(other, pictures)


@given(st.floats(1, 20), st.floats(0, 3), st.floats(0, 3), st.floats(-20, 40))
@settings(deadline=None, max_examples=50)
def test_the_verdict_needs_all_of_it(ratio: float, attention: float, ours: float, lag: float) -> None:
    holds = ratio >= 8 and attention >= 1.7 and ours <= 1.2 and lag >= 10
    assert proof.verdict(ratio, [attention, ours], lag) == holds
    assert not proof.verdict(7.9, [2.0, 1.0], 20)
    assert not proof.verdict(9, [1.6, 1.0], 20)
    assert not proof.verdict(9, [2.0, 1.3], 20)
    assert not proof.verdict(9, [2.0, 1.0], 9)
