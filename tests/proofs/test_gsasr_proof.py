"""The proof of GSASR: its baselines are what they claim to be, and its verdict can fail."""

import math

import pytest
import torch

from foveate.layers.implicit import MLP, queries, subpixel_offsets
from foveate.layers.rescaler import Filter
from foveate.meter import Comparison
from foveate.proofs.evidence import ProofContext
from foveate.proofs.restore import gsasr
from foveate.restore.gsasr import FAR, Gaussians

GOOD = {"gains": dict.fromkeys(gsasr.SCALES, 0.2), "versus": 0.0, "allowed": 0.1, "slant": 0.1, "speedups": [2.0, 3.0]}


@pytest.mark.parametrize(
    ("change", "holds"),
    [
        ({}, True),
        ({"gains": GOOD["gains"] | {"x2.7": -0.01}}, False),
        ({"gains": GOOD["gains"] | {gsasr.BEYOND: -0.05}}, True),
        ({"gains": GOOD["gains"] | {gsasr.BEYOND: -0.15}}, False),
        ({"versus": -0.11}, False),
        ({"slant": 0.0}, False),
        ({"speedups": [1.3, 9.0]}, False),
    ],
)
def test_the_verdict_needs_every_part(change, holds):
    assert gsasr.verdict(**(GOOD | change)) is holds


def test_what_is_timed_against_drawing_is_a_query_per_pixel():
    torch.manual_seed(0)
    mlp, features = MLP(8 + 4, [16] * 4, 3), torch.rand(1, 8, 3, 5)
    rows = features[0].permute(1, 2, 0).flatten(0, 1)
    fast = mlp.everywhere(rows, subpixel_offsets(4).float()).view(3, 5, 4, 4, 3).permute(0, 2, 1, 3, 4)
    torch.testing.assert_close(fast.flatten(0, 1).flatten(1, 2), mlp(queries(features, 12, 20))[0].view(12, 20, 3))


def test_terms_are_the_pixels_inside_ellipses():
    conics = torch.tensor([[[4.0, 1.0, 1.0]]])
    found = Gaussians(torch.full((1, 1, 2), 50.0), conics, torch.ones(1, 1, 3))
    at = torch.arange(-50, 50) + 0.0
    inside = 4 * at**2 + 2 * at * at[:, None] + at[:, None] ** 2 <= FAR**2
    assert gsasr.terms(found) == pytest.approx(float(inside.sum()), rel=0.05)


@pytest.mark.parametrize("scale", [(2.0, 2.0), (2.7, 2.7), (2.0, 3.3), (8.0, 8.0)])
def test_twins_have_the_scale(scale):
    low, high = gsasr.twins(torch.rand(1, 3, 61, 83), scale)
    for small, large, s, n in zip(low.shape[2:], high.shape[2:], scale, (61, 83), strict=True):
        assert n - s - 1 < large <= n
        assert abs(large - s * small) <= 0.5
    assert gsasr.score(Filter("bicubic").enlarge, torch.full((1, 3, 61, 83), 0.4), scale) > 60


def test_gratings_are_slanted_stripes():
    found = gsasr.gratings(96)
    assert len(found) == 4
    for picture in found:
        assert picture.shape == (1, 3, 96, 96)
        assert (picture[..., 1:] - picture[..., :-1]).any()
        assert (picture[..., 1:, :] - picture[..., :-1, :]).any()


def test_the_proof_runs_and_reports_every_scale(monkeypatch):
    photographs = [(name, torch.rand(3, 70, 72)) for name in ("brick", "coffee", "chelsea", "camera", "hubble")]
    monkeypatch.setattr(ProofContext, "photographs", lambda self: photographs)
    monkeypatch.setattr(gsasr, "STEPS", {"quick": 1})
    monkeypatch.setattr(gsasr, "_figure", lambda *_: None)
    clock = Comparison(("a", "b"), ((0.2,), (0.1,)), (200.0, 100.0), (None, None))
    monkeypatch.setattr(gsasr, "race", lambda _: {4: (clock, 0.5), 8: (clock, 0.5), 16: (clock, 0.5)})
    monkeypatch.setattr(gsasr, "gratings", lambda: [torch.rand(1, 3, 48, 48)])
    found = gsasr.prove(ProofContext(progress=False))
    rows = {row.name: row.metrics for row in found.rows}
    assert list(rows)[:4] == ["bicubic", "Gaussians", "round Gaussians", "LIIF head"]
    for name in list(rows)[:4]:
        assert set(rows[name]) == {*gsasr.SCALES, "gratings_x4"}
        assert all(math.isfinite(value) for value in rows[name].values())
    assert found.measured_ratio == pytest.approx(2.0)
    assert any("x4 0.33" in note for note in found.notes)
