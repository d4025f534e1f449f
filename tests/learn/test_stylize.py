"""The verb `stylize`: the laws of jobs, tiles, styles and what it refuses."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from foveate.data import pictures
from foveate.errors import FoveateError, InputError, WeightsError
from foveate.learn import stylize as module
from foveate.learn.image_transform import TransformNet
from foveate.learn.stylize import style_network, styles, stylize, stylize_file

H, W = 18, 25
CONFIG = {"widths": [4, 6, 8], "blocks": 1}


@pytest.fixture
def folder(tmp_path_factory, monkeypatch):
    """A folder of weights with the style "wild"."""
    home = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    network = TransformNet(**CONFIG)
    save_file({k: v.half() for k, v in network.state_dict().items()}, home / "stylize-wild.safetensors")
    (home / "stylize-wild.json").write_text(json.dumps({"config": CONFIG}))
    monkeypatch.setattr(module, "FOLDER", home)
    style_network.cache_clear()
    yield home
    style_network.cache_clear()


@pytest.fixture
def paint(folder):
    return lambda *args, **settings: stylize(*args, style="wild", **settings)


@pytest.fixture
def photo():
    piece = pictures.samples()["astronaut"][:, 90 : 90 + H, 200 : 200 + W]
    return (piece * 255).round().byte().permute(1, 2, 0).numpy()


def unit(picture):
    """Any kind of picture as [H, W, C] in 0..1."""
    if isinstance(picture, torch.Tensor):
        return picture.double().reshape(picture.shape[-3:]).permute(1, 2, 0).numpy()
    array = np.asarray(picture)
    return (array / (np.iinfo(array.dtype).max if array.dtype.kind in "iu" else 1)).reshape(*array.shape[:2], -1)


def test_every_kind_of_picture_comes_back_as_itself(paint, photo, tmp_path):
    floats = (photo / 255).astype(np.float32)
    chw = torch.from_numpy(floats).permute(2, 0, 1).contiguous()
    with torch.inference_mode():
        expected = style_network("wild")(chw[None])[0].clamp(0, 1).permute(1, 2, 0).numpy()
    assert np.abs(expected - floats).mean() > 0.05
    for given in (photo, photo.astype(np.uint16) * 257, floats, chw, chw[None], Image.fromarray(photo)):
        found = paint(given).image
        assert isinstance(found, Image.Image) if isinstance(given, Image.Image) else type(found) is type(given)
        if not isinstance(given, Image.Image):
            assert (found.dtype, found.shape) == (given.dtype, given.shape)
        assert np.abs(unit(found) - expected).max() <= 1 / 255
    source, target = tmp_path / "in.png", tmp_path / "out.png"
    Image.fromarray(photo).save(source)
    assert paint(source, target).image == target
    assert np.abs(unit(Image.open(target)) - expected).max() <= 1 / 255


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "I;16"])
def test_modes_are_kept_and_transparency_stays(paint, photo, mode):
    picture = Image.fromarray(photo)
    if mode == "I;16":
        picture = Image.fromarray(photo[..., 0].astype(np.uint16) * 257)
    if mode == "RGBA":
        picture.putalpha(Image.fromarray(photo[..., 1]))
    picture = picture if picture.mode == mode else picture.convert(mode)
    found = paint(picture).image
    assert (found.mode, found.size) == (mode, (W, H))
    if mode == "RGBA":
        assert np.array_equal(np.asarray(found)[..., 3], photo[..., 1])


def test_orientation_is_applied_once(paint, photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo).save(tmp_path / "in.jpg", exif=exif, quality=95)
    paint(tmp_path / "in.jpg", tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as found:
        assert found.size == (H, W)
        assert found.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (7, 5), (33, 2)])
def test_odd_sizes(paint, height, width):
    found = paint(torch.full((3, height, width), 0.5)).image
    assert found.shape == (3, height, width)
    assert torch.isfinite(found).all()


def test_strength_leads_from_the_picture_to_the_style(paint, photo):
    x = torch.from_numpy(photo).permute(2, 0, 1) / 255
    none, half, full = (paint(x, strength=s).image for s in (0.0, 0.5, 1.0))
    torch.testing.assert_close(none, x)
    with torch.inference_mode():
        styled = style_network("wild")(x[None])[0]
    torch.testing.assert_close(half, ((x + styled) / 2).clamp(0, 1))
    torch.testing.assert_close(full, styled.clamp(0, 1))


def test_tiles_of_a_small_picture_give_what_the_whole_gives(paint):
    x = pictures.samples()["astronaut"][:, 20:120, 150:243]
    whole, report = paint(x)
    assert report.tiles == 1
    for tile in (32, 50):
        cut, report = paint(x, tile=tile)
        assert report.tiles == (12 if tile == 32 else 4)
        torch.testing.assert_close(cut, whole, atol=2e-5, rtol=0)


def test_a_large_picture_has_no_seams_and_statistics_of_all_its_parts(paint, monkeypatch):
    """Above the limit, statistics come from windows spread over the picture, and tiles agree with each other."""
    monkeypatch.setattr(module, "WHOLE", 64 * 64)
    monkeypatch.setattr(module, "TILE", 64)
    monkeypatch.setattr(module, "SAMPLED", (3, 56))
    x = pictures.samples()["astronaut"][:, :150, 100:290]
    rows = []
    found, report = paint(x, progress=lambda y, all: rows.append((y, all)))
    assert report.tiles == 9
    assert rows == [(64, 150), (128, 150), (150, 150)]
    other = paint(x, tile=100).image
    torch.testing.assert_close(found, other, atol=2e-5, rtol=0)
    with torch.inference_mode():
        whole = style_network("wild")(x[None])[0].clamp(0, 1)
    assert float((found - whole).abs().mean()) < 0.1 * float((found - x).abs().mean())


def test_windows_are_spread_over_the_whole_picture(monkeypatch, folder):
    monkeypatch.setattr(module, "WHOLE", 1)
    monkeypatch.setattr(module, "SAMPLED", (3, 8))
    x = torch.zeros(1, 40, 30)
    x[:, :, 20:], x[:, 32:] = 0.5, 1.0
    painter = module._Painter(style_network("wild"), pictures.load(x), 1.0, None, "cpu")
    windows = painter.samples()
    assert windows.shape == (9, 3, 8, 8)
    assert [float(w.mean()) for w in windows] == pytest.approx([0, 0, 0.5] * 2 + [1, 1, 1], abs=0.13)


def test_the_same_picture_gives_the_same_result_and_a_report(paint, photo):
    (first, report), (second, _) = paint(photo), paint(photo)
    assert np.array_equal(first, second)
    assert (report.style, report.width, report.height, report.tiles) == ("wild", W, H, 1)
    assert report.seconds > 0
    # Per pixel: 9x9 in and out, 3x3 to a half and to a quarter and back (after the doubling), two in the block.
    macs = 2 * 3 * 81 * 4 + (4 * 6 / 4 + 6 * 8 / 16 + 2 * 8 * 8 / 16 + 8 * 6 / 4 + 6 * 4) * 9
    assert report.flops == pytest.approx(2 * macs * H * W, rel=0.02)
    assert json.loads(json.dumps(report.to_dict()))["strength"] == 1.0
    assert "25x18 in the style 'wild'" in str(report)


def test_styles_by_name_by_file_and_as_networks(folder, photo, tmp_path):
    assert styles() == ["wild"]
    named = stylize(photo, style="wild").image
    assert np.array_equal(stylize(photo, style=str(folder / "stylize-wild.safetensors")).image, named)
    assert np.array_equal(stylize(photo, style=style_network("wild")).image, named)
    torch.manual_seed(1)
    port = TransformNet(**CONFIG, bound="bytes")
    with torch.no_grad():
        port.deconv3.conv2d.bias.fill_(100)
    save_file(port.state_dict(), tmp_path / "candy.safetensors")  # as PyTorch's example names them, no card
    found = stylize(photo, style=str(tmp_path / "candy.safetensors")).image
    with torch.inference_mode():
        expected = port(torch.from_numpy(photo).permute(2, 0, 1)[None] / 255)[0].clamp(0, 1)
    assert np.abs(unit(found) - unit(expected)).max() <= 1 / 255


def test_a_file_of_a_batch_gives_its_report(folder, photo, tmp_path):
    Image.fromarray(photo).save(tmp_path / "in.png")
    report = stylize_file(tmp_path / "in.png", tmp_path / "out.png", style="wild")
    assert report["width"] == W
    assert (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"style": "rococo"}, InputError, "no style 'rococo'; use one of wild"),
        ({"style": "absent.safetensors"}, WeightsError, "absent"),
        ({"style": "wild", "strength": 1.2}, InputError, "1.2"),
        ({"style": "wild", "tile": 0}, InputError, "got 0"),
        ({"style": "wild", "device": "moon"}, InputError, "moon"),
        ({"style": TransformNet((4,), 1, scale=2)}, InputError, "enlarges by 2"),
    ],
)
def test_settings_that_make_no_sense(folder, photo, settings, error, words):
    with pytest.raises(error, match=words):
        stylize(photo, **settings)


def test_damaged_weights(folder, photo):
    (folder / "stylize-bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="stylize-bad"):
        stylize(photo, style="bad")
    (folder / "stylize-wild.json").write_text(json.dumps({"config": {**CONFIG, "blocks": 2}}))
    style_network.cache_clear()
    with pytest.raises(WeightsError, match="res2"):
        stylize(photo, style="wild")


@pytest.mark.parametrize(
    "picture",
    [
        pytest.param(np.zeros((0, 4, 3), np.uint8), id="empty array"),
        pytest.param(np.zeros(4, np.uint8), id="rank 1"),
        pytest.param(torch.zeros(1, 1, 3, 4, 4), id="rank 5"),
        pytest.param(np.full((4, 4, 3), np.nan, np.float32), id="NaN array"),
        pytest.param("absent.png", id="missing file"),
        pytest.param(None, id="None"),
    ],
)
def test_unusable_pictures(paint, picture):
    with pytest.raises(InputError):
        paint(picture)


@pytest.mark.parametrize("damage", ["truncated", "text", "no place to write"])
def test_broken_files_leave_nothing_behind(paint, photo, tmp_path, damage):
    stream = io.BytesIO()
    Image.fromarray(photo).save(stream, "PNG")
    content = {"truncated": stream.getvalue()[:-200], "text": b"not a picture"}.get(damage, stream.getvalue())
    (tmp_path / "in.png").write_bytes(content)
    target = tmp_path / ("absent" if damage == "no place to write" else "") / "out.png"
    with pytest.raises(FoveateError):
        paint(tmp_path / "in.png", target)
    assert [path.name for path in tmp_path.iterdir()] == ["in.png"]


def test_what_comes_along_can_be_used(photo):
    style_network.cache_clear()
    for name in styles():
        found = stylize(photo, style=name).image
        assert np.abs(unit(found) - unit(photo)).mean() > 0.02


def test_it_is_on_the_face_of_the_library():
    import foveate

    assert foveate.stylize is stylize
