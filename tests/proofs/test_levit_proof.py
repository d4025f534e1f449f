"""The proof of LeViT: baselines are what they claim to be, and the verdict can fail."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.encode.levit import LeViT
from foveate.meter import Comparison, count_parameters
from foveate.proofs import ProofContext
from foveate.proofs.encode import levit as proof

TINY = {
    "num_classes": 5,
    "embed_dims": (16, 24, 32),
    "key_dim": 8,
    "num_heads": (2, 3, 4),
    "depths": (1, 1, 1),
}


@given(st.one_of(st.none(), st.tuples(st.floats(0, 9), st.floats(0, 9))), st.floats(0, 2e-4), st.floats(0, 4))
@settings(deadline=None, max_examples=50)
def test_the_verdict_needs_all_of_it(speedups, difference, macs):
    fast = speedups is None or (speedups[0] >= 2.45 and speedups[1] >= 2)
    assert proof.verdict(speedups, difference, macs) == (fast and difference < 1e-4 and macs >= 2)
    assert not proof.verdict((2.4, 3.0), difference, macs)
    assert not proof.verdict((3.0, 1.9), difference, macs)
    assert not proof.verdict(speedups, 1e-4, macs)
    assert not proof.verdict(speedups, difference, 1.9)


@pytest.mark.parametrize("installed", [True, False])
def test_the_proof_runs(installed, monkeypatch):
    monkeypatch.setattr(proof, "LeViT", lambda size: LeViT(**TINY, img_size=64))
    monkeypatch.setattr(proof, "SIDE", 64)
    monkeypatch.setattr(proof, "flat_levit", lambda: LeViT(**TINY, img_size=64))
    clock = Comparison(("a", "b"), ((0.3,), (0.1,)), None, (None, None))
    monkeypatch.setattr(proof, "compare", lambda *_, **__: clock)
    rows = [proof.Row("other", gmacs=1)]

    def others(context, small, large, found):
        found += rows
        return ((3.0, 2.5), "note") if installed else (None, "no transformers")

    monkeypatch.setattr(proof, "against_others", others)
    evidence = proof.prove(ProofContext(progress=False))
    assert evidence.rows[2] == rows[0]
    assert evidence.measured_ratio == (3.0 if installed else None)
    assert ("3.00x, and 2.50x" if installed else "not measured") in evidence.measured
    assert not evidence.holds  # the flat network is no larger here
    plain, folded = (row.metrics for row in evidence.rows[:2])
    assert folded["parameters"] < plain["parameters"]


def test_folding_is_measured_on_norms_that_do_something():
    torch.manual_seed(0)
    net = proof.seasoned(LeViT(**TINY, img_size=64), ProofContext(progress=False))
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        tokens = net.patch_embed(x).flatten(2).mT
        assert not torch.allclose(net.blocks[0](net.patch_embed(x).permute(0, 2, 3, 1)).flatten(1, 2), tokens)
    assert proof.apart((net, x), (net, x)) == 0
    assert proof.apart((net, x), (net, 2 * x)) > 0


@pytest.mark.slow
def test_baselines_have_the_published_sizes():
    transformers = pytest.importorskip("transformers")
    efficient = transformers.EfficientNetConfig(**proof.EFFICIENTNET_B2)
    vit = transformers.ViTConfig(**proof.DEIT_SMALL)
    with torch.device("meta"):
        sizes = [
            count_parameters(kind(config)) / 1e6
            for kind, config in (
                (transformers.EfficientNetForImageClassification, efficient),
                (transformers.ViTForImageClassification, vit),
            )
        ]
    assert sizes == pytest.approx([9.11, 22.05], abs=0.01)


def test_the_flat_network_is_as_large_as_allowed():
    sizes = [count_parameters(proof.flat_levit()), count_parameters(LeViT("256"))]
    assert 0.9 * sizes[1] < sizes[0] <= sizes[1]
