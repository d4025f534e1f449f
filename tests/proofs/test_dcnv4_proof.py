"""The proof of DCNv4: the baseline is DCNv3, pictures are moved as told, and the verdict can fail."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.meter import Comparison
from foveate.ops.dcnv4 import dcnv4
from foveate.proofs import ProofContext
from foveate.proofs.ops import dcnv4 as proof


def compared_once(*_: object, **__: object) -> Comparison:
    return Comparison(("a", "b"), ((0.2,), (0.1,)), None, (None, None))


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> ProofContext:
    dice = torch.Generator().manual_seed(0)
    picture = F.interpolate(torch.rand(1, 3, 20, 20, generator=dice), (120, 140), mode="bicubic")[0]
    monkeypatch.setattr(ProofContext, "photographs", lambda self: [("camera", picture)])
    return ProofContext(progress=False)


def test_the_proof_runs(context: ProofContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "compare", compared_once)
    monkeypatch.setattr(proof, "STEPS", {"quick": (2, 2)})
    evidence = proof.prove(context)
    assert evidence.measured_ratio == 2.0
    assert not evidence.holds
    rows = {row.name: row.metrics for row in evidence.rows}
    assert rows["DCNv3 by grid_sample"]["reads"] == 16 * rows["DCNv4"]["reads"]
    plain, layer = rows["3x3 convolution: motion undone"], rows["DCNv4 layer: motion undone"]
    assert plain["parameters"] >= layer["parameters"]


def test_the_baseline_is_dcnv3() -> None:
    value, packed = torch.randn(2, 5, 6, 32), torch.randn(2, 5, 6, 56)
    expected = dcnv4(value, packed, 2, softmax=True)
    torch.testing.assert_close(proof.dcnv3(value, packed, 2), expected, atol=2e-5, rtol=1e-5)


def test_pictures_are_moved_as_told(context: ProofContext) -> None:
    x, goal = proof.motions(context)(3)
    assert x.shape == (3, 3, proof.SIDE, proof.SIDE)
    assert x[:, 1:].abs().max() <= 1
    assert torch.equal(x[:, 1:], x[:, 1:, :1, :1].expand(-1, -1, proof.SIDE, proof.SIDE))
    ramp = torch.arange(50.0).expand(1, 1, 40, 50)
    corner = torch.tensor([[3.25, 7.0]])
    torch.testing.assert_close(proof.cut(ramp, corner, 4)[0, 0, 0], 3.25 + torch.arange(4.0), atol=1e-4, rtol=0)
    edged = F.pad(goal[..., 3:-3, 3:-3], (3, 3, 3, 3), value=9.0)
    assert proof.inner_error(edged, goal) == 0
    assert proof.inner_error(edged + 1, goal) == pytest.approx(1)


def test_no_average_of_neighbours_is_an_edge(context: ProofContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "STEPS", {"quick": (40, 0)})
    assert proof.edge_error(context, softmax=True) > 0.45
    assert proof.edge_error(context, softmax=False) < 0.2


@given(st.floats(0, 10), st.floats(0, 1), st.floats(0, 1), st.floats(0, 20))
@settings(deadline=None, max_examples=50)
def test_the_verdict_needs_all_four(speedup: float, averaged: float, free: float, gain: float) -> None:
    expected = speedup > 3 and averaged >= 0.45 and free <= 1e-4 and gain >= 5
    assert proof.verdict(speedup, averaged, free, gain) == expected
    assert proof.verdict(4, 0.5, 1e-6, 9)
    assert not proof.verdict(2.9, averaged, free, gain)
    assert not proof.verdict(speedup, 0.4, free, gain)
    assert not proof.verdict(speedup, averaged, 0.1, gain)
    assert not proof.verdict(speedup, averaged, free, 4.9)
