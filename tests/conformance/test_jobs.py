"""Laws of jobs: any picture in, the same kind of picture out, with a report of what it cost."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from foveate.data import pictures
from foveate.errors import BudgetError, FoveateError, InputError
from foveate.meter import count_flops

H, W = 18, 25


@pytest.fixture
def photo() -> npt.NDArray[np.uint8]:
    """A piece of a photograph with an edge in it, [18, 25, 3]."""
    piece = pictures.samples()["astronaut"][:, 90 : 90 + H, 200 : 200 + W]
    return (piece * 255).round().byte().permute(1, 2, 0).numpy()


def _unit(picture: Any) -> npt.NDArray[np.float64]:
    """Any kind of picture as [H, W, C] in 0..1."""
    if isinstance(picture, torch.Tensor):
        return picture.double().reshape(picture.shape[-3:]).permute(1, 2, 0).numpy()
    array = np.asarray(picture)
    top = np.iinfo(array.dtype).max if array.dtype.kind in "iu" else 1
    return (array / top).reshape(*array.shape[:2], -1)


def test_every_kind_of_picture_comes_back_as_itself(job: Any, photo: npt.NDArray[np.uint8], tmp_path: Path) -> None:
    unit = (photo / 255).astype(np.float32)
    chw = torch.from_numpy(unit).permute(2, 0, 1).contiguous()
    expected = _unit(job.run(chw)[0])
    assert expected.shape == (*job.size(H, W), 3)
    for given in (photo, photo.astype(np.uint16) * 257, unit, chw, chw[None], Image.fromarray(photo)):
        found = job.run(given)[0]
        assert isinstance(found, Image.Image) if isinstance(given, Image.Image) else type(found) is type(given)
        if isinstance(given, torch.Tensor | np.ndarray):
            assert (found.dtype, found.ndim) == (given.dtype, given.ndim)
        assert np.abs(_unit(found) - expected.clip(0, 1)).max() <= 1 / 255
    source, target = tmp_path / "in.png", tmp_path / "out.png"
    Image.fromarray(photo).save(source)
    assert isinstance(job.run(source, target)[0], str | Path)
    assert np.abs(_unit(Image.open(target)) - expected.clip(0, 1)).max() <= 1 / 255


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "I;16"])
def test_modes_are_kept(job: Any, photo: npt.NDArray[np.uint8], mode: str) -> None:
    picture = Image.fromarray(photo)
    if mode == "I;16":
        picture = Image.fromarray(photo[..., 0].astype(np.uint16) * 257)
    found = job.run(picture.convert(mode))[0]
    assert (found.mode, found.size) == (mode, job.size(H, W)[::-1])
    if mode == "RGBA":
        assert np.asarray(found)[..., 3].min() == 255
        picture.putalpha(0)
        assert np.asarray(job.run(picture)[0])[..., 3].max() == 0


def test_orientation_is_applied_once(job: Any, photo: npt.NDArray[np.uint8], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo).save(tmp_path / "in.jpg", exif=exif, quality=95)
    job.run(tmp_path / "in.jpg", tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as found:
        assert found.size == job.size(W, H)[::-1]
        assert found.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (7, 5), (33, 2)])
def test_odd_sizes(job: Any, height: int, width: int) -> None:
    found = job.run(torch.full((3, height, width), 0.5))[0]
    assert found.shape == (3, *job.size(height, width))
    assert torch.isfinite(found).all()


def test_the_same_picture_gives_the_same_result_at_every_budget(job: Any, photo: npt.NDArray[np.uint8]) -> None:
    for settings in [{"budget": 1}, {"budget": _floor(job)}] if job.budgets else [{}]:
        first, second = (np.asarray(job.run(photo, **settings)[0]) for _ in range(2))
        assert np.array_equal(first, second)


def test_a_report_comes_with_the_picture(job: Any, photo: npt.NDArray[np.uint8]) -> None:
    picture, report = job.run(photo)
    assert picture.shape == (*job.size(H, W), 3)
    assert report.flops > 0
    assert report.seconds > 0


def test_float32_and_bfloat16(job: Any, photo: npt.NDArray[np.uint8]) -> None:
    x, network = _tensor(photo), job.network()
    exact = network.upscale(x, 1.0).image
    rough = network.to(torch.bfloat16).upscale(x, 1.0).image
    assert (exact.dtype, rough.dtype) == (torch.float32, torch.bfloat16)
    assert (rough.float() - exact).abs().mean() < 0.01


def test_budget_1_is_the_dense_network(job: Any, photo: npt.NDArray[np.uint8]) -> None:
    x, network = _tensor(photo), job.network()
    with torch.inference_mode():
        dense = network(x)
    assert torch.allclose(network.upscale(x, 1.0).image, dense, atol=1e-5)


def test_flops_fall_with_the_budget(job: Any) -> None:
    network = job.network()
    if network.floor == 1:
        pytest.skip("spends the same on every picture")
    x = pictures.samples()["astronaut"][None, :, 20:148, 150:278]  # large enough for several patches
    shares = [network.floor, (network.floor + 1) / 2, 1.0]
    low, middle, full = (count_flops(network.upscale, x, share) for share in shares)
    assert low < middle < full
    for share in shares:
        assert network.upscale(x, share).flops <= 1.02 * share * network.full_flops(128, 128)


@pytest.mark.parametrize("budget", [0, -1, 2, float("nan"), "much", "10 tokens"])
def test_impossible_budgets(job: Any, photo: npt.NDArray[np.uint8], budget: Any) -> None:
    if not job.budgets:
        pytest.skip("knows no budget")
    with pytest.raises(BudgetError):
        job.run(photo, budget=budget)


def test_a_budget_below_the_floor_names_the_floor(job: Any, photo: npt.NDArray[np.uint8]) -> None:
    if not job.budgets:
        pytest.skip("knows no budget")
    floor = _floor(job)
    with pytest.raises(BudgetError, match=rf"{floor:.2f}"):
        job.run(photo, budget=floor / 2)


@pytest.mark.parametrize(
    "picture",
    [
        pytest.param(np.zeros((0, 4, 3), np.uint8), id="empty array"),
        pytest.param(torch.zeros(3, 4, 0), id="empty tensor"),
        pytest.param(np.zeros(4, np.uint8), id="rank 1"),
        pytest.param(torch.zeros(1, 1, 3, 4, 4), id="rank 5"),
        pytest.param(np.full((4, 4, 3), np.nan, np.float32), id="NaN array"),
        pytest.param(torch.full((3, 4, 4), float("inf")), id="infinite tensor"),
        pytest.param("absent.png", id="missing file"),
        pytest.param(None, id="None"),
    ],
)
def test_unusable_pictures(job: Any, picture: Any) -> None:
    with pytest.raises(InputError) as caught:
        job.run(picture)
    assert len(str(caught.value)) > 20


def _png(photo: npt.NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(photo).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "no place to write"])
def test_broken_files_leave_nothing_behind(job: Any, photo: npt.NDArray[np.uint8], tmp_path: Path, damage: str) -> None:
    content = {"empty": b"", "truncated": _png(photo)[:-200], "text": b"not a picture"}.get(damage, _png(photo))
    (tmp_path / "in.png").write_bytes(content)
    target = tmp_path / ("absent" if damage == "no place to write" else "") / "out.png"
    with pytest.raises(FoveateError):
        job.run(tmp_path / "in.png", target)
    assert [path.name for path in tmp_path.iterdir()] == ["in.png"]


def _tensor(photo: npt.NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(photo).permute(2, 0, 1)[None] / 255


def _floor(job: Any) -> float:
    floor: float = job.network().floor
    return floor
