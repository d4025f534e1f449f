"""`foveate upscale`: one picture or a folder of them, on small networks that stand in for the trained ones."""

import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from foveate import cli, weights
from foveate.batch.pool import in_processes
from foveate.batch.run import ENGINES
from foveate.data.writing import Writer
from foveate.restore.espcn import ESPCN
from foveate.restore.pcsr import PCSR
from foveate.restore.upscale import network, upscale

SCRIPT = """\
from pathlib import Path

import foveate.weights

foveate.weights.FOLDER = Path({folder!r})

if __name__ == "__main__":
    from foveate.cli import main

    main()
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """A program that is `foveate` with the weights of small networks: pcsr x2 and espcn x2, x3."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    config = {"encoder_config": {"channels": 8, "blocks": 1}, "heavy": [32, 32], "light": [4], "classifier": [4]}
    weights.save(PCSR(2, **config), "pcsr", 2, {"config": {"scale": 2, **config}}, folder)
    for scale in (2, 3):
        weights.save(ESPCN(scale, (4, 4)), "espcn", scale, {"config": {"scale": scale, "widths": [4, 4]}}, folder)
    path = folder / "program.py"
    path.write_text(SCRIPT.format(folder=str(folder)))
    return path


@pytest.fixture
def foveate(script, tmp_path, monkeypatch, capsys):
    """Run `foveate upscale` in this process, in an empty folder: (exit code, lines of output, lines on stderr)."""
    monkeypatch.setattr(weights, "FOLDER", script.parent)
    monkeypatch.chdir(tmp_path)
    network.cache_clear()

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["foveate", "upscale", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return left.value.code or 0, said.out.splitlines(), said.err.splitlines()

    yield run
    network.cache_clear()


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def pictures_in(folder, *names, side=6):
    folder = Path(folder)
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(side, side + 2, 3, seed=seed)).save(folder / name)
    return folder


def names_in(folder):
    """Everything in a folder and below, but for the journal's own files."""
    files = (path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())
    return sorted(name for name in files if ".foveate-journal" not in name)


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image)


# ---------------------------------------------------------------------- one picture


def test_one_picture_is_what_the_library_makes_of_it(foveate):
    pictures_in(".", "in.png")
    code, out, err = foveate("in.png", "out.png", "--scale", 2, "--budget", "60%")
    assert (code, out, len(err)) == (0, [], 1)
    assert err[0].startswith("out.png: 16x12 by pcsr x2: ")
    assert np.array_equal(pixels_of("out.png"), upscale(noise(6, 8, 3), scale=2, budget=0.6).image)
    assert names_in(".") == ["in.png", "out.png"]


def test_quiet_says_nothing(foveate):
    pictures_in(".", "in.png")
    assert foveate("in.png", "out.png", "-s", 2, "-q") == (0, [], [])
    assert names_in(".") == ["in.png", "out.png"]


def test_options_reach_the_library(foveate):
    pictures_in(".", "in.png")
    words = ["--scale", "3", "--method", "espcn", "--tile", "2", "--map", "where.png", "--report", "cost.json"]
    assert foveate("in.png", "out.webp", *words)[0] == 0
    report = json.loads(Path("cost.json").read_text())
    assert (report["method"], report["scale"], report["budget"]) == ("espcn", 3, "1")
    assert (report["width"], report["height"], report["share"]) == (24, 18, 1)
    assert report["flops"] == report["full_flops"] == ESPCN(3, (4, 4)).full_flops(6, 8)
    assert report["seconds"] > 0
    with Image.open("out.webp") as image, Image.open("where.png") as where:
        assert (image.format, image.size, where.size) == ("WEBP", (24, 18), (8, 6))


# ---------------------------------------------------------------------- many pictures


