import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from foveate import catalog
from foveate.cli import app
from foveate.encode.adaptive_patch_transformer import AdaptivePatchTransformer
from foveate.engine.surgery import patch_forward
from foveate.errors import BudgetError, InputError, PictureError


@pytest.fixture(autouse=True)
def card(monkeypatch):
    monkeypatch.setattr(catalog.Card, "target", lambda card: AdaptivePatchTransformer)


@pytest.fixture
def photograph(tmp_path):
    pixels = np.full((60, 90, 3), 90, np.uint8)
    pixels[:20, :20] = np.random.default_rng(0).integers(255, size=(20, 20, 3))
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def run(*words):
    return CliRunner().invoke(app, ["tokens", *map(str, words)])


def test_a_map_is_drawn_and_the_tokens_are_told(photograph, tmp_path):
    result = run(photograph, "--side", 192, "--budget", "40 tokens", "--out", tmp_path / "map.png")
    assert result.exit_code == 0, result.output
    assert "40 of 96 tokens" in result.stderr or "39 of 96 tokens" in result.stderr
    drawn = np.asarray(Image.open(tmp_path / "map.png"))
    assert drawn.shape == (4 * 128 + 28, 4 * 192, 3)
    assert drawn[10:100, 10:100].mean() > drawn[400:500, 600:700].mean()


def test_a_model_from_a_folder(photograph, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=40, image_size=64, patch_size=8
    )
    transformers.ViTModel(config).save_pretrained(tmp_path / "model")
    result = run(photograph, "--model", tmp_path / "model", "-b", "30 tokens", "-o", tmp_path / "map.jpg")
    assert result.exit_code == 0, result.output
    assert " of 64 tokens" in result.stderr


def test_what_cannot_be_done_is_said(photograph, tmp_path, monkeypatch):
    out = tmp_path / "map.png"
    assert isinstance(run(photograph, "--budget", "0.01", "--out", out).exception, BudgetError)
    assert isinstance(run(tmp_path / "none.png", "--out", out).exception, PictureError)
    monkeypatch.setattr(catalog.Card, "target", lambda card: lambda model, budget: patch_forward(model, lambda f: f))
    assert isinstance(run(photograph, "--out", out).exception, InputError)
    assert not out.exists()
