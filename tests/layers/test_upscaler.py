import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from foveate.errors import BudgetError, InputError
from foveate.layers import upscaler
from foveate.layers.upscaler import (
    Rendered,
    Upscaler,
    check_picture,
    enlarge,
    gather_strips,
    strip_rows,
    sum_counts,
    window_reader,
    with_halo,
)
from foveate.meter import count_flops


class Blur(Upscaler):
    """A dense network of halo 3: a 5 x 5 convolution, then interpolation."""

    slug, cheaper = "blur", "espcn"

    def __init__(self, scale=2):
        super().__init__()
        self.scale, self.halo = scale, 3
        self.conv = nn.Conv2d(3, 3, 5, padding=2)

    def forward(self, x):
        return enlarge(self.conv(x), self.scale)


def blur(scale=2):
    torch.manual_seed(0)
    return Blur(scale).double()


@given(st.integers(1, 5000), st.integers(1, 30000), st.none() | st.integers(1, 400))
@settings(deadline=None, max_examples=50)
def test_strips_cover_the_picture_and_bound_memory(height, width, tile):
    rows = strip_rows(height, width, tile)
    assert [a for a, _ in rows] == [0, *(b for _, b in rows[:-1])]
    assert rows[-1][1] == height
    sides = [b - a for a, b in rows]
    assert 1 <= min(sides) <= max(sides) <= min(sides) + 1
    assert max(sides) <= (tile or height)
    # Never under 16 rows, or context would dominate.
    assert max(sides) * width <= max(upscaler.STRIP_PIXELS, 16 * width)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 5), st.data())
@settings(deadline=None, max_examples=40)
def test_a_window_with_its_context_is_cut_at_the_border(h, w, halo, data):
    x = torch.arange(h * w, dtype=torch.float32).view(1, 1, h, w)
    x0, y0 = data.draw(st.integers(0, w - 1)), data.draw(st.integers(0, h - 1))
    x1, y1 = data.draw(st.integers(x0 + 1, w)), data.draw(st.integers(y0 + 1, h))
    pixels, left, top = with_halo(window_reader(x), h, w, (x0, y0, x1, y1), halo)
    assert torch.equal(pixels[..., top : top + y1 - y0, left : left + x1 - x0], x[..., y0:y1, x0:x1])
    assert (left, top) == (min(halo, x0), min(halo, y0))
    assert pixels.shape[2:] == (top + y1 - y0 + min(halo, h - y1), left + x1 - x0 + min(halo, w - x1))


@pytest.mark.parametrize("scale", [2, 3])
@pytest.mark.parametrize("size", [(1, 1), (2, 9), (13, 17)])
@pytest.mark.parametrize("tile", [None, 1, 4, 8])
def test_a_dense_network_gives_the_same_in_tiles(scale, size, tile):
    net, x = blur(scale), torch.rand(2, 3, *size, dtype=torch.float64)
    done = net.upscale(x, tile=tile)
    torch.testing.assert_close(done.image, net(x).detach(), atol=1e-12, rtol=0)
    assert torch.equal(done.effort, torch.ones(2, 1, *size))
    assert done.flops == pytest.approx(2 * net.full_flops(*size))


def test_strips_come_from_top_to_bottom_at_full_width():
    net, x = blur(), torch.rand(1, 3, 11, 7, dtype=torch.float64)
    with torch.no_grad():
        strips = list(net.strips(window_reader(x), 11, 7, tile=4))
    assert [s.image.shape[2:] for s in strips] == [(6, 14), (8, 14), (8, 14)]
    torch.testing.assert_close(gather_strips(strips).image, net.upscale(x).image)


def test_full_flops_are_those_of_a_forward_pass():
    net = blur(3)
    assert net.full_flops(10, 14) == count_flops(net, torch.rand(1, 3, 10, 14, dtype=torch.float64))


def test_pictures_are_taken_in_the_type_of_the_weights():
    net = blur().to(torch.bfloat16)
    assert net.dtype == torch.bfloat16
    assert net.device == torch.device("cpu")
    assert net.upscale(torch.rand(1, 3, 5, 5)).image.dtype == torch.bfloat16


def test_strips_add_up_to_one_picture():
    parts = [
        Rendered(torch.full((1, 3, 2 * h, 4), float(h)), torch.full((1, 1, h, 2), 0.5), 10.0 * h, counts)
        for h, counts in ((1, {"heavy": 2}), (3, {"heavy": 1, "pixels": 7}))
    ]
    whole = gather_strips(parts)
    assert whole.image.shape == (1, 3, 8, 4)
    assert whole.image[0, 0, :, 0].tolist() == [1, 1, 3, 3, 3, 3, 3, 3]
    assert whole.effort.shape == (1, 1, 4, 2)
    assert whole.flops == 40
    assert whole.counts == sum_counts(p.counts for p in parts) == {"heavy": 3, "pixels": 7}
    assert gather_strips(parts[:1]) is parts[0]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 4, 4), r"\(3, 4, 4\)"),
        (torch.zeros(1, 4, 4, 4), r"\(1, 4, 4, 4\)"),
        (torch.zeros(1, 3, 0, 4), "empty"),
        (torch.zeros(0, 3, 4, 4), "empty"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "uint8"),
        (torch.full((1, 3, 4, 4), float("nan")), "nan_to_num"),
        (torch.full((1, 3, 4, 4), float("inf")), "infinite"),
    ],
)
def test_what_is_no_picture_is_refused(x, message):
    with pytest.raises(InputError, match=message):
        check_picture(x)
    with pytest.raises(InputError, match=message):
        blur().upscale(x)


@pytest.mark.parametrize("share", [0.5, 0.0, -1.0, 1.01, float("nan")])
def test_a_share_out_of_reach_is_refused_with_the_floor_and_the_cheaper_method(share):
    with pytest.raises(BudgetError, match=r"Blur x2 takes shares from 1\.00 to 1 .* use method 'espcn'"):
        blur().upscale(torch.rand(1, 3, 4, 4), share)


def test_saving_and_loading_gives_the_same_network(tmp_path):
    net = Blur(3)
    net.save_pretrained(tmp_path)
    again = Blur.from_pretrained(tmp_path)
    x = torch.rand(1, 3, 5, 6)
    assert again.scale == 3
    assert torch.equal(again(x), net(x))


def test_enlarging_keeps_pixel_centres():
    x = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    assert enlarge(x, 2)[0, 0, 0].tolist() == [0, 0.25, 0.75, 1]
