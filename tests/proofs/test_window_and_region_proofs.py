"""Proofs of sparsevit, xt and foveated-perception: their parts measure what they say, and their verdicts can fail."""

import pytest
import torch

from foveate.encode.foveated_perception import FoveatedPerception
from foveate.proofs import ProofContext
from foveate.proofs.encode import foveated_perception, sparsevit, xt

RIGHT = {
    "all windows": 0.8,
    "active windows": 0.78,
    "random windows": 0.6,
    "least active windows": 0.5,
    "best uniform ratio": 0.7,
    "searched ratios": 0.69,
}


@pytest.mark.parametrize(
    ("change", "holds"),
    [
        ({}, True),
        ({"active windows": 0.74}, False),
        ({"random windows": 0.74}, False),
        ({"least active windows": 0.61}, False),
        ({"searched ratios": 0.67}, False),
    ],
)
def test_sparse_windows_must_be_fast_and_the_right_ones(change, holds):
    assert sparsevit.verdict(0.5, 0.97, 0.95, RIGHT | change) is holds
    for measured in ((0.61, 0.97, 0.95), (0.5, 0.94, 0.95), (0.5, 0.97, 0.89)):
        assert not sparsevit.verdict(*measured, RIGHT | change)


def test_a_line_is_straight_and_a_step_is_not():
    assert sparsevit.straightness({0.2: 0.8, 0.4: 0.6, 0.8: 0.2}) == pytest.approx(1)
    assert sparsevit.straightness({0.2: 1.0, 0.4: 1.0, 0.8: 0.2}) < 0.95


def test_scraps_lie_on_empty_canvases():
    photographs = torch.arange(1, 5).view(4, 1, 1, 1).expand(-1, 3, 20, 20) / 8
    x, label = sparsevit.canvases(photographs, torch.Generator().manual_seed(0), 50)
    assert x.shape == (50, 3, 32, 32)
    assert torch.equal((x > 0).sum((1, 2, 3)), torch.full((50,), 3 * sparsevit.SCRAP**2))
    assert torch.equal(x.amax((1, 2, 3)), (label + 1) / 4)
    ways = sparsevit.measures(torch.Generator().manual_seed(0))
    maps = x.permute(0, 2, 3, 1)
    assert (ways["active windows"](maps)[:, :, :, 0] > 0).sum() == 50 * sparsevit.SCRAP**2
    assert (ways["least active windows"](maps) > 1e5).sum() == 50 * (32**2 - sparsevit.SCRAP**2)
    assert ways["random windows"](maps).unique().numel() > 1000


GOOD = {xt.SHRUNK: 0.6, xt.ALONE: 0.55, xt.MEAN: 0.7, "xT": 0.9}
KEPT = {"a quarter carries gradients": 0.4, "checkpoints": 0.3}


@pytest.mark.parametrize(
    ("right", "kept", "each", "peaks", "holds"),
    [
        ({}, {}, 1.1, (100, 50), True),
        ({}, {}, 1.1, (0, 0), True),
        ({"xT": 0.74}, {}, 1.1, (100, 50), False),
        ({xt.SHRUNK: 0.91}, {}, 1.1, (100, 50), False),
        ({}, {"checkpoints": 0.6}, 1.1, (100, 50), False),
        ({}, {"a quarter carries gradients": 0.6}, 1.1, (100, 50), False),
        ({}, {}, 1.3, (100, 50), False),
        ({}, {}, 1.1, (100, 120), False),
    ],
)
def test_regions_must_gain_by_context_and_save_memory(right, kept, each, peaks, holds):
    assert xt.verdict(GOOD | right, KEPT | kept, each, peaks) is holds


def test_puzzles_ask_for_the_colour_of_the_square_framed_as_the_white_one():
    x, label = xt.puzzles(torch.Generator().manual_seed(0), 60)
    assert x.shape == (60, 3, 64, 64)
    for picture, colour in zip(x, label.tolist(), strict=True):
        squares = {}
        for region in picture.unflatten(2, (2, 32)).unflatten(1, (2, 32)).permute(1, 3, 0, 2, 4).flatten(0, 1):
            if region.any():
                lit = region.any(0).nonzero()
                middle = region[:, *((lit.amin(0) + lit.amax(0)) // 2)]
                framed = len(lit) > (xt.SQUARE - 8) ** 2
                squares[tuple(middle.tolist()), framed] = len(lit)
        white = [framed for ink, framed in squares if ink == (1.0, 1.0, 1.0)]
        assert len(white) == 1
        assert (xt.PALETTE[colour], white[0]) in squares
        assert len(squares) == 3
    assert set(label.tolist()) == set(range(xt.CLASSES))


def test_training_keeps_less_with_fewer_gradients_and_with_checkpoints():
    kept = xt.keeps(ProofContext(progress=False))
    assert kept["a quarter carries gradients"] < 0.5 * kept["all regions at once"]
    assert kept["checkpoints"] < 0.5 * kept["all regions at once"]


SIGNALS = {
    "texture": {"peripheral_energy": 1.0, "foveal_psnr": 40.0},
    "blur": {"peripheral_energy": 0.1, "foveal_psnr": 20.0},
    "uniform": {"peripheral_energy": 0.1, "foveal_psnr": 12.0},
}
SCENES = {"reference": 0.8, "texture": 0.75, "blur": 0.6, "uniform": 0.6}


def test_texture_must_keep_energy_the_fovea_and_accuracy():
    assert foveated_perception.verdict(SIGNALS, SCENES)
    for name, figure, value in (
        ("texture", "peripheral_energy", 1.3),
        ("texture", "peripheral_energy", 0.6),
        ("blur", "peripheral_energy", 0.6),
        ("uniform", "foveal_psnr", 31.0),
    ):
        assert not foveated_perception.verdict(SIGNALS | {name: SIGNALS[name] | {figure: value}}, SCENES)
    for name, value in (("texture", 0.64), ("blur", 0.76), ("uniform", 0.75)):
        assert not foveated_perception.verdict(SIGNALS, SCENES | {name: value})


def test_crops_to_learn_from_and_to_be_tested_on_do_not_overlap():
    picture = torch.zeros(3, 100, 240)
    picture[:, :, 120:] = 1
    for half in (0, 1):
        x, label = foveated_perception.crops({"a": picture, "b": picture}, half, 4, torch.Generator().manual_seed(0))
        assert x.shape == (8, 3, 64, 64)
        torch.testing.assert_close(x, torch.full_like(x, half))
        assert label.tolist() == [0] * 4 + [1] * 4


def test_signals_of_the_picture_itself_are_perfect(monkeypatch):
    kinds = {"reference": FoveatedPerception("reference"), "texture": FoveatedPerception()}
    monkeypatch.setattr(foveated_perception, "systems", lambda x: kinds)
    found = foveated_perception.measure(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert found["reference"]["ssim"] == pytest.approx(1)
    assert found["reference"]["peripheral_energy"] == pytest.approx(1)
    assert found["reference"]["foveal_psnr"] == pytest.approx(100)
    assert found["texture"]["ssim"] < 0.9
