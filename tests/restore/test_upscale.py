"""The verb `upscale` from Python: any picture in, the same kind out, under a budget, and nothing left half-written.

Two networks stand in for the trained ones: `Repeat` enlarges by repeating pixels, so that every value of a result is
known, and a small PCSR with random weights decides pixel by pixel.
"""

import errno
import io
import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms

from foveate import weights
from foveate.data import pictures
from foveate.engine.budget import Budget
from foveate.errors import BudgetError, InputError, PictureError, UnknownSystemError
from foveate.layers.upscaler import Upscaler
from foveate.restore import upscale as verb
from foveate.restore.espcn import ESPCN
from foveate.restore.pcsr import PCSR
from foveate.restore.upscale import Report, methods, network, upscale


class Repeat(Upscaler):
    """Every pixel becomes s x s equal ones."""

    slug = "repeat"
    halo = 0

    def __init__(self, scale=2):
        super().__init__()
        self.scale = scale
        self.register_parameter("kernel", torch.nn.Parameter(torch.ones(3, 1, scale, scale)))

    def forward(self, x):
        return F.conv_transpose2d(x, self.kernel, stride=self.scale, groups=3)


def repeated(pixels, scale=2):
    return np.asarray(pixels).repeat(scale, 0).repeat(scale, 1)


SMALL = {"encoder_config": {"channels": 8, "blocks": 1}, "heavy": [32, 32], "light": [4], "classifier": [4]}


@pytest.fixture
def adaptive():
    torch.manual_seed(0)
    return PCSR(2, **SMALL).eval()


@pytest.fixture
def trained(tmp_path_factory, monkeypatch, adaptive):
    """Weights of small networks in place of those that come with foveate: pcsr x2 and espcn x2, x3."""
    folder = tmp_path_factory.mktemp("weights")
    weights.save(adaptive, "pcsr", 2, {"config": {"scale": 2, **SMALL}}, folder)
    for scale in (2, 3):
        weights.save(ESPCN(scale, (4, 4)), "espcn", scale, {"config": {"scale": scale, "widths": [4, 4]}}, folder)
    monkeypatch.setattr(weights, "FOLDER", folder)
    network.cache_clear()
    yield folder
    network.cache_clear()


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def photo():
    """A piece of a photograph, half smooth and half textured, uint8 [30, 41, 3]."""
    piece = pictures.samples()["astronaut"][:, 90:120, 190:231]
    return (piece * 255).round().byte().permute(1, 2, 0).numpy()


def saved(path, pixels, **extras):
    Image.fromarray(pixels).save(path, **extras)
    return path


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image)


# ---------------------------------------------------------------------- the same kind comes out


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 2), (5, 7, 3), (5, 7, 4), (1, 1), (1, 1, 3), (1, 9, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
def test_an_array_comes_back_as_an_array_with_every_colour_repeated(shape, dtype):
    given = (noise(*shape) * {np.uint8: 1.0, np.uint16: 257.0}.get(dtype, 1 / 255)).astype(dtype)
    found = upscale(given, method=Repeat()).image
    assert (type(found), found.dtype) == (np.ndarray, dtype)
    assert found.shape == (2 * shape[0], 2 * shape[1], *shape[2:])
    colours = slice(None) if len(shape) == 2 or shape[2] in (1, 3) else slice(-1)
    expected = repeated(given)
    if len(shape) == 3:
        found, expected = found[..., colours], expected[..., colours]
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.float64])
def test_a_tensor_comes_back_as_a_tensor_of_its_rank_and_type(channels, dtype):
    given = torch.rand(channels, 4, 6) if dtype.is_floating_point else torch.from_numpy(noise(channels, 4, 6))
    given = given.to(dtype)
    for x in (given, given[None]):
        found = upscale(x, method=Repeat(3)).image
        assert (found.dtype, found.shape) == (dtype, (*x.shape[:-2], 12, 18))
        colours = 1 if channels < 3 else 3
        expected = x.repeat_interleave(3, -1).repeat_interleave(3, -2)
        torch.testing.assert_close(found[..., :colours, :, :], expected[..., :colours, :, :], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("mode", "becomes"),
    [("1", "L"), ("L", "L"), ("LA", "LA"), ("P", "RGB"), ("RGB", "RGB"), ("RGBA", "RGBA"), ("I;16", "I;16"),
     ("I", "I"), ("F", "F"), ("CMYK", "RGB")],
)  # fmt: skip
def test_a_pillow_image_comes_back_in_its_mode_or_the_one_that_holds_its_colours(mode, becomes):
    if mode in ("I", "I;16"):
        given = Image.fromarray(noise(5, 7).astype(np.uint16) * 257)
        given = given.convert("I") if mode == "I" else given
    elif mode == "F":
        given = Image.fromarray(noise(5, 7).astype(np.float32) / 255)
    else:
        given = Image.fromarray(noise(5, 7, 3)).convert(mode)
    found = upscale(given, method=Repeat()).image
    assert (found.mode, found.size) == (becomes, (14, 10))
    plain = given if becomes == mode else given.convert(becomes)
    np.testing.assert_allclose(np.asarray(found), repeated(plain), atol=1e-6)


