"""Resampling: the weights of PyTorch's and Pillow's filters, and parts that are what the whole has there."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from foveate.errors import InputError
from foveate.layers.resample import KERNELS, Axis, cropped, grown, had, parts, resize, wholes

sides = st.integers(1, 40)


def picture(height, width, seed=0):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_matrix(x, size, kernel="bicubic"):
    rows, columns = wholes(tuple(x.shape[2:]), size)
    return rows.matrix(kernel).to(x) @ x @ columns.matrix(kernel).to(x).T


@settings(deadline=None, max_examples=40)
@given(sides, sides, sides, sides)
def test_the_matrices_of_bicubic_are_pytorchs_filter(height, width, h, w):
    x = picture(height, width)
    torch.testing.assert_close(by_matrix(x, (h, w)), resize(x, wholes((height, width), (h, w))), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("kernel", "name"), [("lanczos", "LANCZOS"), ("bicubic", "BICUBIC")])
@pytest.mark.parametrize("size", [(9, 7), (13, 20), (60, 44)])
def test_filters_are_pillows(kernel, name, size):
    x = picture(31, 22)[:1, :1]
    image = Image.fromarray(x[0, 0].float().numpy())
    expected = np.asarray(image.resize(size[::-1], getattr(Image.Resampling, name)))
    np.testing.assert_allclose(by_matrix(x, size, kernel)[0, 0], expected, atol=1e-5)


@pytest.mark.parametrize(("size", "window"), [((10, 5), (2, 4)), ((4, 20), (5, 1))])
def test_area_at_whole_scales_is_the_mean_of_blocks(size, window):
    x = picture(20, 20)
    torch.testing.assert_close(by_matrix(x, size, "area"), F.avg_pool2d(x, window))


def test_area_at_fractional_scales_weighs_pixels_by_their_share():
    x = torch.tensor([1.0, 2.0, 4.0]).view(1, 1, 1, 3)
    found = resize(x, wholes((1, 3), (1, 2)), "area")
    torch.testing.assert_close(found.flatten(), torch.tensor([(1 + 0.5 * 2) / 1.5, (0.5 * 2 + 4) / 1.5]))


@settings(deadline=None, max_examples=40)
@given(sides, sides, sides, st.sampled_from(KERNELS), st.data())
def test_a_part_is_what_the_whole_has_there(height, h, w, kernel, data):
    source, size = (height, 17), (h, w)
    want = []
    for n in size:
        first = data.draw(st.integers(0, n - 1))
        want.append((first, data.draw(st.integers(first + 1, n))))
    x = picture(*source)
    axes = parts(source, size, tuple(want), kernel)
    part = resize(cropped(x, ((0, source[0]), (0, source[1])), had(axes)), axes, kernel)
    whole = resize(x, wholes(source, size), kernel)
    torch.testing.assert_close(part, cropped(whole, ((0, h), (0, w)), tuple(want)), atol=1e-6, rtol=0)


@settings(deadline=None, max_examples=25)
@given(sides, sides, st.sampled_from(KERNELS))
def test_constants_stay(height, h, kernel):
    x = torch.full((1, 1, height, 3), 0.3, dtype=torch.float64)
    torch.testing.assert_close(resize(x, wholes((height, 3), (h, 5)), kernel), torch.full((1, 1, h, 5), 0.3).double())


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_same_size_changes_nothing(kernel):
    x = picture(6, 7)
    torch.testing.assert_close(resize(x, wholes((6, 7), (6, 7)), kernel), x, atol=1e-12, rtol=0)


def test_half_precision_is_resampled_in_float32():
    x = picture(9, 9).bfloat16()
    found = resize(x, wholes((9, 9), (4, 5)))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), resize(x.float(), wholes((9, 9), (4, 5))), atol=4e-3, rtol=0)


def test_spans_grow_as_far_as_the_picture_reaches():
    assert grown((3, 5), 2, 6) == (1, 6)
    assert Axis.part(10, 5, (0, 5)).have == (0, 10)


@pytest.mark.parametrize(
    ("x", "kernel", "message"),
    [
        (torch.zeros(1, 1, 4, 4), "nearest", "unknown kernel 'nearest'; use one of bicubic, lanczos, area"),
        (torch.zeros(1, 1, 5, 4), "bicubic", r"expected a picture \[B, C, 4, 4\], got \(1, 1, 5, 4\)"),
        (torch.zeros(4, 4), "bicubic", r"got \(4, 4\)"),
    ],
)
def test_what_does_not_fit_is_refused(x, kernel, message):
    with pytest.raises(InputError, match=message):
        resize(x, wholes((4, 4), (2, 2)), kernel)
