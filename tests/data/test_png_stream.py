import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from foveate.data import png_stream
from foveate.data.png_stream import PngStream


def encode(pixels, step, **options):
    file = io.BytesIO()
    png = PngStream(file, *pixels.shape, bits=8 * pixels.dtype.itemsize, **options)
    for y in range(0, len(pixels), step):
        png.rows(pixels[y : y + step])
    png.close()
    return file.getvalue()


@settings(deadline=None, max_examples=50)
@given(
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    channels=st.integers(1, 4),
    step=st.integers(1, 20),
    smooth=st.booleans(),
    seed=st.integers(0, 999),
)
def test_pillow_decodes_what_was_written(height, width, channels, step, smooth, seed):
    rng = np.random.default_rng(seed)
    ramp = np.add.outer(np.arange(height) * 3, np.arange(width) * 5)[..., None] + rng.integers(0, 3, channels)
    pixels = (ramp if smooth else rng.integers(0, 256, (height, width, channels))).astype(np.uint8)
    with Image.open(io.BytesIO(encode(pixels, step))) as image:
        assert image.mode == ("L", "LA", "RGB", "RGBA")[channels - 1]
        assert np.array_equal(np.asarray(image).reshape(pixels.shape), pixels)


def test_sixteen_bit_grey_is_big_endian():
    pixels = np.array([[[1], [256]], [[65535], [770]]], np.uint16)
    with Image.open(io.BytesIO(encode(pixels, 1))) as image:
        assert np.array_equal(np.asarray(image), pixels[..., 0])


@pytest.mark.parametrize("kind", range(5))
def test_prediction_follows_the_specification(kind):
    def paeth(a, b, c):
        near = [(abs(a + b - c - p), order) for order, p in enumerate((a, b, c))]
        return (a, b, c)[min(near)[1]]

    rng = np.random.default_rng(0)
    a, b, c = rng.integers(0, 256, (3, 1, 500)).astype(np.uint8)
    rule = (lambda a, b, c: 0, lambda a, b, c: a, lambda a, b, c: b, lambda a, b, c: (a + b) // 2, paeth)[kind]
    expected = [rule(int(x), int(y), int(z)) for x, y, z in zip(a[0], b[0], c[0], strict=True)]
    assert png_stream._predict(kind, a, b, c)[0].tolist() == expected


def test_filters_pay_on_a_gradient():
    ramp = np.add.outer(np.arange(128), np.arange(128))[..., None].astype(np.uint8)
    assert len(encode(ramp, 128)) < 1000


def test_rows_are_filtered_in_bounded_strips(monkeypatch):
    monkeypatch.setattr(png_stream, "_STRIP", 30)
    pixels = np.random.default_rng(1).integers(0, 256, (9, 4, 3)).astype(np.uint8)
    heights = []
    monkeypatch.setattr(png_stream, "_filtered", lambda rows, *rest: heights.append(len(rows)) or rows)
    encode(pixels, 9)
    assert max(heights) * 12 <= 30
    assert sum(heights) == 9


def test_profile_and_exif_are_embedded():
    exif = Image.Exif()
    exif[0x010E] = "a title"
    data = encode(np.zeros((2, 2, 3), np.uint8), 2, icc=b"profile" * 10, exif=exif.tobytes())
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert image.info["icc_profile"] == b"profile" * 10
        assert image.getexif()[0x010E] == "a title"
