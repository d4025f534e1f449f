"""The proof of deformable co-design: pictures hold what is looked for, costs come from the model, and it can fail."""

import pytest
import torch

from foveate.layers.quantise import WeightQuantiser
from foveate.proofs import ProofContext
from foveate.proofs.recognize import deformable_codesign as proof


@pytest.mark.parametrize("mode", ["quick", "full"])
def test_the_proof_runs(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "STEPS", {mode: 2})
    monkeypatch.setattr(proof, "TUNED", {mode: 1})
    monkeypatch.setattr(proof, "TESTED", 20)
    evidence = proof.prove(ProofContext(full=mode == "full", progress=False))
    assert len(evidence.rows) == (6 if mode == "quick" else 9)
    fixed, free, bound, square, rounded, _ = (row.metrics for row in evidence.rows[:6])
    assert [m["offsets_per_pixel"] for m in (fixed, free, bound, square)] == [0, 18, 18, 1]
    assert [m["reads"] for m in (fixed, free, bound, square, rounded)] == [3, 18, 18, 6, 3]
    assert bound["rows_fetched"] == square["rows_fetched"] == 64
    assert free["rows_fetched"] > 5 * 64
    assert evidence.measured_ratio == pytest.approx(free["modelled_ms"] / square["modelled_ms"])
    assert free["modelled_ms"] > bound["modelled_ms"] > square["modelled_ms"] >= rounded["modelled_ms"]


def test_pictures_hold_a_shape_around_its_centre() -> None:
    x, heat, centres = proof.draw(50, (2.0, 9.0), torch.Generator().manual_seed(0))
    assert x.shape == heat.shape == (50, 1, 32, 32)
    highest = heat.flatten(1).argmax(1)
    places = torch.stack((highest // 32, highest % 32), 1)
    assert ((places - centres).abs() <= 0.5 + 1e-5).all()
    assert centres.min() >= 4
    assert centres.max() <= 28
    inside = x.flatten(1).gather(1, highest[:, None])
    assert (inside > 0.4).all()
    areas = (x > 0.5).sum((1, 2, 3))
    assert areas.min() < 40
    assert areas.max() > 150
    same = proof.draw(50, (5.0, 5.0), torch.Generator().manual_seed(0))[0]
    assert (same > 0.5).sum((1, 2, 3)).float().std() < areas.float().std() / 2


def test_finders_of_all_rungs_begin_alike_and_see_the_same_pictures() -> None:
    context = ProofContext(progress=False)
    finders = []
    for rung in ("fixed", "square"):
        torch.manual_seed(context.seed)
        finders.append(proof.Finder(rung).eval())
    x = torch.rand(2, 1, 32, 32)
    weights = [finder.encoder[0].c.weight for finder in finders]
    assert torch.equal(*weights)
    with torch.no_grad():
        assert finders[0](x).shape == x.shape


def test_fine_tuning_leaves_the_finder_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "TUNED", {"quick": 1})
    context, finder = ProofContext(progress=False), proof.Finder("square").eval()
    before = [p.clone() for p in finder.parameters()]
    proof.tuned(context, finder)
    assert all(torch.equal(a, b) for a, b in zip(before, finder.parameters(), strict=True))
    assert not any(isinstance(m, WeightQuantiser) for m in finder.modules())


MS = {"fixed": 1.0, "free": 10.0, "bound": 3.0, "square": 2.0}
FOUND = {"fixed": 50.0, "free": 90.0, "bound": 90.0, "square": 80.0}


@pytest.mark.parametrize(
    ("ms", "fetches", "found", "holds"),
    [
        ({}, 5.0, {}, True),
        ({"free": 9.0}, 5.0, {}, False),
        ({"bound": 1.5}, 5.0, {}, False),
        ({}, 4.0, {}, False),
        ({}, 5.0, {"square": 77.0}, False),
        ({}, 5.0, {"fixed": 90.0}, False),
    ],
)
def test_the_verdict(ms: dict[str, float], fetches: float, found: dict[str, float], holds: bool) -> None:
    assert proof.verdict(MS | ms, fetches, FOUND | found) is holds
