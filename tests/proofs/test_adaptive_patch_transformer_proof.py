import pytest
import torch

from foveate.proofs import ProofContext
from foveate.proofs.encode import adaptive_patch_transformer as proof

SHARES = {"moon": 0.36, "gravel": 1.0}
RIGHT = {"dense": 0.9, "by entropy": 0.88, "at random": 0.6, "patches of 8": 0.7}


@pytest.mark.parametrize(
    ("change", "holds"),
    [
        ({}, True),
        ({"speedup": 1.29}, False),
        ({"efficiency": 0.89}, False),
        ({"shares": {"moon": 0.46, "gravel": 1.0}}, False),
        ({"shares": {"moon": 0.36, "gravel": 0.97}}, False),
        ({"right": RIGHT | {"by entropy": 0.86}}, False),
        ({"right": RIGHT | {"at random": 0.88}}, False),
        ({"right": RIGHT | {"patches of 8": 0.89}}, False),
    ],
)
def test_the_verdict(change, holds):
    given = {"speedup": 1.4, "efficiency": 0.95, "shares": SHARES, "right": RIGHT} | change
    assert proof.verdict(**given) is holds


def test_digits_are_drawn_on_plain_grounds():
    glyphs = proof.draw_glyphs()
    assert glyphs.shape == (10, 9, 20, 20)
    assert glyphs.flatten(2).sum(2).min() > 5
    x, label = proof.digits(glyphs, torch.Generator().manual_seed(0), 16)
    assert x.shape == (16, 3, 32, 32)
    assert x.abs().max() <= 1.03
    assert set(label.tolist()) <= set(range(10))
    again, _ = proof.digits(glyphs, torch.Generator().manual_seed(0), 16)
    assert torch.equal(x, again)
    flat = (x[:, 0] - x[:, 0, :1, :1]).abs() < 0.03
    assert 0.5 < flat.float().mean() < 0.98


def test_the_whole_proof_in_small(monkeypatch):
    monkeypatch.setattr(proof, "SIDE", 128)
    monkeypatch.setattr(proof, "SIZES", {"quick": (24, 8, 2)})
    for name in ("LEARN", "TUNE", "PAIRS"):
        monkeypatch.setattr(proof, name, {"quick": 1})
    monkeypatch.setattr(proof, "TESTED", 20)
    evidence = proof.prove(ProofContext(progress=False))
    names = [row.name for row in evidence.rows]
    assert names[0] == "host, 13 photographs"
    assert names[2:4] == ["host, 4 photographs", "APT, half the FLOPs, 4 photographs"]
    assert {"digits, dense", "digits, by entropy", "moon", "gravel"} <= set(names)
    figures = {row.name: row.metrics for row in evidence.rows}
    assert figures[names[3]]["gflops"] < 0.6 * figures[names[2]]["gflops"]
    assert figures["digits, patches of 8"]["tokens_of_64"] == 16
    assert figures["digits, by entropy"]["tokens_of_64"] <= 40
