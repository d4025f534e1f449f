"""`foveate demo`: the pictures it writes, made by small networks that stand in for the trained ones."""

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from foveate import cli, weights
from foveate.cli.demo import pictures_to_image, side_by_side
from foveate.errors import BudgetError
from foveate.restore.pcsr import PCSR
from foveate.restore.upscale import network


@pytest.fixture(autouse=True)
def trained(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    config = {"encoder_config": {"channels": 4, "blocks": 1}, "heavy": [32, 32], "light": [4], "classifier": [4]}
    weights.save(PCSR(4, **config), "pcsr", 4, {"config": {"scale": 4, **config}}, folder)
    monkeypatch.setattr(weights, "FOLDER", folder)
    network.cache_clear()
    yield
    network.cache_clear()


def test_the_demo_writes_its_pictures_and_says_where(tmp_path):
    folder = tmp_path / "new" / "pictures"
    ran = CliRunner().invoke(cli.app, ["demo", str(folder), "--budget", "0.6"])
    assert ran.exit_code == 0, ran.output
    sizes = {}
    for path in folder.iterdir():
        with Image.open(path) as image:
            image.load()
            sizes[path.name] = image.size
    small, large = (112, 75), (448, 300)
    assert sizes.pop("compare.png")[0] > 4 * 320  # five panels beside each other, less than one of them to spare
    assert sizes == {
        "small.png": small, "enlarged-1.png": large, "enlarged-0.6.png": large,
        "where-1.png": small, "where-0.6.png": small,
    }  # fmt: skip
    lines = ran.output.splitlines()
    assert "112x75 pixels, enlarged 4 times" in lines[0]
    assert lines[1].startswith("  budget 1: ")
    assert "GFLOPs (100%)" in lines[1]
    assert lines[2].startswith("  budget 0.6: ")
    assert str(folder / "compare.png") in lines[3]


def test_a_budget_that_cannot_be_met_is_an_error(tmp_path):
    ran = CliRunner().invoke(cli.app, ["demo", str(tmp_path), "--budget", "0.001"])
    assert isinstance(ran.exception, BudgetError)


def test_the_files_are_named_by_the_budget_as_it_was_given(tmp_path):
    ran = CliRunner().invoke(cli.app, ["demo", str(tmp_path), "--budget", "60%"])
    assert ran.exit_code == 0
    assert (tmp_path / "enlarged-60%.png").exists()


def test_a_tensor_becomes_the_picture_it_shows():
    x = torch.tensor([0.0, 0.2, 1.0]).view(1, 1, 1, 3).expand(1, 3, 2, 3)
    image = pictures_to_image(x)
    assert (image.mode, image.size) == ("RGB", (3, 2))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 51, 255]


def test_panels_show_the_same_box_enlarged_without_smoothing():
    red, blue = (Image.new("RGB", (10, 10), color) for color in ("red", "blue"))
    red.putpixel((3, 4), (0, 255, 0))
    sheet = np.asarray(side_by_side([("first", red), ("second", blue)], (2, 3, 6, 8), zoom=3))
    assert sheet.shape == (3 * 5 + 28, 2 * 3 * 4 + 8, 3)
    first, gap, second = sheet[28:, :12], sheet[:, 12:20], sheet[28:, 20:]
    assert (second == [0, 0, 255]).all()
    assert (gap[28:] == 255).all()
    green = (first == [0, 255, 0]).all(-1)
    assert (np.argwhere(green).min(0).tolist(), np.argwhere(green).max(0).tolist()) == ([3, 3], [5, 5])
    assert green.sum() == 9
    assert (first[~green] == [255, 0, 0]).all()
