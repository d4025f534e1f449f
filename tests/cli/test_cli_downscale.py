"""`foveate downscale` and `foveate rescale-cycle`, and `foveate upscale` to any size."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from foveate import cli
from foveate.restore.downscale import downscale, rescale_cycle


@pytest.fixture
def foveate(tmp_path, monkeypatch, capsys):
    """Run a verb in this process, in an empty folder: (exit code, lines of output, lines on stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["foveate", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return left.value.code or 0, said.out.splitlines(), said.err.splitlines()

    return run


def draw(name, side=24, seed=0):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side + 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(name)
    return pixels


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image)


def files_in(folder):
    files = (path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())
    return sorted(name for name in files if ".foveate-journal" not in name)


def test_one_picture_is_what_the_library_makes_of_it(foveate):
    pixels = draw("in.png")
    code, out, err = foveate("downscale", "in.png", "out.png", "--scale", 2, "--report", "cost.json")
    assert (code, out, len(err)) == (0, [], 1)
    assert err[0].startswith("out.png: 15x12 by lanczos /2: ")
    assert np.array_equal(pixels_of("out.png"), downscale(pixels, scale=2).image)
    report = json.loads(Path("cost.json").read_text())
    assert (report["method"], report["width"], report["shrunk"]) == ("lanczos", 15, True)
    assert foveate("downscale", "in.png", "area.png", "--size", "10x9", "-m", "area", "--tile", 5, "-q") == (0, [], [])
    expected = downscale(pixels, size=(10, 9), method="area").image
    assert np.abs(pixels_of("area.png").astype(int) - expected).max() <= 1


def test_a_folder_goes_on_where_it_stopped(foveate):
    for seed, name in enumerate(("in/a.png", "in/deep/b.png")):
        draw(name, seed=seed)
    Path("in/c.png").write_text("not a picture")
    code, _, err = foveate("downscale", "in", "out", "--scale", 2.5, "--report", "cost.json")
    assert code == 2
    assert err[0].startswith("foveate: in/c.png: ")
    assert "2 done, 0 skipped as done before, 1 failed" in err[1]
    assert files_in("out") == ["a.png", "deep/b.png"]
    assert [entry["state"] for entry in json.loads(Path("cost.json").read_text())] == ["done", "failed", "done"]
    assert "0 done, 2 skipped" in foveate("downscale", "in", "out", "--scale", 2.5)[2][1]
    assert "2 done, 0 skipped" in foveate("downscale", "in", "out", "--scale", 2.5, "-m", "area")[2][1]


def test_upscale_takes_a_size(foveate):
    draw("in.png")
    code, _, err = foveate("upscale", "in.png", "out.png", "--method", "bicubic", "--size", "70x50")
    assert (code, pixels_of("out.png").shape) == (0, (50, 70, 3))
    assert err[0].startswith("out.png: 70x50 by bicubic x2.333x2.083: ")
    assert foveate("upscale", "in.png", "out", "--method", "lanczos", "--scale", 1.5, "-q") == (0, [], [])
    assert pixels_of("out/in.png").shape == (36, 45, 3)


def test_a_cycle_is_printed_and_drawn(foveate):
    draw("in.png")
    line = ["rescale-cycle", "in.png", "--scale", 2, "--methods", "lanczos+bicubic, area+area", "--times", 2]
    code, out, err = foveate(*line, "--out", "rounds")
    assert (code, err) == (0, ["pictures in rounds"])
    found = [text.split("\t") for text in out]
    assert [row[:2] for row in found] == [[m, n] for m in ("lanczos+bicubic", "area+area") for n in "12"]
    expected = list(rescale_cycle("in.png", scale=2, method="area+area", times=2))
    assert found[2][2:] == [f"{expected[0].psnr:.2f}", f"{expected[0].ssim:.4f}", f"{expected[0].change:.2f}"]
    assert len(files_in("rounds")) == 2 * (2 * 2 + 1)
    values = json.loads("\n".join(foveate(*line, "--json")[1]))
    assert [v["number"] for v in values] == [1, 2, 1, 2]
    assert values[3]["change"] is None  # an area cycle leaves its own result as it is


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("downscale in.png", "downscale needs an input and an output"),
        ("downscale in.png out.png --scale 0.5", "from 1 on"),
        ("downscale in.png out.png --size 10", "--size takes WxH"),
        ("downscale in.png out.png --size 100x100", "larger on a side"),
        ("downscale in.png out.png --method espcn", "no method of downscale"),
        ("downscale absent.png out.png", "no such file"),
        ("downscale in.png out.bmp", "extension"),
        ("downscale in.png in.png", "being read"),
        ("downscale in.png out.png --report in.png", "would overwrite"),
        ("downscale in.png new --format bmp", "cannot write format 'bmp'"),
        ("downscale in.png new --scale 0", "from 1 on"),
        ("downscale void new", "no pictures in void"),
        ("upscale in.png out.png --size 40x40", "pcsr takes a scale, not a size"),
        ("upscale in.png out.png --scale 2.7", "for any other scale use method"),
        ("rescale-cycle in.png --methods ,", "names no method"),
        ("rescale-cycle in.png --methods lanczos+nearest", "nearest"),
        ("rescale-cycle absent.png", "no such file"),
        ("rescale-cycle in.png --times 0", "at least once"),
        ("rescale-cycle in.png --out in.png", "name a folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(foveate, line, message):
    draw("in.png")
    Path("void").mkdir()
    content = Path("in.png").read_bytes()
    code, out, err = foveate(*line.split())
    assert (code, out, len(err)) == (2, [], 1)
    assert message in err[0]
    assert files_in(".") == ["in.png"]
    assert Path("in.png").read_bytes() == content


def test_help_shows_examples():
    for verb in ("downscale", "rescale-cycle"):
        assert f"foveate {verb} photo.png" in CliRunner().invoke(cli.app, [verb, "--help"]).output
