"""The proof of adaptive neural images: it runs, its baselines are what they are called, its verdict can fail."""

import math

import pytest
import torch

pytest.importorskip("constriction")
from foveate.layers.implicit import NeuralImage
from foveate.proofs import ProofContext
from foveate.proofs.compress import adaptive_neural_images as proof


@pytest.mark.parametrize("mode", ["quick", "full"])
def test_it_runs(mode, monkeypatch):
    for name, value in {"SIDE": 20, "WIDTH": 8, "STEPS": 3, "PICTURES": 1}.items():
        monkeypatch.setattr(proof, name, {mode: value})
    evidence = proof.prove(ProofContext(full=mode == "full", progress=False))
    rows = {row.name: row.metrics for row in evidence.rows}
    assert len(rows) == 4 * 3 + 3 + 4 + 3
    numbers = 3 * 8 * 8 + 3 * 8 + 3 * 8 + 3
    assert rows["alone, width 8, 16 bits"]["bpp"] == pytest.approx(16 * numbers / 400)
    assert rows["SIREN, 16 bits"]["bpp"] == pytest.approx(16 * (numbers + 3 * 8) / 400)
    rates = [rows[f"one file, width {n}"]["bpp"] for n in (2, 4, 6, 8)]
    assert rates == sorted(rates)
    assert math.isfinite(evidence.measured_ratio)
    assert evidence.figure.size == (5 * 180, 180)


def test_the_saving_is_read_off_the_curve_at_equal_quality():
    curve = {"alone, width 1, 16 bits": (20.0, 2.0), "alone, width 2, 16 bits": (30.0, 8.0)}
    low = {"alone, width 1, 4 bits, fitted": (10.0, 0.1)}
    assert proof.saving({**curve, **low, "alone, width 2, 4 bits, fitted": (30.0, 2.0)}) == pytest.approx(4)
    assert proof.saving({**curve, **low, "alone, width 2, 4 bits, fitted": (25.0, 2.0)}) == pytest.approx(2)
    assert proof.saving({**curve, "alone, width 2, 4 bits, fitted": (40.0, 2.0)}) == pytest.approx(16)


def test_cutting_down_takes_the_first_rows_and_columns():
    net = NeuralImage([(3, 2), (6, 2)], generator=torch.Generator().manual_seed(0))
    wide = NeuralImage([(6, 2)])
    wide.load_state_dict({name.replace(".1", ".0"): w for name, w in net.state_dict().items() if ".0" not in name})
    narrow = proof.cut(wide, 3)
    with torch.no_grad():
        net.heads[0].copy_(net.heads[1][:, :3])
    places = torch.rand(9, 2)
    torch.testing.assert_close(narrow.at(places), net.at(places, 0))


def test_the_verdict_can_fail():
    assert proof.verdict(3.5, 2.5, 1.0)
    for wrong in ((2.9, 2.5, 1.0), (3.5, 1.9, 1.0), (3.5, 2.5, 2.1)):
        assert not proof.verdict(*wrong)
