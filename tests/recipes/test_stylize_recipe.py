"""The recipe of `foveate stylize`: its drawings, and that what it trains can be used."""

import argparse
import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from foveate.layers.vgg import SMALL, SMALL_NORMAL, VGG
from foveate.learn import stylize as verb

_spec = importlib.util.spec_from_file_location("stylize_recipe", Path(__file__).parents[2] / "recipes" / "stylize.py")
assert _spec is not None
assert _spec.loader is not None
recipe = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(recipe)


@pytest.fixture
def args(tmp_path):
    given = {"data": tmp_path, "work": tmp_path / "work", "out": tmp_path / "out", "every": 2, "steps": 2, "batch": 2}
    return argparse.Namespace(**given, recipe="recipes/stylize.py")


@pytest.mark.parametrize("name", sorted(recipe.STYLES))
def test_styles_are_drawn_alike_every_time(name):
    first, second = (np.asarray(recipe.STYLES[name](96)) for _ in range(2))
    assert first.shape == (96, 96, 3)
    assert np.array_equal(first, second)
    assert len(np.unique(first.reshape(-1, 3) // 32, axis=0)) > 10


def test_a_style_is_trained_and_can_be_used(args, tmp_path, monkeypatch):
    (tmp_path / "bsds300").mkdir()
    dice = np.random.default_rng(0)
    for i in range(2):
        pixels = dice.integers(0, 256, (90, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "bsds300" / f"{i}.png")
    recipe.strokes(40).save(tmp_path / "style.png")
    monkeypatch.setattr(recipe, "CONFIG", {"widths": [4, 6], "blocks": 1, "bound": "none", "residual": True})
    more = {"name": "mine", "picture": tmp_path / "style.png", "features": None, "caffe": False, "paper": False}
    settings = (
        vars(args) | more | {"side": 32, "lr": 1e-3, "style_weight": 1.0, "variation_weight": 0.5, "range_weight": 1.0}
    )
    recipe.train_style(argparse.Namespace(**settings))
    card = json.loads((tmp_path / "out" / "stylize-mine.json").read_text())
    assert card["config"]["widths"] == [4, 6]
    assert card["style"] == "style.png"
    assert card["scores"]["of the pictures, with style"][0] == 0
    verb.style_network.cache_clear()
    picture = np.zeros((20, 30, 3), np.uint8)
    assert verb.stylize(picture, style=str(tmp_path / "out" / "stylize-mine.safetensors")).image.shape == picture.shape


def test_features_are_trained_and_their_norms_folded(args, tmp_path):
    dice = np.random.default_rng(0)
    streams, labels = [], np.arange(20, dtype=np.uint8) % 10
    for _ in labels:
        stream = io.BytesIO()
        Image.fromarray(dice.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(stream, "JPEG")
        streams.append(stream.getvalue())
    offsets = np.cumsum([0, *map(len, streams)])
    content = np.frombuffer(b"".join(streams), np.uint8)
    for name in ("train", "test"):
        np.savez(tmp_path / f"cifar10_{name}_jpeg.npz", bytes=content, offsets=offsets, labels=labels)
    recipe.train_features(args)
    network = VGG(SMALL, SMALL_NORMAL)
    state = {k: v.float() for k, v in load_file(tmp_path / "out" / "perceptual-losses.safetensors").items()}
    network.load_state_dict(state)
    assert torch.isfinite(network(torch.rand(1, 3, 32, 32), ["relu4_2"])["relu4_2"]).all()
    card = json.loads((tmp_path / "out" / "perceptual-losses.json").read_text())
    assert card["parameters"] == sum(v.numel() for v in state.values())