def test_a_path_without_a_target_gives_a_pillow_image_and_with_one_the_path(tmp_path):
    source, target = saved(tmp_path / "in.png", noise(5, 7, 3)), tmp_path / "out.png"
    image = upscale(source, method=Repeat()).image
    assert isinstance(image, Image.Image)
    assert upscale(str(source), str(target), method=Repeat()).image == target
    assert np.array_equal(pixels_of(target), np.asarray(image))
    assert np.array_equal(pixels_of(target), repeated(noise(5, 7, 3)))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".jpg"])
def test_the_extension_of_the_target_names_the_format(tmp_path, suffix):
    smooth = np.linspace(0, 255, 24, dtype=np.uint8)[:, None].repeat(16, 1)[..., None].repeat(3, 2)
    upscale(smooth, tmp_path / f"out{suffix}", method=Repeat())
    with Image.open(tmp_path / f"out{suffix}") as image:
        assert image.format == {".png": "PNG", ".tif": "TIFF", ".webp": "WEBP", ".jpg": "JPEG"}[suffix]
        assert np.abs(np.asarray(image).astype(int) - repeated(smooth)).max() <= (
            0 if suffix in (".png", ".tif") else 6
        )


def test_sixteen_bits_stay_sixteen_bits(tmp_path):
    deep = np.random.default_rng(0).integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    upscale(deep, tmp_path / "deep.png", method=Repeat())
    again = upscale(tmp_path / "deep.png", tmp_path / "deeper.tif", method=Repeat())
    found = pictures.load(again.image).pixels
    assert found.dtype == np.uint16
    assert np.array_equal(found, repeated(deep, 4))


