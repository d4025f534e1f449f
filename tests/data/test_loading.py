import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from foveate.data.pictures import load, samples, writer
from foveate.errors import PictureError


def same_kind(source, strip=3):
    """Pass a picture through window and writer unchanged."""
    picture = load(source)
    with writer(None, picture, picture.height, picture.width) as out:
        for y in range(0, picture.height, strip):
            out.rows(y, *picture.window(y, min(y + strip, picture.height), 0, picture.width))
        return out.close()


sizes = st.integers(1, 9)
seeds = st.integers(0, 999)


@settings(deadline=None, max_examples=50)
@given(sizes, sizes, st.integers(0, 4), st.sampled_from(["u1", "u2", "f2", "f4", "f8"]), seeds)
def test_arrays_come_back_as_they_were(height, width, channels, dtype, seed):
    shape = (height, width, channels) if channels else (height, width)
    values = np.random.default_rng(seed).random(shape)
    array = (values * np.iinfo(dtype).max).astype(dtype) if dtype[0] == "u" else values.astype(dtype)
    back = same_kind(array)
    assert back.dtype == array.dtype
    assert np.array_equal(back, array.astype("f4").astype(dtype))


@settings(deadline=None, max_examples=25)
@given(sizes, sizes, st.integers(1, 4), st.booleans(), st.sampled_from(["float32", "bfloat16", "uint8"]), seeds)
def test_tensors_come_back_as_they_were(height, width, channels, batched, dtype, seed):
    x = torch.rand(channels, height, width, generator=torch.Generator().manual_seed(seed))
    x = (x * 255).to(torch.uint8) if dtype == "uint8" else x.to(getattr(torch, dtype))
    x = x[None] if batched else x
    back = same_kind(x)
    assert back.dtype == x.dtype
    assert torch.equal(back, x)
    assert back.is_contiguous()


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I", "I;16", "F"])
def test_pillow_images_come_back_as_they_were(mode):
    rng = np.random.default_rng(0)
    shape = (5, 7, len(mode)) if mode in ("LA", "RGB", "RGBA") else (5, 7)
    kinds = {"I": np.int32, "I;16": np.uint16, "F": np.float32}
    pixels = (rng.random(shape) * {"I": 65535, "I;16": 65535, "F": 1}.get(mode, 255)).astype(kinds.get(mode, np.uint8))
    back = same_kind(Image.fromarray(pixels))
    assert back.mode == mode
    assert np.array_equal(np.asarray(back), pixels)


@pytest.mark.parametrize(
    ("mode", "seen"), [("1", "L"), ("P", "RGB"), ("CMYK", "RGB"), ("YCbCr", "RGB"), ("PA", "RGBA"), ("I;16B", "I;16")]
)
def test_other_modes_are_converted(mode, seen):
    image = Image.new("I;16B", (6, 4), 777) if mode == "I;16B" else Image.new("RGB", (6, 4), (255, 0, 0))
    if mode != "I;16B":
        image = image.convert("P").convert("PA") if mode == "PA" else image.convert(mode)
    back = same_kind(image)
    expected = {"I;16": 777, "L": image.convert("L").getpixel((0, 0)), "RGBA": (255, 0, 0, 255), "RGB": (255, 0, 0)}
    assert back.mode == seen
    assert np.abs(np.subtract(back.getpixel((3, 2)), expected[seen])).max() <= 1


def test_palette_transparency_becomes_alpha():
    image = Image.new("P", (2, 1), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    image.info["transparency"] = 1
    picture = load(image)
    assert picture.alpha
    assert picture.pixels[0].tolist() == [[255, 0, 0, 255], [0, 255, 0, 0]]


def test_window_values_and_alpha():
    array = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    color, alpha = load(array).window(1, 2, 1, 3)
    assert torch.equal(color * 255, torch.tensor([[[[16.0, 20]], [[17, 21]], [[18, 22]]]]))
    assert torch.equal(alpha * 255, torch.tensor([[[[19.0, 23]]]]))
    assert load(np.full((1, 1), 65535, np.uint16)).window(0, 1, 0, 1)[0].item() == 1
    for window in [(0, 3, 0, 3), (0, 0, 0, 3), (-1, 1, 0, 3), (0, 2, 2, 4)]:
        with pytest.raises(PictureError, match="does not fit"):
            load(array).window(*window)


def test_attributes():
    picture = load(np.zeros((2, 3, 2), np.uint16))
    assert (picture.height, picture.width, picture.channels, picture.alpha, picture.bits) == (2, 3, 1, True, 16)
    assert load(torch.zeros(3, 4, 5)).bits == 32


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_orientation_is_applied_and_removed(tmp_path, orientation, suffix):
    upright = np.zeros((16, 32), np.uint8)
    upright[:8, :8] = 255  # bright in the upper left
    stored = upright
    if orientation in (2, 3, 6, 7):
        stored = stored[:, ::-1]
    if orientation in (3, 4, 7, 8):
        stored = stored[::-1]
    if orientation >= 5:
        stored = stored.T
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = "a title"
    path = tmp_path / f"a{suffix}"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    picture = load(path)
    assert np.abs(picture.pixels[..., 0].astype(int) - upright).max() < 40
    if suffix != ".tif":
        kept = Image.Exif()
        kept.load(picture.exif)
        assert 0x0112 not in kept
        assert kept[0x010E] == "a title"


def test_stale_sizes_leave_the_exif_block(tmp_path):
    exif = Image.Exif()
    exif.get_ifd(0x8769).update({0xA002: 4, 0xA003: 4, 0x9286: b"note"})
    exif[0x8769] = {0xA002: 4, 0xA003: 4, 0x829A: 0.5}
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg", exif=exif)
    kept = Image.Exif()
    kept.load(load(tmp_path / "a.jpg").exif)
    assert dict(kept.get_ifd(0x8769)) == {0x829A: 0.5}


def test_profile_is_kept(tmp_path):
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("RGB", (3, 3)).save(tmp_path / "a.png", icc_profile=icc)
    assert load(tmp_path / "a.png").icc == icc
    assert same_kind(tmp_path / "a.png").info["icc_profile"] == icc
    assert load(Image.new("CMYK", (3, 3))).icc is None


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"byteorder": ">"}, {"planarconfig": "separate"}])
def test_sixteen_bit_colour_tiff(tmp_path, channels, options):
    import tifffile

    pixels = np.random.default_rng(0).integers(0, 65536, (4, 5, channels)).astype(np.uint16)
    stored = np.moveaxis(pixels, -1, 0) if "planarconfig" in options else pixels
    extra = ["unassalpha"] if channels == 4 else None
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", extrasamples=extra, **options)
    assert np.array_equal(load(tmp_path / "a.tif").pixels, pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_a_tiff_beyond_pillow(tmp_path, orientation):
    import tifffile

    stored = np.random.default_rng(0).integers(0, 65536, (3, 4, 5)).astype(np.uint16)
    tag = [(274, "H", 1, orientation, True)]
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, stored, photometric="rgb", planarconfig="separate", extratags=tag)
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # as Image.Transpose numbers them
    image = Image.fromarray((stored >> 8).astype(np.uint8).transpose(1, 2, 0))
    if orientation > 1:
        image = image.transpose(Image.Transpose(turns[orientation]))
    assert np.array_equal(load(path).pixels >> 8, np.asarray(image))