def test_a_folder_goes_into_a_folder_and_a_second_run_skips_what_is_done(foveate):
    pictures_in("in", "a.png", "b.jpg", "deep/c.bmp", "notes.tif")
    code, _, err = foveate("in", "out", "--scale", 2, "--report", "cost.json", "--map", "maps")
    assert (code, len(err)) == (0, 1)
    assert err[0].startswith("out: 4 done, 0 skipped as done before, 0 failed")
    expected = ["a.png", "b.png", "deep/c.png", "notes.png"]
    assert names_in("out") == names_in("maps") == expected
    assert {pixels_of(Path("maps") / name).shape for name in expected} == {(6, 8, 3)}
    assert np.array_equal(pixels_of("out/a.png"), upscale(noise(6, 8, 3), scale=2).image)
    entries = json.loads(Path("cost.json").read_text())
    assert [entry["target"] for entry in entries] == expected
    assert {(entry["state"], entry["message"], entry["report"]["width"]) for entry in entries} == {("done", None, 16)}

    before = {name: Path("out", name).stat().st_mtime_ns for name in expected}
    code, _, err = foveate("in", "out", "--scale", 2, "--map", "maps")
    assert (code, err[0].startswith("out: 0 done, 4 skipped as done before, 0 failed")) == (0, True)
    assert before == {name: Path("out", name).stat().st_mtime_ns for name in expected}

    Path("out/a.png").unlink()
    assert "1 done, 3 skipped" in foveate("in", "out", "--scale", 2, "--map", "maps")[2][0]
    assert "4 done, 0 skipped" in foveate("in", "out", "--scale", 2, "--map", "maps", "--again")[2][0]
    assert "4 done, 0 skipped" in foveate("in", "out", "--scale", 2, "--budget", "0.6")[2][0]


def test_several_files_or_one_go_into_a_folder(foveate):
    pictures_in(".", "a.png", "b.png")
    assert foveate("a.png", "b.png", "out", "-s", 2, "-q") == (0, [], [])
    assert foveate("a.png", "new", "-s", 2, "-q") == (0, [], [])
    assert (names_in("out"), names_in("new")) == (["a.png", "b.png"], ["a.png"])


def test_an_output_folder_inside_the_input_is_not_read_again(foveate):
    pictures_in("in", "a.png")
    for _ in range(2):
        assert foveate("in", "in/large", "-s", 2, "-q") == (0, [], [])
    assert names_in("in") == ["a.png", "large/a.png"]


@pytest.mark.parametrize(
    ("format", "found"), [("same", ["a.jpg", "b.png"]), ("webp", ["a.webp", "b.webp"]), (".TIFF", ["a.tiff", "b.tiff"])]
)
def test_the_format_of_a_batch(foveate, format, found):
    pictures_in("in", "a.jpg", "b.png")
    assert foveate("in", "out", "-s", 2, "--format", format, "-q") == (0, [], [])
    assert names_in("out") == found
    kinds = {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".tiff": "TIFF"}
    for name in found:
        with Image.open(Path("out", name)) as image:
            assert (image.format, image.size) == (kinds[Path(name).suffix], (16, 12))


def test_a_bad_file_does_not_stop_the_rest(foveate):
    pictures_in("in", "a.png", "c.png")
    Path("in/b.png").write_bytes(Path("in/a.png").read_bytes()[:-40])
    Path("in/d.png").write_text("not a picture")
    code, _, err = foveate("in", "missing.png", "out", "--scale", 2, "--report", "cost.json")
    assert code == 2
    assert names_in("out") == ["a.png", "c.png"]
    assert len(err) == 4
    for name, line in zip(("in/b.png", "in/d.png", "missing.png"), err, strict=False):
        assert line.startswith(f"foveate: {name}: Cannot open '{name}': ")
    assert err[3].startswith("out: 2 done, 0 skipped as done before, 3 failed")
    states = {entry["target"]: entry["state"] for entry in json.loads(Path("cost.json").read_text())}
    assert states == {"a.png": "done", "b.png": "failed", "c.png": "done", "d.png": "failed", "missing.png": "failed"}

    pictures_in("in", "b.png", "d.png")  # mended: only these are made
    code, _, err = foveate("in", "out", "--scale", 2)
    assert (code, err[0].startswith("out: 2 done, 2 skipped as done before, 0 failed")) == (0, True)


