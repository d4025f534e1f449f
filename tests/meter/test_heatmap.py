import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.meter.heatmap import colors, heatmap

EFFORT = torch.linspace(0, 1, 15).view(1, 1, 3, 5)
PHOTO = torch.rand(1, 3, 3, 5, generator=torch.Generator().manual_seed(0))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=50))
@settings(deadline=None, max_examples=40)
def test_more_effort_is_never_darker(values):
    light = colors(np.sort(np.array(values))) @ [0.299, 0.587, 0.114]
    assert (np.diff(light) >= -1e-3).all()


def test_colours_lie_on_straight_lines_between_their_anchors():
    assert colors(np.array([0.25, 0.5, 0.75])).tolist() == [[81, 18, 124], [183, 55, 121], [252, 137, 97]]
    np.testing.assert_allclose(colors(np.array(0.125)), np.mean([[0, 0, 4], [81, 18, 124]], axis=0))


def test_values_beyond_the_ends_take_the_end_colours():
    assert np.array_equal(colors(np.array([-3.0, 2.0])), colors(np.array([0.0, 1.0])))


def test_without_a_photograph_the_picture_is_the_colours():
    drawn = heatmap(EFFORT)
    assert (drawn.mode, drawn.size) == ("RGB", (5, 3))
    assert np.array_equal(np.asarray(drawn), colors(EFFORT[0, 0].numpy()).round())


@pytest.mark.parametrize("opacity", [0, 0.3, 1])
def test_the_photograph_is_grey_beneath_the_colours(opacity):
    drawn = np.asarray(heatmap(EFFORT, PHOTO, opacity)).astype(float)
    grey = 255 * PHOTO[0].mean(0).numpy()[..., None]
    np.testing.assert_allclose(drawn, opacity * colors(EFFORT[0, 0].numpy()) + (1 - opacity) * grey, atol=0.51)


def test_effort_of_any_float_type_is_drawn():
    assert np.array_equal(np.asarray(heatmap(EFFORT.double())), np.asarray(heatmap(EFFORT)))
    assert np.abs(np.asarray(heatmap(EFFORT.bfloat16())).astype(int) - np.asarray(heatmap(EFFORT))).max() <= 4
