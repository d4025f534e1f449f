"""The recipe of super-resolution: every network takes a step, and what it writes loads and says how it was made."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from foveate import ops

_SPEC = importlib.util.spec_from_file_location("sr_recipe", Path(__file__).parents[2] / "recipes" / "sr.py")
assert _SPEC is not None
assert _SPEC.loader is not None
recipe = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(recipe)

PLAIN = ("espcn", "scnet", "seemore", "srformer", "tcsr", "acla")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A picture to learn from in each folder, and one to measure on."""
    random = np.random.default_rng(0)
    for name, side in (*((n, 96) for n in recipe.TRAINING), ("set5", 32)):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.fromarray(random.integers(0, 255, (side, side, 3), np.uint8)).save(tmp_path / "data" / name / "a.png")
    return tmp_path / "data"


@pytest.mark.parametrize("method", PLAIN)
def test_a_network_is_trained_and_written(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    out = tmp_path / "out"
    arguments = [method, "--scale", 2, "--data", data, "--steps", 1, "--work", tmp_path, "--out", out, "--threads", 1]
    monkeypatch.setattr(sys, "argv", ["sr.py", *map(str, arguments)])
    draw = recipe.Crops.__call__
    monkeypatch.setattr(recipe.Crops, "__call__", lambda self, batch, side: draw(self, 1, 16))
    with ops.use("reference"):  # nothing to compile
        recipe.main()
    card = json.loads((out / f"{method}-x2.json").read_text())
    weights = load_file(out / f"{method}-x2.safetensors")
    network = recipe.METHODS[method].args[0](**card["config"])
    network.load_state_dict(weights)
    assert network.slug == card["system"] == method
    assert card["training"]["steps"] == 1
    assert 0 < card["scores"]["set5"]["PSNR-Y at budget 1.0"] < 40
    assert card["parameters"] == sum(p.numel() for p in network.parameters())


def test_losses_are_the_authors_own() -> None:
    from foveate.restore.acla import ACLA
    from foveate.restore.seemore import SeemoRe

    torch.manual_seed(0)
    low, high = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 32, 32)
    net = SeemoRe(2, 8, 1)
    assert torch.equal(recipe.plain_loss(net, low, high, 0.0), net.loss(low, high))
    gated = ACLA(2, 8, 4)
    with ops.use("reference"):
        recipe.plain_loss(gated, low, high, 0.0)
        assert gated.temperature == 5
        recipe.plain_loss(gated, low, high, 1.0)
    assert gated.temperature == pytest.approx(0.1)