def test_a_palette_with_a_transparent_colour_becomes_colour_with_alpha(tmp_path):
    image = Image.fromarray(noise(5, 7) % 2, "P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.save(tmp_path / "in.gif", transparency=1)
    found = upscale(tmp_path / "in.gif", method=Repeat()).image
    assert found.mode == "RGBA"
    index = repeated(noise(5, 7) % 2)
    assert (np.asarray(found)[..., :3] == np.array([[255, 0, 0], [0, 0, 255]])[index]).all()
    alpha = np.asarray(found)[..., 3].astype(int)
    assert alpha[index == 0].mean() > 127 + alpha[index == 1].mean()


@pytest.mark.parametrize("tile", [None, 1, 3])
def test_alpha_is_enlarged_by_bicubic_interpolation_of_the_whole_picture(tile):
    given = torch.rand(1, 4, 11, 9, generator=torch.Generator().manual_seed(0))
    found = upscale(given, method=Repeat(3), tile=tile).image
    whole = F.interpolate(given[:, 3:], scale_factor=3, mode="bicubic").clamp(0, 1)
    torch.testing.assert_close(found[:, 3:], whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_is_applied_once(tmp_path, orientation):
    quarters = np.zeros((8, 12, 3), np.uint8)
    quarters[:4, :6], quarters[:4, 6:], quarters[4:, :6] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "A camera"
    source = saved(tmp_path / "in.png", quarters, exif=exif)
    upscale(source, tmp_path / "out.png", method=Repeat())
    turned = Image.fromarray(quarters)
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.get(orientation)  # Pillow's Transpose
    upright = np.asarray(turned if turn is None else turned.transpose(Image.Transpose(turn)))
    with Image.open(tmp_path / "out.png") as image:
        assert np.array_equal(np.asarray(image), repeated(upright))
        assert image.getexif().get(0x0112, 1) == 1
        assert image.getexif()[0x010F] == "A camera"


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_the_colour_profile_is_kept(tmp_path, suffix):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    source = saved(tmp_path / "in.png", noise(5, 7, 3), icc_profile=profile)
    upscale(source, tmp_path / f"out{suffix}", method=Repeat())
    with Image.open(tmp_path / f"out{suffix}") as image:
        assert image.info["icc_profile"] == profile
    assert upscale(source, method=Repeat()).image.info["icc_profile"] == profile


# ---------------------------------------------------------------------- cutting changes nothing


@pytest.mark.parametrize(("method", "share"), [("pcsr", 1), ("pcsr", 0.6), ("espcn", 1)])
def test_the_result_does_not_depend_on_the_tile(photo, adaptive, method, share):
    model = {"pcsr": adaptive, "espcn": ESPCN(2, (6, 4))}[method]
    whole, report = upscale(photo, method=model, budget=share)
    for tile in (1000, 16, 7):
        cut, cut_report = upscale(photo, method=model, budget=share, tile=tile)
        assert np.abs(cut.astype(int) - whole).max() <= 1
        assert cut_report.decisions == pytest.approx(report.decisions, abs=2e-3)


@pytest.mark.parametrize("tile", [None, 7])
@pytest.mark.parametrize("kind", ["grey", "colour", "alpha", "deep"])
def test_a_streamed_file_holds_what_the_result_in_memory_holds(tmp_path, photo, adaptive, tile, kind):
    given = {"grey": photo[..., 0], "colour": photo, "alpha": np.dstack([photo, photo[..., 0]]),
             "deep": photo.astype(np.uint16) * 257}[kind]  # fmt: skip
    pictures.save(tmp_path / "in.png", given)
    memory = upscale(given, method=adaptive, budget=0.7, tile=tile).image
    for suffix in (".png", ".tif"):
        upscale(tmp_path / "in.png", tmp_path / f"out{suffix}", method=adaptive, budget=0.7, tile=tile)
        assert np.array_equal(pictures.load(tmp_path / f"out{suffix}").pixels.squeeze(), memory)


def test_progress_counts_the_rows_of_the_source(photo):
    seen = []
    upscale(photo, method=Repeat(), tile=8, progress=lambda done, all: seen.append((done, all)))
    assert seen == [(7, 30), (15, 30), (22, 30), (30, 30)]


# ---------------------------------------------------------------------- budget, report, map


def test_the_report_says_what_was_spent(photo, adaptive):
    image, report = upscale(photo, method=adaptive, budget="70%")
    full = adaptive.full_flops(30, 41)
    assert (report.method, report.scale, report.budget) == ("pcsr", 2, "0.7")
    assert (report.height, report.width) == image.shape[:2] == (60, 82)
    assert report.full_flops == full
    assert report.share == pytest.approx(report.flops / full)
    assert 0.65 < report.share <= 0.7 + 1e-9
    assert set(report.decisions) == {"heavy", "light"}
    assert report.flops == pytest.approx(adaptive.cost(report.decisions["heavy"]) * 30 * 41)
    assert sum(report.decisions.values()) == pytest.approx(1)
    assert report.seconds > 0
    assert report.peak_bytes is None or report.peak_bytes >= 0
    assert report.map is None


def test_a_report_travels_as_json_and_reads_as_a_line():
    report = Report("pcsr", 2, "0.5", 82, 60, 0.5, 1.25e9, 2.5e9, 0.123, None, {"heavy": 0.25, "light": 0.75})
    assert Report(**json.loads(json.dumps(report.to_dict()))) == report
    assert str(report) == "82x60 by pcsr x2: 1.2 of 2.5 GFLOPs (50%), 0.12 s, heavy 25%, light 75%"


def test_budgets_in_flops_and_as_a_share_buy_the_same(photo, adaptive):
    full = adaptive.full_flops(30, 41)
    share = upscale(photo, method=adaptive, budget=0.75)
    for text in (f"{0.75 * full / 1e9!r} GFLOPs", f"{0.75 * full / 2e6!r} MMACs"):
        found = upscale(photo, method=adaptive, budget=text)
        assert np.array_equal(found.image, share.image)
        assert found.report.share == share.report.share
    assert upscale(photo, method=adaptive, budget=Budget(full, "gflops")).report.share == 1


def test_a_time_is_weighed_against_the_time_of_the_full_network(photo, adaptive):
    assert upscale(photo, method=adaptive, budget="1000 s").report.share == 1
    with pytest.raises(BudgetError, match="'espcn'"):
        upscale(photo, method=adaptive, budget="1e-9 ms")


@pytest.mark.parametrize("share", [1, 0.6])
def test_the_map_shows_where_the_compute_went(tmp_path, photo, adaptive, share):
    where = tmp_path / "where.png"
    drawn = upscale(photo, method=adaptive, budget=share, map=where).report.map
    assert drawn.size == upscale(photo[..., 0], method=adaptive, map=True).report.map.size == (41, 30)
    assert np.array_equal(pixels_of(where), np.asarray(drawn))
    assert np.array_equal(
        np.asarray(upscale(photo, method=adaptive, budget=share, map=True).report.map), np.asarray(drawn)
    )
    colours = np.unique(np.asarray(drawn).reshape(-1, 3), axis=0)
    assert len(colours) > 2  # the photograph shines through
    flat = np.full((30, 41, 3), 128, np.uint8)
    assert len(np.unique(np.asarray(upscale(flat, method=Repeat(), map=True).report.map).reshape(-1, 3), axis=0)) == 1


@pytest.mark.parametrize("tile", [None, 7])
def test_the_map_of_a_large_picture_leaves_pixels_out(photo, adaptive, tile, monkeypatch):
    whole = np.asarray(upscale(photo, method=adaptive, budget=0.6, map=True).report.map)
    monkeypatch.setattr(verb, "MAP_SIDE", 15)
    small = np.asarray(upscale(photo, method=adaptive, budget=0.6, map=True, tile=tile).report.map)
    assert small.shape == (10, 14, 3)
    assert np.mean(np.abs(small.astype(int) - whole[::3, ::3]) > 1) < 0.02  # tiles may move a borderline pixel


# ---------------------------------------------------------------------- methods


def test_methods_are_known_by_their_weights(trained):
    assert verb.methods() == {"pcsr": [2], "espcn": [2, 3]}
    assert isinstance(network("pcsr", 2), PCSR)
    assert network("espcn", 3) is network("espcn", 3)
    assert upscale(noise(2, 3, 3), scale=3, method="espcn").image.shape == (6, 9, 3)
    assert upscale(noise(2, 3, 3), scale=2).report.method == "pcsr"


def test_every_method_with_weights_enlarges_at_every_scale_it_has():
    there = methods()
    if not there:
        pytest.skip("no weights come with this copy of foveate")
    assert "adk-net" not in there
    for slug, scales in there.items():
        for scale in scales or [2]:
            image, report = upscale(noise(5, 7, 3), scale=scale, method=slug, map=bool(scales))
            assert image.shape == (5 * scale, 7 * scale, 3)
            assert (report.method, report.share) == (slug, pytest.approx(1, abs=0.05))
            assert not scales or report.map.size == (7, 5)
    network.cache_clear()


# ---------------------------------------------------------------------- bad input


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


BAD_FILES = {
    "missing": (None, "no such file"),
    "empty": (b"", "the file is empty"),
    "truncated": (png(noise(40, 40, 3))[:2000], "damaged or incomplete"),
    "not a picture": (b"a,b\n1,2\n", "not a picture"),
    "header only": (png(noise(40, 40, 3))[:33], "damaged or incomplete|not a picture"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_bad_file_gets_one_error_and_leaves_nothing(tmp_path, what):
    content, message = BAD_FILES[what]
    if content is not None:
        (tmp_path / "in.png").write_bytes(content)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(PictureError, match=message) as caught:
        upscale(tmp_path / "in.png", tmp_path / "out.png", method=Repeat(), map=tmp_path / "map.png")
    assert "in.png" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


BAD_ARGUMENTS = {
    "scale 0": ({"scale": 0}, InputError, "whole number.*got 0"),
    "scale -1": ({"scale": -1}, InputError, "whole number.*got -1"),
    "scale 2.5": ({"scale": 2.5}, InputError, r"whole number.*got 2\.5"),
    "scale nan": ({"scale": float("nan")}, InputError, "whole number.*got nan"),
    "scale inf": ({"scale": float("inf")}, InputError, "whole number.*got inf"),
    "scale text": ({"scale": "2"}, InputError, "whole number.*got '2'"),
    "scale True": ({"scale": True}, InputError, "whole number.*got True"),
    "scale 7": ({"scale": 7}, InputError, "enlarges by 2, got scale 7"),
    "scale 10**9": ({"scale": 10**9}, InputError, "enlarges by 2, got scale 1000000000"),
    "unknown method": ({"method": "pcrs"}, UnknownSystemError, "pcsr"),
    "method of another kind": ({"method": "fastv"}, InputError, "no method of upscale; use one of pcsr, espcn"),
    "tile 0": ({"tile": 0}, InputError, "at least one pixel, got 0"),
    "tile -5": ({"tile": -5}, InputError, "at least one pixel, got -5"),
    "budget in tokens": ({"budget": "64 tokens"}, BudgetError, "64 tokens.*share such as 0.5.*GFLOPs"),
    "budget below the floor": ({"budget": 0.01}, BudgetError, r"from 0\.\d\d to 1.*got 0\.01.*'espcn'"),
    "unknown extension": ({"out": "out.bmp"}, PictureError, r"extension must be one of \.png"),
    "no extension": ({"out": "out"}, PictureError, r"extension must be one of \.png"),
    "missing folder": ({"out": "absent/out.png"}, PictureError, "no folder"),
    "output is the input": ({"out": "in.png"}, PictureError, "being read"),
    "map in a missing folder": ({"map": "absent/map.png"}, PictureError, "no folder"),
    "map of unknown extension": ({"map": "map.bmp"}, InputError, "ends in .png"),
    "map is the input": ({"map": "in.png"}, PictureError, "being read"),
    "map is the output": ({"map": "out.png"}, InputError, "out.png"),
    "unknown device": ({"device": "abacus"}, InputError, "abacus"),
}


@pytest.mark.parametrize("what", BAD_ARGUMENTS)
def test_a_bad_argument_gets_one_error_and_leaves_nothing(tmp_path, monkeypatch, trained, what):
    changes, kind, message = BAD_ARGUMENTS[what]
    monkeypatch.chdir(tmp_path)
    content = saved(tmp_path / "in.png", noise(6, 8, 3)).read_bytes()
    arguments = {"out": "out.png", "scale": 2, "method": "pcsr"} | changes
    with pytest.raises(kind, match=message) as caught:
        upscale("in.png", **arguments)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.png"]
    assert (tmp_path / "in.png").read_bytes() == content


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((0, 4, 3), np.uint8), "nothing in it"),
        (np.full((4, 4, 3), np.nan, np.float32), "NaN"),
        (torch.full((3, 4, 4), float("inf")), "infinite"),
        (torch.zeros(2, 3, 4, 4), "holds 2 pictures"),
        (None, "NoneType is no picture"),
    ],
)
def test_what_is_no_picture_gets_one_error_and_leaves_nothing(tmp_path, picture, message):
    with pytest.raises(PictureError, match=message):
        upscale(picture, tmp_path / "out.png", method=Repeat())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_that_may_not_be_written_gets_one_error(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(PictureError, match="no permission"):
        upscale(noise(4, 4, 3), tmp_path / "locked" / "out.png", method=Repeat())


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg", ".webp"])
def test_a_full_disk_gets_one_error_and_leaves_nothing(tmp_path, monkeypatch, suffix):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PictureError, match="the disk is full"):
        upscale(noise(4, 4, 3), tmp_path / f"out{suffix}", method=Repeat())
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_leaves_the_old_file(tmp_path):
    target = saved(tmp_path / "out.png", noise(3, 3))

    def stop(done, all):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upscale(noise(40, 4, 3), target, method=Repeat(), tile=8, progress=stop)
    assert list(tmp_path.iterdir()) == [target]
    assert np.array_equal(pixels_of(target), noise(3, 3))