def test_jobs_reach_the_engine_with_a_worker_that_travels(foveate, monkeypatch):
    asked = []

    def engine(tasks, worker, jobs):
        asked.append((jobs, len(tasks)))
        return in_processes(tasks, ForkingPickler.loads(ForkingPickler.dumps(worker)), 1)

    monkeypatch.setitem(ENGINES, "process", engine)
    pictures_in("in", "a.png", "b.png")
    assert foveate("in", "out", "--scale", 2, "--jobs", 2, "--map", "maps", "-q") == (0, [], [])
    assert asked == [(2, 2)]
    assert names_in("out") == names_in("maps") == ["a.png", "b.png"]


@pytest.mark.slow
def test_several_processes_make_the_same_pictures(foveate, script, monkeypatch):
    main = ModuleType("__main__")
    main.__file__ = str(script)  # what new processes run first, so that they find the same weights
    monkeypatch.setitem(sys.modules, "__main__", main)
    pictures_in("in", "a.png", "b.png", "c.png")
    Path("in/d.png").write_text("not a picture")
    code, _, err = foveate("in", "two", "--scale", 2, "--budget", "0.6", "--jobs", 2, "--map", "maps")
    assert (code, len(err)) == (2, 2)
    assert err[0].startswith("foveate: in/d.png: Cannot open 'in/d.png': not a picture")
    assert names_in("two") == names_in("maps") == ["a.png", "b.png", "c.png"]
    for seed, name in enumerate(names_in("two")):
        expected = upscale(noise(6, 8, 3, seed=seed), scale=2, budget=0.6).image
        assert np.array_equal(pixels_of(Path("two", name)), expected)


def test_a_killed_batch_goes_on_where_it_stopped(foveate, script):
    names = [f"{i:02}.png" for i in range(20)]
    pictures_in("in", *names, side=90)
    command = [sys.executable, script, "upscale", "in", "out", "--scale", "2", "--quiet"]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        wait_for(lambda: len(list(Path("out").glob("*.png"))) >= 3 and list(Path("out").glob(".*.part")), process)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    there = {path: path.stat().st_mtime_ns for path in Path("out").glob("*.png")}
    assert 3 <= len(there) < 20
    expected = {name: upscale(noise(90, 92, 3, seed=i), scale=2).image for i, name in enumerate(names)}
    for path in there:
        assert np.array_equal(pixels_of(path), expected[path.name])

    code, _, err = foveate("in", "out", "--scale", 2)
    assert (code, len(err)) == (0, 1)
    skipped = int(err[0].split(" done, ")[1].split(" skipped")[0])
    assert len(there) - 1 <= skipped <= len(there)  # a kill between a rename and its row has one file made again
    assert sum(path.stat().st_mtime_ns == changed for path, changed in there.items()) == skipped
    assert names_in("out") == names  # nor any temporary file
    for name in names:
        assert np.array_equal(pixels_of(Path("out", name)), expected[name])


def wait_for(condition, process, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.001)


# ---------------------------------------------------------------------- bad input

