from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from foveate.errors import BudgetError
from foveate.layers import whole_upscaler
from foveate.layers.whole_upscaler import WholeUpscaler, spans


class Blur(WholeUpscaler):
    """Sees three pixels, and doubles the size."""

    scale, halo, grid = 2, 4, 4

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 7, padding=3)
        self.seen = []

    def forward(self, x):
        self.seen.append(tuple(x.shape[2:]))
        return F.pixel_shuffle(self.conv(x), 2)

    def render(self, x):
        return self(x), 0.5, {"pieces": 1}

    def _flops_per_pixel(self):
        return 7.0


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3000), st.integers(1, 900), st.integers(1, 24))
def test_spans_cover_on_the_grid(length, limit, grid):
    found = spans(length, limit, grid)
    assert found[0][0] == 0
    assert found[-1][1] == length
    assert all(a[1] == b[0] for a, b in pairwise(found))
    assert all(start % grid == 0 and 0 < stop - start < max(limit, grid) + grid for start, stop in found)


def test_a_picture_of_a_pieces_size_is_run_as_a_whole_whatever_the_tile():
    net, x = Blur(), torch.rand(1, 3, 20, 33)
    for tile in (None, 3):
        net.seen.clear()
        done = net.upscale(x, tile=tile)
        assert net.seen == [(20, 33)]
        assert torch.equal(done.image, net(x).detach())
        assert done.counts == {"pieces": 1}


def test_larger_pictures_are_cut_on_the_grid_with_context(monkeypatch):
    monkeypatch.setattr(whole_upscaler, "PIECE", 16)
    net, x = Blur(), torch.rand(1, 3, 20, 33)
    done = net.upscale(x)
    assert net.seen == [(16, 16), (16, 20), (16, 13), (12, 16), (12, 20), (12, 13)]
    torch.testing.assert_close(done.image, net(x).detach())
    assert done.counts == {"pieces": 6}
    assert done.flops == 0.5 * 7 * 20 * 33
    assert done.effort.shape == (1, 1, 20, 33)
    assert (done.effort == 0.5).all()


def test_strips_of_wide_pictures_are_low(monkeypatch):
    monkeypatch.setattr(whole_upscaler, "STRIP_PIXELS", 33 * 8)
    net, x = Blur(), torch.rand(1, 3, 20, 33)
    strips = list(net.strips(lambda x0, y0, x1, y1: x[..., y0:y1, x0:x1], 20, 33))
    assert [s.image.shape[2] for s in strips] == [16, 16, 8]
    torch.testing.assert_close(torch.cat([s.image for s in strips], 2), net(x))


def test_a_budget_is_refused():
    with pytest.raises(BudgetError, match="from 1"):
        Blur().upscale(torch.rand(1, 3, 4, 4), 0.5)
