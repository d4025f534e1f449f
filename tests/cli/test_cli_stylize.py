"""`foveate stylize`: one picture or a folder of them, with a small network in the place of the trained ones."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from foveate import cli
from foveate.learn import stylize as module
from foveate.learn.image_transform import TransformNet

CONFIG = {"widths": [4], "blocks": 0}


@pytest.fixture
def foveate(tmp_path_factory, tmp_path, monkeypatch, capsys):
    """Run `foveate stylize` in this process, in an empty folder: (exit code, output, what is said beside it)."""
    home = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    save_file(TransformNet(**CONFIG).state_dict(), home / "stylize-strokes.safetensors")
    (home / "stylize-strokes.json").write_text(json.dumps({"config": CONFIG}))
    monkeypatch.setattr(module, "FOLDER", home)
    monkeypatch.chdir(tmp_path)
    module.style_network.cache_clear()

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["foveate", "stylize", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return left.value.code or 0, said.out, said.err

    yield run
    module.style_network.cache_clear()


def draw(path, side=12):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(side).integers(0, 256, (side, side + 3, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def test_one_picture(foveate, tmp_path):
    draw(tmp_path / "in.png")
    code, out, err = foveate("in.png", "out.png")
    assert (code, out) == (0, "")
    assert "out.png: 15x12 in the style 'strokes'" in err
    with Image.open("out.png") as found:
        assert found.size == (15, 12)
    assert foveate("in.png", "none.png", "--strength", 0, "-q") == (0, "", "")
    assert np.array_equal(np.asarray(Image.open("none.png")), np.asarray(Image.open("in.png")))


def test_a_folder_goes_on_where_it_stopped(foveate, tmp_path):
    for i, name in enumerate(("a.png", "deep/b.png")):
        draw(tmp_path / "album" / name, 10 + i)
    code, _, err = foveate("album", "painted")
    assert code == 0
    assert "2 done, 0 skipped" in err
    painted = tmp_path / "painted"
    names = sorted(p.relative_to(painted).as_posix() for p in painted.rglob("*.png"))
    assert names == ["a.png", "deep/b.png"]
    assert "0 done, 2 skipped" in foveate("album", "painted")[2]
    assert "2 done" in foveate("album", "painted", "--format", "jpg")[2]


def test_the_styles_are_listed(foveate):
    assert foveate("--list") == (0, "strokes\n", "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("in.png",), "needs an input and an output"),
        (("in.png", "out.png", "--style", "rococo"), "no style 'rococo'; use one of strokes"),
        (("in.png", "out.png", "--strength", "2"), "strength"),
        (("absent.png", "out.png"), "absent.png"),
        (("in.png", "folder/", "--format", "doc"), "cannot write format 'doc'"),
        (("in.png", "folder/", "--tile", "0"), "at least one pixel"),
    ],
)
def test_mistakes_are_said_in_a_line(foveate, tmp_path, words, said):
    draw(tmp_path / "in.png")
    code, out, err = foveate(*words)
    assert (code, out) == (2, "")
    assert said in err
    assert [p.name for p in tmp_path.iterdir()] == ["in.png"]
