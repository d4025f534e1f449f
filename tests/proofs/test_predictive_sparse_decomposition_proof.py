"""Proof of predictive sparse decomposition: its parts measure what they say, and the verdict can fail."""

import pytest
import torch
import torch.nn.functional as F

from foveate.proofs import ProofContext
from foveate.proofs.compress import predictive_sparse_decomposition as psd

FINE = {
    "speedup": 100.0,
    "lost": 1.9,
    "warm_wins": True,
    "steadier": True,
    "right": {"exact": 0.8, "predicted": 0.785},
}


@pytest.mark.parametrize(
    "broken",
    [
        {"speedup": 99.0},
        {"lost": 2.0},
        {"warm_wins": False},
        {"steadier": False},
        {"right": {"exact": 0.8, "predicted": 0.77}},
    ],
)
def test_the_verdict_needs_all_of_it(broken: dict) -> None:
    assert psd.verdict(**FINE)  # type: ignore[arg-type]
    assert not psd.verdict(**(FINE | broken))  # type: ignore[arg-type]


def test_training_and_test_patches_come_from_different_halves() -> None:
    slope = torch.linspace(0, 1, 80).expand(40, 80)
    for left in (True, False):
        found = psd._patches([slope], 30, ProofContext(), left, wider=1)
        assert found.shape == (30, 90)
        assert ((found < 0.5) == left).all()


def test_a_shifted_patch_overlaps_the_unshifted() -> None:
    wide = torch.rand(5, 90)
    first, second = (psd._centred(wide, offset).view(5, 9, 9) for offset in (0, 1))
    # Both are affine in the same pixels, patch by patch.
    a, b = first[:, :, 1:].flatten(1), second[:, :, :-1].flatten(1)
    assert torch.allclose(F.cosine_similarity(a - a.mean(1, True), b - b.mean(1, True)), torch.ones(5), atol=1e-5)


def test_exact_codes_are_near_the_optimum_and_cost_no_more_steps_than_needed() -> None:
    torch.manual_seed(0)
    y, atoms = torch.randn(40, 12), F.normalize(torch.randn(20, 12), dim=1)
    steps = psd._steps_to_optimum(y, atoms)
    best = psd._energy(y[::4], psd.fista(y[::4], atoms, psd.PENALTY, steps=2000), atoms)
    assert 10 < steps < psd.EXACT
    assert psd._energy(y[::4], psd.fista(y[::4], atoms, psd.PENALTY, steps=steps), atoms) <= 1.0002 * best
    assert psd._energy(y[::4], psd.fista(y[::4], atoms, psd.PENALTY, steps=steps - 10), atoms) > 1.0001 * best


def test_the_classifier_finds_what_is_there_and_nothing_else() -> None:
    torch.manual_seed(0)
    answer = torch.arange(len(psd.TEXTURES)).repeat_interleave(20)
    clear = F.one_hot(answer).float() + 0.1 * torch.randn(len(answer), len(psd.TEXTURES))
    assert psd._ridge(clear, clear.flip(0).flip(0), answer) == 1.0
    assert psd._ridge(torch.randn(120, 6), torch.randn(120, 6), answer) < 0.4
