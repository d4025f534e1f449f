import errno
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from foveate.data import writing
from foveate.data.pictures import load, save, writer
from foveate.errors import PictureError


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.sampled_from(["u1", "u2"]),
    st.sampled_from([".png", ".tif"]), st.integers(0, 999),
)  # fmt: skip
def test_lossless_files_keep_every_value(tmp_path_factory, height, width, channels, dtype, suffix, seed):
    shape = (height, width, channels)
    pixels = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)
    path = save(tmp_path_factory.getbasetemp() / f"lossless{suffix}", pixels)
    back = load(path).pixels
    assert back.dtype == pixels.dtype
    assert np.array_equal(back, pixels)


def test_float_tiff_keeps_every_value(tmp_path):
    pixels = np.random.default_rng(0).random((4, 5, 3)).astype(np.float32)
    assert np.array_equal(load(save(tmp_path / "a.tiff", pixels)).pixels, pixels)


def test_float_png_has_sixteen_bits(tmp_path):
    pixels = np.random.default_rng(0).random((4, 5, 4))
    assert np.array_equal(load(save(tmp_path / "a.png", pixels)).pixels, np.round(pixels * 65535))


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".avif"])
def test_lossy_files_come_close_and_keep_profile_and_exif(tmp_path, suffix):
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x010E] = "a title"
    ramp = np.add.outer(np.arange(40) * 3, np.arange(50) * 2)[..., None] + np.array([0, 10, 20])
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "in.png", icc_profile=icc, exif=exif)
    picture = load(save(tmp_path / f"a{suffix}", tmp_path / "in.png"))
    assert np.abs(picture.pixels.astype(int) - ramp).max() < 12
    assert picture.icc == icc
    kept = Image.Exif()
    kept.load(picture.exif)
    assert kept[0x010E] == "a title"


def test_alpha_survives_webp(tmp_path):
    pixels = np.full((8, 8, 4), 90, np.uint8)
    pixels[:, 4:, 3] = 255
    assert np.array_equal(load(save(tmp_path / "a.webp", pixels)).pixels[..., 3], pixels[..., 3])


def test_values_are_rounded_and_clipped():
    picture = load(np.zeros((1, 4), np.uint8))
    with writer(None, picture, 1, 4) as out:
        out.rows(0, torch.tensor([-3.0, 100.4 / 255, 100.6 / 255, 7.0]).reshape(1, 1, 1, 4))
        assert out.close().tolist() == [[0, 100, 101, 255]]


def test_sixteen_bits_are_reduced_with_a_note(tmp_path):
    with pytest.warns(UserWarning, match="8 bits"):
        save(tmp_path / "a.jpg", np.zeros((4, 4), np.uint16))


def test_a_file_gives_a_pillow_image_when_no_target_is_named(tmp_path):
    picture = load(save(tmp_path / "a.png", np.zeros((2, 3, 3), np.uint8)))
    with writer(None, picture, 2, 3) as out:
        out.rows(0, torch.ones(1, 3, 2, 3))
        assert out.close().getpixel((2, 1)) == (255, 255, 255)
    deep = load(save(tmp_path / "b.png", np.zeros((2, 3, 3), np.uint16)))
    with pytest.raises(PictureError, match="name a target file"):
        writer(None, deep, 2, 3)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
def test_abort_leaves_nothing(tmp_path, suffix):
    picture = load(np.zeros((4, 4), np.uint8))
    out = writer(tmp_path / f"a{suffix}", picture, 4, 4)
    out.rows(0, torch.zeros(1, 1, 2, 4))
    out.abort()
    assert os.listdir(tmp_path) == []
    with pytest.raises(RuntimeError, match="by hand"), writer(tmp_path / f"a{suffix}", picture, 4, 4):
        raise RuntimeError("by hand")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_a_full_disk_leaves_nothing_and_keeps_the_old_file(tmp_path, suffix, monkeypatch):
    target = save(tmp_path / f"a{suffix}", np.zeros((4, 4), np.uint8))
    before = target.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PictureError, match="the disk is full"):
        save(target, np.ones((4, 4), np.uint8))
    assert os.listdir(tmp_path) == [target.name]
    assert target.read_bytes() == before


def test_a_disk_that_fills_up_between_rows(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    out = writer(tmp_path / "a.png", load(np.zeros((4, 4), np.uint8)), 4, 4)
    monkeypatch.setattr(writing.PngStream, "rows", full)
    with pytest.raises(PictureError, match="the disk is full"):
        out.rows(0, torch.zeros(1, 1, 4, 4))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("y", "shape", "reason"),
    [(1, (1, 3, 2, 4), "expected 0 next"), (0, (1, 1, 2, 4), "rows must be"), (0, (1, 3, 2, 5), "rows must be"),
     (0, (3, 2, 4), "rows must be"), (0, (1, 3, 9, 4), "4 in all")],
)  # fmt: skip
def test_rows_that_do_not_fit(tmp_path, y, shape, reason):
    out = writer(tmp_path / "a.png", load(np.zeros((4, 4, 3), np.uint8)), 4, 4)
    with pytest.raises(PictureError, match=reason):
        out.rows(y, torch.zeros(shape))
    assert os.listdir(tmp_path) == []


def test_missing_rows_and_nan(tmp_path):
    picture = load(np.zeros((4, 4), np.uint8))
    out = writer(tmp_path / "a.png", picture, 4, 4)
    out.rows(0, torch.zeros(1, 1, 3, 4))
    with pytest.raises(PictureError, match="3 of 4 rows"):
        out.close()
    bad = torch.zeros(1, 1, 4, 4)
    for bad[0, 0, 2, 1] in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(PictureError, match="NaN"):
            writer(tmp_path / "a.png", picture, 4, 4).rows(0, bad)
    assert os.listdir(tmp_path) == []


def test_formats_that_cannot_hold_the_picture(tmp_path):
    with pytest.raises(PictureError, match=r"no transparency; write a \.png"):
        writer(tmp_path / "a.jpg", load(np.zeros((2, 2, 4), np.uint8)), 2, 2)
    picture = load(np.zeros((2, 2), np.uint8))
    for name, side in (("a.webp", 16384), ("a.jpg", 65536)):
        with pytest.raises(PictureError, match=rf"ends at {side - 1}"):
            writer(tmp_path / name, picture, side, 2)
    with pytest.raises(PictureError, match="1 or more"):
        writer(None, picture, 0, 2)
    with pytest.raises(PictureError, match="Not enough memory"):
        writer(None, picture, 2**40, 2**40)
    assert os.listdir(tmp_path) == []


def test_the_input_is_never_overwritten(tmp_path):
    path = save(tmp_path / "a.png", np.zeros((2, 2), np.uint8))
    (tmp_path / "b.png").symlink_to(path)
    for target in (path, tmp_path / "b.png"):
        with pytest.raises(PictureError, match="the picture being read"):
            save(target, path)


def test_a_tall_png_stays_small_in_memory(tmp_path):
    import tracemalloc

    picture = load(np.zeros((1, 1), np.uint8))
    strip = torch.zeros(1, 1, 64, 4096)
    tracemalloc.start()
    with writer(tmp_path / "a.png", picture, 64 * 40, 4096) as out:
        for y in range(0, 64 * 40, 64):
            out.rows(y, strip)
        out.close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 4096 * 20  # a few strips; the picture has forty