BAD_LINES = {
    "missing": ("absent.png out.png --scale 2", "no such file"),
    "truncated": ("short.png out.png --scale 2", "damaged or incomplete"),
    "no picture": ("text.png out.png --scale 2", "not a picture"),
    "empty": ("empty.png out.png --scale 2", "the file is empty"),
    "nowhere to write": ("in.png", "upscale needs an input and an output, got only 'in.png'"),
    "scale 0": ("in.png out.png --scale 0", "got 0"),
    "scale -1": ("in.png out.png --scale -1", "got -1"),
    "scale 2.5": ("in.png out.png --scale 2.5", "2.5"),
    "scale 7": ("in.png out.png --scale 7", "enlarges by 2, got scale 7"),
    "scale 10**9": ("in.png out.png --scale 1000000000", "got scale 1000000000"),
    "unknown method": ("in.png out.png --scale 2 --method pcrs", "pcsr"),
    "method of another kind": ("in.png out.png --scale 2 --method fastv", "no method of upscale"),
    "budget below the floor": ("in.png out.png --scale 2 --budget 0.01", "to 1 of its full cost, got 0.01"),
    "budget in tokens": ("in.png out.png --scale 2 --budget 64tokens", "64 tokens"),
    "no budget": ("in.png out.png --scale 2 --budget much", "'much'"),
    "tile 0": ("in.png out.png --scale 2 --tile 0", "at least one pixel, got 0"),
    "unknown extension": ("in.png out.bmp --scale 2", "extension must be one of"),
    "missing folder": ("in.png absent/out.png --scale 2", "no folder"),
    "output is the input": ("in.png in.png --scale 2", "being read"),
    "map is the input": ("in.png out.png --scale 2 --map in.png", "in.png"),
    "map is the output": ("in.png out.png --scale 2 --map out.png", "out.png"),
    "report is the input": ("in.png out.png --scale 2 --report in.png", "in.png"),
    "report in a missing folder": ("in.png out.png --scale 2 --report absent/cost.json", "absent"),
    "unknown device": ("in.png out.png --scale 2 --device abacus", "abacus"),
    "a batch into a file": ("in.png text.png short.png", "'short.png' is a file; name a folder"),
    "a batch of unknown format": ("in.png new --scale 2 --format bmp", "cannot write format 'bmp'"),
    "a batch below the floor": ("in.png new --scale 2 --budget 0.01", "to 1 of its full cost, got 0.01"),
    "a batch of tile 0": ("in.png new --scale 2 --tile 0", "at least one pixel, got 0"),
    "a batch with maps over the sources": ("in.png new --scale 2 --map .", "'.'"),
    "a batch with maps over the results": ("in.png new --scale 2 --map new", "'new'"),
    "a batch of no jobs": ("in.png new --scale 2 --jobs 0", "jobs=0"),
    "a batch on an unknown engine": ("in.png new --scale 2 --engine steam", "'steam'"),
    "a batch on ray": ("in.png new --scale 2 --engine ray", "'ray'"),
    "a batch of unreadable budget": ("in.png new --scale 2 --budget much", "'much'"),
    "a batch of absurd scale": ("in.png new --scale 7", "got scale 7"),
    "an empty folder": ("void new --scale 2", "no pictures in void"),
}


@pytest.mark.parametrize("what", BAD_LINES)
def test_bad_input_is_one_line_and_exit_code_2(foveate, what):
    line, message = BAD_LINES[what]
    content = pictures_in(".", "in.png").joinpath("in.png").read_bytes()
    Path("short.png").write_bytes(content[:-40])
    Path("text.png").write_text("not a picture")
    Path("empty.png").touch()
    Path("void").mkdir()
    code, out, err = foveate(*line.split())
    assert (code, out) == (2, [])
    assert len(err) == 1, err
    assert message in err[0]
    assert names_in(".") == ["empty.png", "in.png", "short.png", "text.png"]
    assert Path("in.png").read_bytes() == content


@pytest.mark.filterwarnings("always")
def test_a_warning_is_one_line_without_a_word_of_python(foveate):
    Image.fromarray(noise(6, 8).astype(np.uint16) * 257).save("in.png")
    code, _, err = foveate("in.png", "out.jpg", "--scale", 2, "--quiet")
    assert (code, err) == (0, ["foveate: out.jpg: JPEG keeps 8 bits per sample; .png keeps 16."])


def test_a_run_stopped_by_hand_leaves_with_130_and_nothing_half_written(foveate, monkeypatch):
    pictures_in(".", "in.png")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "rows", stop)
    assert foveate("in.png", "out.png", "--scale", 2)[0] == 130
    assert names_in(".") == ["in.png"]


def test_help_shows_examples():
    text = CliRunner().invoke(cli.app, ["upscale", "--help"]).output
    assert "foveate upscale holiday/ enlarged/ --scale 2 --jobs 2" in text
