"""The proof of TVConv: the networks are alike but for the mixing, costs are counted right, the verdict can fail."""

import pytest
import torch

from foveate.layers.fold import fuse
from foveate.meter import Comparison, count_flops
from foveate.ops.gathered import gathered
from foveate.proofs import ProofContext
from foveate.proofs.encode import tvconv as proof


def compared_once(*_: object, **__: object) -> Comparison:
    return Comparison(("a", "b"), ((0.2,), (0.1,)), None, (None, None))


@pytest.mark.parametrize("mode", ["quick", "full"])
def test_the_proof_runs(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "compare", compared_once)
    monkeypatch.setattr(proof, "STEPS", 2)
    monkeypatch.setattr(proof, "TESTED", 20)
    monkeypatch.setattr(proof, "TRAINED", 30)
    monkeypatch.setattr(proof, "MAP", (1, 2, 8, 8))
    evidence = proof.prove(ProofContext(full=mode == "full", progress=False))
    ours, *theirs = (row.metrics for row in evidence.rows[:-2])
    assert [row["macs"] for row in (ours, *theirs[:3])] == [13_312, 13_312, 43_008, 89_088]
    assert ours["kernels_kb"] == 64 * theirs[0]["kernels_kb"]
    assert not evidence.holds  # nothing is learned in two steps


def test_macs_are_those_of_folded_networks_before_the_head() -> None:
    x = torch.zeros(1, 1, 8, 8)
    for varying in (True, False):
        network = fuse(proof.Small(8, varying).eval())
        assert count_flops(network.body, x) == 2 * 64 * (8 + 9 * 8 + 8 * 16)


def test_unfolding_is_the_same_operator() -> None:
    x, weight = torch.randn(2, 3, 6, 7), torch.randn(1, 3, 25, 6, 7)
    torch.testing.assert_close(proof.unfolded(x, weight, 5), gathered(x, weight, kernel_size=5), atol=1e-5, rtol=1e-5)


def test_digits_fill_their_pictures_and_never_repeat() -> None:
    x, labels = proof.digits(200, 0)
    assert x.shape == (200, 1, 8, 8)
    assert set(labels.tolist()) == set(range(10))
    ink = (x[:, 0] > 0).float().mean(0)
    assert ink[:, 2:6].any(1).all()  # from the first row to the last
    assert torch.equal(proof.digits(200, 0)[0], x)
    assert not torch.equal(proof.digits(200, 1)[0], x)
    ones = x[labels == 1]
    assert not torch.equal(ones[0], ones[1])


def test_what_is_saved() -> None:
    assert proof.saved([1.0, 1.0, 3.0], [0.9, 0.9, 0.95]) == (1.0, False)
    assert proof.saved([1.0, 1.0, 3.0], [0.9, 0.8, 0.89]) == (3.0, True)


@pytest.mark.parametrize(
    ("ratio", "accuracies", "moved", "holds"),
    [
        (6.7, [0.95, 0.8], [0.3, 0.6], True),
        (3.0, [0.95, 0.8], [0.3, 0.6], False),
        (6.7, [0.85, 0.8], [0.3, 0.6], False),
        (6.7, [0.95, 0.8], [0.9, 0.6], False),
    ],
)
def test_the_verdict_needs_all_three(ratio: float, accuracies: list[float], moved: list[float], holds: bool) -> None:
    assert proof.verdict(ratio, accuracies, moved) == holds
