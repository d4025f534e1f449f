"""Laws of every codec that the catalogue knows, and a small fuzz of their files."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

import foveate
from foveate.compress.codec import Codec, methods, resolve
from foveate.compress.container import Container
from foveate.data import pictures
from foveate.errors import BitstreamError, BudgetError, InputError

pytest.importorskip("constriction")
_SPEC = importlib.util.spec_from_file_location("fuzz", Path(__file__).parents[2] / "benchmarks" / "fuzz_container.py")
assert _SPEC is not None
assert _SPEC.loader is not None
fuzz = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fuzz)


@pytest.fixture(params=methods())
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def photo() -> npt.NDArray[np.uint8]:
    """A piece of a photograph with an edge in it, [37, 45, 3]."""
    piece = pictures.samples()["astronaut"][:, 90:127, 200:245]
    return (piece * 255).round().byte().permute(1, 2, 0).numpy()


def _budget(method: str) -> str | None:
    units = resolve(method).units
    return fuzz.BUDGETS[units[0]] if units else None


def _compress(picture: Any, method: str) -> bytes:
    return foveate.compress(picture, method=method, budget=_budget(method))


def test_it_is_a_codec(method: str) -> None:
    codec = resolve(method)
    assert isinstance(codec, Codec)
    assert codec.slug == method
    assert set(codec.planes) <= {1, 2, 3, 4}
    assert 3 in codec.planes
    assert set(codec.units) <= {"bytes", "gaussians", "ms"}


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16"])
def test_size_and_mode_are_kept(method: str, photo: npt.NDArray[np.uint8], mode: str) -> None:
    picture = Image.fromarray(photo)
    if mode == "I;16":
        picture = Image.fromarray(photo[..., 0].astype(np.uint16) * 257)
    picture = picture.convert(mode)
    slope = np.add.outer(np.arange(37), np.arange(45)).astype(np.uint8)
    if mode[-1] == "A":
        picture.putalpha(Image.fromarray(slope))
    back = foveate.decompress(_compress(picture, method))
    assert (back.mode, back.size) == (mode, picture.size)
    first, second = (np.asarray(p).astype(float) / (65535 if mode == "I;16" else 255) for p in (picture, back))
    assert np.square(first - second).mean() < 10**-1.2
    if mode[-1] == "A":
        assert np.array_equal(np.asarray(back)[..., -1], slope)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (17, 2), (8, 8)])
def test_odd_sizes(method: str, height: int, width: int) -> None:
    back = foveate.decompress(_compress(torch.full((3, height, width), 0.5), method), kind="tensor")
    assert back.shape == (3, height, width)


def test_the_same_picture_gives_the_same_file_and_decoding_does_not_depend_on_threads(
    method: str, photo: npt.NDArray[np.uint8], tmp_path: Path
) -> None:
    data = _compress(photo, method)
    if resolve(method).units[:1] != ("ms",):
        assert data == _compress(photo, method)
    (tmp_path / "in.fov").write_bytes(data)
    here = foveate.decompress(data, kind="array")
    code = (
        "import sys, torch, foveate; torch.set_num_threads(2); "
        "sys.stdout.buffer.write(foveate.decompress(sys.argv[1], kind='array').tobytes())"
    )
    there = subprocess.run([sys.executable, "-c", code, tmp_path / "in.fov"], capture_output=True, check=True).stdout
    assert here.tobytes() == there


def test_a_window_is_a_part_of_the_whole(method: str, photo: npt.NDArray[np.uint8]) -> None:
    data = _compress(photo, method)
    whole = foveate.decompress(data, kind="array")
    part = foveate.decompress(data, window=(5, 7, 20, 11), kind="array")
    assert np.array_equal(part, whole[7:18, 5:25])
    for window in [(0, 0, 46, 1), (-1, 0, 2, 2), (0, 0, 0, 1), (1, 2, 3), "all"]:
        with pytest.raises(InputError, match="window"):
            foveate.decompress(data, window=window)


def test_a_size_is_rendered_or_refused(method: str, photo: npt.NDArray[np.uint8]) -> None:
    data = _compress(photo, method)
    if resolve(method).any_size:
        assert foveate.decompress(data, size=(90, 74)).size == (90, 74)
    else:
        with pytest.raises(InputError, match="45x37 only"):
            foveate.decompress(data, size=(90, 74))


def test_a_budget_in_bytes_is_kept(method: str, photo: npt.NDArray[np.uint8]) -> None:
    if "bytes" not in resolve(method).units:
        pytest.skip("takes no budget in bytes")
    assert len(foveate.compress(photo, method=method, budget="900 B")) <= 900
    assert len(foveate.compress(photo, method=method, budget="4 bpp")) <= 4 * 37 * 45 / 8
    assert len(foveate.compress(photo, method=method, budget="20%")) <= 0.2 * photo.size
    with pytest.raises(BudgetError, match="at least"):
        foveate.compress(photo, method=method, budget="40 B")
    with pytest.raises(BudgetError):
        foveate.compress(photo, method=method, budget="20 GFLOPs")


def test_a_prefix_decodes_coarser_or_is_refused_by_name(method: str, photo: npt.NDArray[np.uint8]) -> None:
    data = _compress(photo, method)
    try:
        outcome = foveate.decompress(data[:-1], prefix=True).size
    except BitstreamError as error:
        outcome = "refused" if "without its section" in str(error) else error
    assert outcome in ((45, 37), "refused")
    with pytest.raises(BitstreamError, match="truncated"):
        foveate.decompress(data[:-1])


def test_a_stop_keeps_a_valid_file(method: str, photo: npt.NDArray[np.uint8]) -> None:
    data = foveate.compress(photo, method=method, budget=_budget(method), progress=lambda share, psnr: True)
    assert foveate.decompress(data).size == (45, 37)


@pytest.mark.parametrize(
    "picture", [np.zeros((0, 4, 3), np.uint8), torch.full((3, 4, 4), float("nan")), "absent.png", None]
)
def test_unusable_pictures(method: str, picture: Any) -> None:
    with pytest.raises(InputError):
        _compress(picture, method)


@pytest.mark.parametrize("method", methods())
def test_damaged_files_are_refused_and_forged_ones_do_no_harm(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setattr(fuzz, "LIMIT", 2**13)
    random = np.random.default_rng(0)
    for data in fuzz.originals([method]).values():
        for _ in range(12):
            assert fuzz.outcome(fuzz.damaged(data, random), data, honest=True) in ("refused", "unchanged")
            assert fuzz.outcome(fuzz.forged(data, random), data, honest=False) in ("refused", "unchanged", "decoded")


def test_a_container_of_an_unknown_method_is_refused() -> None:
    data = Container("no-such-codec", 4, 4, 3, {"x": b""}).to_bytes()
    with pytest.raises(InputError, match="cannot decode 'no-such-codec'"):
        foveate.decompress(data)
    with pytest.raises(InputError, match="does not compress"):
        foveate.compress(np.zeros((4, 4, 3), np.uint8), method="pcsr")
