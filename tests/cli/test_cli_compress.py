"""foveate compress, decompress, inspect: files in, files out, one line when something is wrong."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from foveate.cli import app
from foveate.cli.compress import _stopping
from foveate.compress.container import Container
from foveate.data import pictures
from foveate.errors import BudgetError, FoveateError, InputError

pytest.importorskip("constriction")
METHOD = "predictive-sparse-decomposition"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    piece = pictures.samples()["astronaut"][:, 90:122, 200:240]
    file = tmp_path / "in.png"
    pictures.save(file, piece)
    return file


def _run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.output


def test_there_and_back(photo: Path, tmp_path: Path) -> None:
    small, back, corner = tmp_path / "a.fov", tmp_path / "back.png", tmp_path / "corner.png"
    said = _run("compress", photo, small, "--method", METHOD, "--budget", "4 bpp")
    size = small.stat().st_size
    assert size <= 4 * 32 * 40 / 8
    assert f"{small}: {size} bytes" in said
    _run("decompress", small, back)
    _run("decompress", small, corner, "--window", "3,5,20,10", "--quiet")
    whole, part = (np.asarray(Image.open(file)) for file in (back, corner))
    assert whole.shape == (32, 40, 3)
    assert np.array_equal(part, whole[5:15, 3:23])
    facts = json.loads(_run("inspect", small, "--json"))
    assert (facts["method"], facts["width"], facts["height"], facts["bytes"]) == (METHOD, 40, 32, size)
    assert sum(facts["sections"].values()) == size
    assert f"bytes\t{size}" in _run("inspect", small)


def test_folders(photo: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    photo.rename(tmp_path / "more" / "a.png")
    (tmp_path / "more" / "b.png").write_bytes(b"nothing")
    line = ["compress", tmp_path / "more", tmp_path / "small", "--budget", "4 bpp", "--set", "steps=1", "--quiet"]
    result = CliRunner().invoke(app, [str(part) for part in line])
    assert result.exit_code == 2
    assert "b.png: Cannot open" in result.output
    assert [file.name for file in (tmp_path / "small").glob("*.fov")] == ["a.fov"]
    _run("decompress", tmp_path / "small", tmp_path / "back", "--quiet")
    assert Image.open(tmp_path / "back" / "a.png").size == (40, 32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["compress", "in.png", "out.png"], InputError, r"ends in \.fov"),
        (["compress", "absent.png", "out.fov"], InputError, "no such file"),
        (["compress", "in.png", "out.fov", "--budget", "much"], BudgetError, "Cannot read 'much'"),
        (["compress", "in.png", "out.fov", "--budget", "9 B"], BudgetError, "at least"),
        (["compress", "in.png", "out.fov", "--budget", "1", "--quality", "30"], InputError, "not both"),
        (["compress", "in.png", "out.fov", "--method", "pcsr"], InputError, "does not compress"),
        (["compress", "in.png", "out.fov", "--set", "depth=3"], InputError, "cannot be set up"),
        (["compress", "in.png", "out.fov", "--set", "depth"], InputError, "NAME=VALUE"),
        (["compress", "in.png"], InputError, "only 'in.png'"),
        (["decompress", "in.png", "out.png"], InputError, "Not a foveate file"),
        (["decompress", "absent.fov", "out.png"], InputError, "Cannot open"),
        (["decompress", "in.png", "out.png", "--size", "big"], InputError, "--size takes WxH"),
        (["decompress", "in.png", "out.png", "--window", "1,2"], InputError, "--window takes"),
        (["inspect", "in.png"], InputError, "Not a foveate file"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    photo: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], error: type[FoveateError], message: str
) -> None:
    monkeypatch.chdir(photo.parent)
    with pytest.raises(error, match=message) as caught:
        _run(*arguments)
    assert "\n" not in str(caught.value)
    assert [file.name for file in photo.parent.iterdir()] == ["in.png"]


def test_a_damaged_file_is_refused_before_anything_is_written(photo: Path, tmp_path: Path) -> None:
    _run("compress", photo, tmp_path / "a.fov", "--budget", "4 bpp", "--quiet")
    data = bytearray((tmp_path / "a.fov").read_bytes())
    data[-9] ^= 4
    (tmp_path / "a.fov").write_bytes(data)
    with pytest.raises(InputError, match="checksum"):
        _run("decompress", tmp_path / "a.fov", tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT as in a terminal; a shell starts what runs in its background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_interruption_is_a_wish_and_the_second_is_not(interruptible: None) -> None:
    assert threading.current_thread() is threading.main_thread()
    said: list[str] = []
    with _stopping(said.append) as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGINT)
        assert asked()
        assert "again gives up" in said[0]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_encoder_that_is_interrupted_leaves_a_valid_file(
    interruptible: None, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from foveate.compress import verbs

    seen: list[bool] = []

    def compress(source: Path, *, progress, **settings: object) -> bytes:  # type: ignore[no-untyped-def]
        seen.append(progress(0.1, 20.0))
        os.kill(os.getpid(), signal.SIGINT)
        seen.append(progress(0.2, 21.0))
        return Container(METHOD, 4, 4, 3, {"best": b"so far"}).to_bytes()

    monkeypatch.setattr(verbs, "compress", compress)
    said = _run("compress", photo, tmp_path / "a.fov")
    assert seen == [False, True]
    assert Container.read((tmp_path / "a.fov").read_bytes()).sections["best"] == b"so far"
    assert "21.00 dB" in said
    assert "the best so far" in said


def test_help_does_not_load_torch() -> None:
    code = "import sys; from foveate.cli import app; print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["False"] * 2
