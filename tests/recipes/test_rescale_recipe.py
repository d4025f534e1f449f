"""The recipe of the rescaling networks: scales that it draws, what it scores, and a run in small."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from foveate import ops
from foveate.layers.rescaler import Filter
from foveate.restore.bidirectional_rescaling import BAIRNet
from foveate.restore.iarn import IARN

_spec = importlib.util.spec_from_file_location("rescale", Path(__file__).parents[2] / "recipes" / "rescale.py")
assert _spec is not None
assert _spec.loader is not None
recipe = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(recipe)


@pytest.fixture(autouse=True)
def reference():
    """No compiled kernels: sampling has tests of its own, and compiling takes longer than all of these."""
    with ops.use("reference"):
        yield


def test_sizes_are_drawn_between_the_scales_and_one_in_ten_is_unequal():
    dice = torch.Generator().manual_seed(0)
    sizes = [recipe.drawn_size(dice, 48) for _ in range(1000)]
    assert min(min(size) for size in sizes) == 12
    assert max(max(size) for size in sizes) == 48
    assert 0.05 < sum(h != w for h, w in sizes) / 1000 < 0.15


def test_scores_are_those_of_round_trips():
    pictures = [torch.rand(1, 3, 24, 30)]
    found = recipe.scores(Filter("bicubic"), pictures, (1.0, 2.0))
    assert found["dB at 1"] > 45  # only rounding
    assert found["small dB at 2"] > 45
    assert 5 < found["dB at 2"] < 25


@pytest.mark.parametrize("method", ["iarn", "bidirectional-rescaling"])
def test_a_run_writes_weights_that_are_found(tmp_path, monkeypatch, method):
    for folder in (*recipe.TRAINING, "kodak12"):
        (tmp_path / folder).mkdir()
        pixels = np.random.default_rng(0).integers(0, 256, (64, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / folder / "a.png")
    small = {"iarn": (IARN, {"blocks": 1, "growth": 2, "layers": 2}),
             "bidirectional-rescaling": (BAIRNet, {"channels": 4, "blocks": 1, "every": 0})}  # fmt: skip
    monkeypatch.setattr(recipe, "NETWORKS", small)
    out = tmp_path / "out"
    words = ["--data", tmp_path, "--steps", 2, "--batch", 1, "--side", 16, "--work", tmp_path / "work", "--out", out]
    monkeypatch.setattr(sys, "argv", ["rescale.py", method, *map(str, words)])
    recipe.main()
    assert sorted(p.name for p in out.iterdir()) == [f"{method}.json", f"{method}.safetensors"]
    monkeypatch.setattr("foveate.weights.FOLDER", out)
    model = small[method][0].pretrained()
    with torch.no_grad():
        assert model(torch.rand(1, 3, 8, 8), (4, 3))[0].shape == (1, 3, 4, 3)
