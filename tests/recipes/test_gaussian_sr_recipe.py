"""The recipe of the any-scale network: its crops, its scores, and that what it trains can be used."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from foveate import weights
from foveate.layers.rescaler import Filter
from foveate.learn.crops import Crops
from foveate.restore.gsasr import GSASR

_spec = importlib.util.spec_from_file_location("gaussian_sr", Path(__file__).parents[2] / "recipes" / "gaussian_sr.py")
assert _spec is not None
assert _spec.loader is not None
recipe = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(recipe)

SMALL = recipe.CONFIG | {"channels": 4, "blocks": 1, "dim": 4, "heads": 1, "side": 4, "cross": (1, 1), "among": (1, 1)}


@pytest.fixture
def data(tmp_path):
    dice = np.random.default_rng(0)
    for name, size in (("bsds300", (97, 120)), ("t91", (40, 200)), ("set5", (40, 44))):
        (tmp_path / name).mkdir()
        Image.fromarray(dice.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / name / "one.png")
    return tmp_path


def test_a_network_is_trained_and_kept_where_it_is_found(data, monkeypatch):
    monkeypatch.setattr(recipe, "CONFIG", SMALL)
    folders = ["--data", data, "--work", data / "work", "--out", data / "out"]
    recipe.main([str(word) for word in (*folders, "--steps", 2, "--batch", 1, "--side", 8)])
    assert {file.name for file in (data / "out").iterdir()} == {"gsasr.json", "gsasr.safetensors"}
    monkeypatch.setattr(weights, "FOLDER", data / "out")
    assert GSASR.pretrained()(torch.rand(1, 3, 5, 6), 2.7).shape == (1, 3, 13, 16)


@pytest.mark.parametrize("scale", [1.0, 1.37, 2.5, 4.0])
def test_every_scale_of_training_has_its_crops(data, scale):
    crops, net = Crops([data / "bsds300", data / "t91"], 2), GSASR(**SMALL)
    assert len(crops.pairs) == 1  # the others are too small for the largest scale
    loss = recipe.step(net, crops, scale, 2, 24)
    assert 0 < float(loss.detach()) < 1


def test_scores_are_psnr_at_every_scale(data):
    found = recipe.scores(Filter("bicubic"), recipe.read_folder(data / "set5"))
    assert set(found) == set(recipe.SCALES)
    assert found["x2"] > found["x4"]
    flat = [torch.full((1, 3, 40, 44), 0.4)]
    assert min(recipe.scores(Filter("bicubic"), flat).values()) > 60


def test_the_network_that_is_shipped_is_small_enough():
    assert 4 * sum(p.numel() for p in GSASR(**recipe.CONFIG).parameters()) < 1.5e6
