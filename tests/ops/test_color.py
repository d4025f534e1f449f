import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import InputError
from foveate.ops.color import rgb_to_y, rgb_to_ycbcr, ycbcr_to_rgb

# What MATLAB's rgb2ycbcr gives, times 255.
KNOWN = {
    (0, 0, 0): (16, 128, 128),
    (1, 1, 1): (235, 128, 128),
    (0.5, 0.5, 0.5): (125.5, 128, 128),
    (1, 0, 0): (81.481, 90.203, 240),
    (0, 1, 0): (144.553, 53.797, 34.214),
    (0, 0, 1): (40.966, 240, 109.786),
}


def pixel(colour):
    return torch.tensor(colour, dtype=torch.float64).view(1, 3, 1, 1)


@pytest.mark.parametrize(("rgb", "ycbcr"), KNOWN.items())
def test_known_colours_have_matlabs_values(rgb, ycbcr):
    torch.testing.assert_close(rgb_to_ycbcr(pixel(rgb)) * 255, pixel(ycbcr), atol=1e-9, rtol=0)


@given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.integers(1, 7))
@settings(deadline=None, max_examples=25)
def test_there_and_back_is_the_same_picture(seed, h, w):
    x = torch.rand(2, 3, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(ycbcr_to_rgb(rgb_to_ycbcr(x)), x, atol=1e-12, rtol=0)


def test_the_conversion_keeps_batch_axes_and_precision():
    x = torch.rand(2, 4, 3, 5, 6, dtype=torch.float64)
    assert rgb_to_ycbcr(x).shape == x.shape
    assert rgb_to_y(x).shape == (2, 4, 1, 5, 6)
    torch.testing.assert_close(rgb_to_ycbcr(x)[1, 2], rgb_to_ycbcr(x[1, 2]))
    for convert in (rgb_to_y, rgb_to_ycbcr, ycbcr_to_rgb):
        assert convert(x).dtype == torch.float64


def test_y_is_the_first_channel_and_stays_in_the_studio_range():
    x = torch.rand(1, 3, 20, 20, dtype=torch.float64).round()  # corners of the RGB cube, where Y is extreme
    y = rgb_to_y(x)
    torch.testing.assert_close(y, rgb_to_ycbcr(x)[:, :1])
    assert y.min() >= 16 / 255 - 1e-12
    assert y.max() <= 235 / 255 + 1e-12


@pytest.mark.parametrize("convert", [rgb_to_y, rgb_to_ycbcr, ycbcr_to_rgb])
@pytest.mark.parametrize("shape", [(1, 1, 4, 4), (1, 4, 4, 4), (3, 4)])
def test_anything_but_three_channels_is_refused_by_name_and_shape(convert, shape):
    with pytest.raises(InputError, match="three channels") as caught:
        convert(torch.zeros(shape))
    assert convert.__name__ in str(caught.value)
    assert str(shape) in str(caught.value)