def test_animations_give_their_first_frame_with_a_note(tmp_path):
    frames = [Image.new("RGB", (3, 3), color) for color in ((255, 0, 0), (0, 0, 255))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match="2 pictures; only the first"):
        assert load(tmp_path / "a.gif").pixels[0, 0].tolist() == [255, 0, 0]


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def lying_png(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def bad_files(tmp_path):
    good = tmp_path / "good.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(good)
    jpeg = tmp_path / "good.jpg"
    Image.open(good).save(jpeg)
    yield "missing.png", None, "no such file"
    yield "empty.png", b"", "empty"
    yield "text.png", b"these are words, not pixels", "not a picture"
    yield "vector.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"
    yield "page.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not a picture"
    yield "half.png", good.read_bytes()[:2000], "damaged or incomplete"
    yield "half.jpg", jpeg.read_bytes()[: jpeg.stat().st_size // 2], "damaged or incomplete"
    yield "flipped.png", good.read_bytes()[:2000] + b"\0\1\2\3" + good.read_bytes()[2004:], "damaged or incomplete"
    yield "half.tif", b"II*\0\x08\0\0\0\x01", "TIFF"
    yield "liar.png", lying_png(20000, 20000), "promises 20000x20000 pixels"
    yield "giant.png", lying_png(100000, 100000), "above the limit"


def test_bad_files_get_one_clear_line(tmp_path):
    for name, data, reason in bad_files(tmp_path):
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(PictureError, match=reason) as caught:
            load(path)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(PictureError, match="is a folder"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (np.zeros((0, 4, 3), np.uint8), "nothing in it"),
        (np.zeros((2, 2, 2, 3), np.uint8), "no picture"),
        (np.zeros((3, 9, 9), np.uint8), r"transpose\(1, 2, 0\)"),
        (np.zeros((4, 4), np.int64), "int64"),
        (np.zeros((4, 4), bool), "bool"),
        (np.full((4, 4), np.nan), "NaN"),
        (np.full((4, 4), np.inf), "infinite"),
        (np.full((4, 4), 200.0), "divide by 255"),
        (np.full((4, 4), -0.5), "expected 0..1"),
        (torch.zeros(2, 3, 4, 4), "one at a time"),
        (torch.zeros(9, 9, 3), r"permute\(2, 0, 1\)"),
        (torch.zeros(9, 9), "no picture"),
        (torch.zeros(3, 0, 4), "nothing in it"),
        (Image.fromarray(np.full((2, 2), 70000, np.int32)), "70000"),
        (Image.new("F", (2, 2), 200.0), "divide by 255"),
        (7, "a path, a Pillow image"),
    ],
)
def test_bad_sources(source, reason):
    with pytest.raises(PictureError, match=reason):
        load(source)


def test_floats_a_little_outside_are_clipped():
    color, _ = load(np.array([[-0.0005, 1.0005]])).window(0, 1, 0, 2)
    assert color.flatten().tolist() == [0, 1]


def test_pillows_own_limit_is_left_alone(tmp_path):
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(PictureError):
        load(tmp_path / "missing.png")
    assert before == Image.MAX_IMAGE_PIXELS


def test_samples_are_photographs():
    names = samples()
    assert names["camera"].shape == (3, 512, 512)
    assert torch.equal(names["camera"][0], names["camera"][2])
    astronaut = names["astronaut"]
    assert 0 <= astronaut.min() < 0.1 < 0.9 < astronaut.max() <= 1
    astronaut.zero_()
    assert names["astronaut"].max() > 0.9
    assert "astronaut" in list(names)
