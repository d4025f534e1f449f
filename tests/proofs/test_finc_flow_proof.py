"""The proof of FInC Flow: its baselines invert the same layer, and its verdict can fail."""

import pytest
import torch

from foveate.generate.finc_flow import FInCUnit
from foveate.meter import Comparison
from foveate.ops.triangular_conv import triangular_conv, triangular_solve
from foveate.proofs import ProofContext
from foveate.proofs.generate import finc_flow
from foveate.proofs.generate.finc_flow import by_raster, crops, dense_matrix, verdict


def test_the_baselines_give_what_the_system_gives():
    torch.manual_seed(0)
    unit, y = FInCUnit(8), torch.randn(2, 8, 5, 6)
    torch.testing.assert_close(by_raster(unit, y), unit.inverse(y), atol=1e-5, rtol=0)
    weight = unit.weight[:1]
    x = torch.randn(3, 2, 4, 4)
    y = triangular_conv(x, weight)
    torch.testing.assert_close((dense_matrix(weight, 4) @ x.flatten(1).T).T.view_as(y), y, atol=1e-5, rtol=0)
    torch.testing.assert_close(triangular_solve(y, weight), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("figures", "holds"),
    [
        ((5, 10, 1.3, 1e-5), True),
        ((4.9, 10, 1.3, 1e-5), False),
        ((5, 9.9, 1.3, 1e-5), False),
        ((5, 10, 1.4, 1e-5), False),
        ((5, 10, 1.3, 2e-5), False),
    ],
)
def test_the_verdict_can_fail(figures, holds):
    assert verdict(*figures) is holds


def test_crops_are_luminance_and_follow_the_seed():
    photographs = [torch.rand(3, 20, 9), torch.rand(3, 8, 8)]
    first, second = (crops(photographs, 5, torch.Generator().manual_seed(0)) for _ in range(2))
    assert first.shape == (5, 1, 8, 8)
    assert torch.equal(first, second)


@pytest.mark.parametrize(("slower", "holds"), [(20.0, True), (2.0, False)])
def test_the_evidence_carries_what_was_measured(monkeypatch, slower, holds):
    """On clocks that were set: the wavefront's time is proportional to n."""

    def race(weight, n, *_):
        return Comparison(("raster", "wavefront"), ((slower * n,), (float(n),)), None, (None, None))

    monkeypatch.setattr(finc_flow, "race", race)
    monkeypatch.setattr(finc_flow, "DENSE", {"quick": 8})
    monkeypatch.setattr(finc_flow, "sampling_race", lambda _: (race(None, 64), 1000))
    monkeypatch.setattr(finc_flow, "STEPS", {"quick": 1})
    monkeypatch.setattr(finc_flow, "TEST_CROPS", 16)
    monkeypatch.setattr(finc_flow, "growth", lambda *_: None)
    monkeypatch.setattr(
        ProofContext, "photographs", lambda _: [("coffee", torch.rand(3, 9, 9)), ("a", torch.rand(3, 9, 9))]
    )
    evidence = finc_flow.prove(ProofContext(progress=False))
    rows = {row.name: row.metrics for row in evidence.rows}
    assert evidence.holds is holds
    assert evidence.measured_ratio == slower
    assert rows["raster, n = 64"]["dependent_steps"] == 4096
    assert rows["wavefront, n = 64"]["dependent_steps"] == 127
    assert rows["wavefront, n = 32"]["error"] < 1e-5
    assert 0 < rows["flow with FInC units"]["bits_per_dim"] < 20
