"""The proof of learning with MS-SSIM: what it measures, and a verdict that can fail."""

import pytest
import torch

from foveate.proofs import ProofContext
from foveate.proofs.learn import ms_ssim_learning as proof

FIGURES = {
    "MSE": {"psnr_db": 22.0, "mae": 0.06, "ms_ssim": 0.70, "gradients": 0.50, "contrast": 0.6, "level": 0.0},
    "MAE": {"psnr_db": 21.8, "mae": 0.05, "ms_ssim": 0.68, "gradients": 0.49, "contrast": 0.6, "level": 0.0},
    "MS-SSIM": {"psnr_db": 21.0, "mae": 0.07, "ms_ssim": 0.76, "gradients": 0.55, "contrast": 0.8, "level": 0.01},
}


def changed(name="MS-SSIM", **values):
    return {**FIGURES, name: {**FIGURES[name], **values}}


@pytest.mark.parametrize(
    ("figures", "votes"),
    [
        (FIGURES, 0.7),
        (changed(ms_ssim=0.74), 0.8),
        (changed("MAE", ms_ssim=0.77), 0.8),
        (changed(gradients=0.51), 0.8),
        (changed(psnr_db=20.4), 0.8),
        (changed(level=-0.06), 0.8),
    ],
)
def test_the_verdict_can_fail(figures, votes):
    assert proof.verdict(FIGURES, 0.8)
    assert not proof.verdict(figures, votes)


def test_losses_that_lose_their_own_column_are_named():
    assert proof.own_columns(FIGURES) == "Each loss wins its own column."
    assert proof.own_columns(changed("MSE", mae=0.04)) == "MAE loses its own column to MSE."


def test_figures_of_known_changes():
    torch.manual_seed(0)
    x = torch.rand(3, 1, 32, 32)
    same = proof.judge(x, x)
    assert same["ms_ssim"] == pytest.approx(1, abs=1e-5)
    assert (same["gradients"], same["contrast"]) == (pytest.approx(1), pytest.approx(1))
    changed = proof.judge(x, 0.5 * x + 0.3)
    assert changed["contrast"] == pytest.approx(0.5, rel=1e-3)
    assert changed["gradients"] == pytest.approx(1, rel=1e-4)
    assert changed["level"] == pytest.approx(float((0.3 - 0.5 * x).mean()), abs=1e-4)
    assert float(proof.correlation(x, 1 - x).max()) == pytest.approx(-1, rel=1e-4)


def test_pictures_are_grey_at_half_size():
    picture = torch.rand(3, 21, 30)
    assert proof.grey(picture).shape == (1, 1, 10, 15)
    assert float(proof.grey(torch.full((3, 8, 8), 0.4)).std()) == pytest.approx(0, abs=1e-6)


def test_it_runs_and_fails_without_training(monkeypatch):
    monkeypatch.setitem(proof.STEPS, "quick", 2)
    monkeypatch.setattr(proof, "JUDGED", 16)
    evidence = proof.prove(ProofContext(progress=False))
    assert [row.name for row in evidence.rows] == ["trained by MSE", "trained by MAE", "trained by MS-SSIM"]
    assert not evidence.holds
    assert evidence.claimed_ratio == 3
