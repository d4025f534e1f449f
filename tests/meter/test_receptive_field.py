import pytest
import torch
from torch import nn

from foveate.errors import InputError
from foveate.meter.receptive_field import effective_receptive_field, side_of


def test_pixels_score_by_the_gradient_that_raises_the_centre():
    layer = nn.Conv2d(2, 1, 3, padding=1, bias=False)
    x = torch.rand(3, 2, 7, 9)
    nn.init.ones_(layer.weight)
    with torch.no_grad():
        layer.weight[0, 0, 0, 2] = 4.0  # above and to the right of the centre
        layer.weight[0, 1, 2, 1] = -1.0  # what lowers it does not count
    score = effective_receptive_field(layer, x)
    total = torch.full((3, 3), 6.0)
    total[0, 2], total[2, 1] = 15.0, 3.0
    expected = torch.zeros(7, 9)
    expected[2:5, 3:6] = torch.log10(total + 1) / torch.log10(torch.tensor(16.0))
    torch.testing.assert_close(score, expected)


def test_a_silent_centre_has_no_field():
    layer = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    nn.init.constant_(layer.weight, -1.0)
    assert not effective_receptive_field(layer, torch.rand(1, 1, 5, 5)).any()


@pytest.mark.parametrize(("share", "side"), [(0, 1), (0.03, 3), (0.2, 5), (0.5, 7), (0.99, 9)])
def test_sides_of_squares(share, side):
    assert side_of(torch.ones(9, 9), share) == side


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match=r"got \(1, 3\)"):
        effective_receptive_field(lambda x: x.mean((2, 3)), torch.rand(2, 3, 4, 4)[:, :, :4])
    with pytest.raises(InputError, match="takes scores"):
        side_of(torch.ones(3, 3), 1.5)
