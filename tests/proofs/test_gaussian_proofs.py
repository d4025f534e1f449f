"""The proofs of GaussianImage and Image-GS: they run, the baselines are what they claim to be, verdicts can fail."""

import math

import pytest
import torch

pytest.importorskip("constriction")
from foveate.meter import count_parameters
from foveate.ops.gaussians import Grid, reach_of, render
from foveate.proofs import ProofContext
from foveate.proofs.compress import _gaussians as shared
from foveate.proofs.compress import gaussian_image, image_gs


def test_the_tiled_baseline_draws_the_same_picture():
    centres, conics, colours = gaussian_image.scene(50, 70, 120, 0)
    conics[3] = -1
    found = shared.tiled(centres, conics, colours, 50, 70, reach_of(1 / 255))
    torch.testing.assert_close(found, render(centres, conics, colours, Grid(50, 70), "cut"), atol=5e-3, rtol=0)
    assert (found - render(centres, conics, colours, Grid(50, 70), "cut")).abs().mean() < 1e-5


@pytest.mark.parametrize("mode", ["quick", "full"])
def test_the_proof_of_gaussian_image_runs(mode, monkeypatch):
    sizes = {
        "NAMES": {mode: ("astronaut",)},
        "SIDE": 24,
        "COUNT": 20,
        "SECONDS": {mode: 0.1},
        "STEPS": 6,
        "SCENE": (80, 96, 30),
        "SLICE": 4,
    }
    for name, value in {**sizes, "ENCODING": (0.1,)}.items():
        monkeypatch.setattr(gaussian_image, name, value)
    monkeypatch.setattr(gaussian_image, "kodak", lambda _: [("one", torch.rand(3, 20, 24))])
    evidence = gaussian_image.prove(ProofContext(full=mode == "full", progress=False))
    labels = [row.name for row in evidence.rows]
    assert any("kodak12" in label for label in labels) == (mode == "full")
    assert evidence.measured_ratio > 0


def test_the_network_has_as_many_parameters():
    assert 0.95 * 8 * gaussian_image.COUNT < count_parameters(gaussian_image.Siren(45)) <= 8 * gaussian_image.COUNT
    places = gaussian_image.coordinates(2, 4)
    assert places[0].tolist() == [-0.75, -0.5]
    assert places[-1].tolist() == [0.75, 0.5]


def test_the_network_learns():
    torch.manual_seed(0)
    y, x = torch.meshgrid(torch.arange(12) / 12, torch.arange(16) / 16, indexing="ij")
    target = torch.stack([x, y, x * y])
    assert gaussian_image.fit_network(gaussian_image.Siren(16), gaussian_image.coordinates(12, 16), target, 0.3) > 15


@pytest.mark.parametrize(
    ("figures", "holds"),
    [
        ((2, 5, -1, 1.1), True),
        ((1.9, 5, 0, 2), False),
        ((2, 4.9, 0, 2), False),
        ((2, 5, -1.1, 2), False),
        ((2, 5, 0, 1), False),
    ],
)
def test_the_verdict_on_gaussian_image_needs_all_four(figures, holds):
    assert gaussian_image.verdict(*figures) == holds


def test_the_proof_of_image_gs_runs(monkeypatch):
    for name, value in {"SIDE": 40, "STEPS": 6, "NAMES": ("rocket", "page"), "BPP": 4}.items():
        monkeypatch.setattr(image_gs, name, value)
    evidence = image_gs.prove(ProofContext(progress=False))
    assert [row.name for row in evidence.rows][:2] == ["rocket: dB gained", "page: dB gained"]
    rates = [row.metrics["bpp"] for row in evidence.rows if "bpp" in row.metrics]
    assert all(rate <= 4 for rate in rates)
    assert math.isfinite(evidence.measured_ratio)


@pytest.mark.parametrize(
    ("figures", "holds"),
    [((0.5, -0.3, True), True), ((0.4, 0, True), False), ((1, -0.4, True), False), ((1, 1, False), False)],
)
def test_the_verdict_on_image_gs_needs_all_three(figures, holds):
    assert image_gs.verdict(*figures) == holds
