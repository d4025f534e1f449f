"""Neural images: the grid is the plain definition, levels are slices, filters follow from a rule."""

import pytest
import torch

from foveate.errors import InputError
from foveate.layers.implicit import NeuralImage, lattice

LEVELS = [(3, 1), (5, 3), (8, 3)]
KINDS = ["fourier", "siren"]


def net(kind, levels=LEVELS):
    return NeuralImage(levels, 2, kind, 3.0, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", range(3))
def test_a_grid_is_the_definition_at_its_crossings(kind, level):
    image, y, x = net(kind).double(), torch.linspace(-0.6, 0.7, 5).double(), torch.linspace(-1, 1, 7).double()
    places = torch.cartesian_prod(y, x).flip(-1)
    (found,) = image(y, x, [level])
    torch.testing.assert_close(found, image.at(places, level))
    (seen,) = image(y, x, [level], heads=False)
    assert seen.shape == (35, LEVELS[level][0])
    torch.testing.assert_close(seen @ image.heads[level].T + image.offsets[level], found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_level_is_a_network_with_copied_slices(kind):
    image, places = net(kind).double(), torch.rand(50, 2).double() * 2 - 1
    for level, (n, d) in enumerate(LEVELS):
        alone = net(kind, [(n, d)]).double()
        with torch.no_grad():
            for name, weight in [*alone.named_parameters(), *alone.named_buffers()]:
                own = image.get_parameter if name in dict(alone.named_parameters()) else image.get_buffer
                weight.copy_(own(name.replace(".0", f".{level}"))[tuple(map(slice, weight.shape))])
        torch.testing.assert_close(alone.at(places), image.at(places, level), rtol=1e-12, atol=1e-12)


def test_one_filter_is_a_linear_combination_of_sines():
    image, places = net("fourier", [(6, 0)]), torch.rand(40, 2) * 2 - 1
    sines = torch.sin(2 * torch.pi * (places @ image.frequencies[0].T + image.phases[0]))
    torch.testing.assert_close(image.at(places), sines @ image.heads[0].T + image.offsets[0])


def test_gradients_reach_every_weight_and_no_filter_that_follows_a_rule():
    for kind in KINDS:
        image = net(kind)
        sum(colours.square().sum() for colours in image(torch.rand(4), torch.rand(5), [0, 1, 2])).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in image.parameters())
        assert ("frequencies" in dict(image.named_parameters())) == (kind == "siren")


def test_filters_rise_in_frequency_up_to_the_largest():
    frequencies, phases = lattice(3, 32, 8.0)
    largest = frequencies.abs().amax(-1)
    assert (largest.diff(dim=1) >= 0).all()
    assert 7 < largest.max() <= 8
    assert largest.min() < 0.6
    assert ((phases >= 0) & (phases < 1)).all()
    assert len({tuple(f.tolist()) for f in frequencies.flatten(0, 1)}) > 90
    by_hand = [(2.0, -2.0), (-3.171875, 6.0), (10.0, -0.5625), (5.828125, 14.0)]
    assert torch.equal(lattice(1, 4, 16.0)[0][0], torch.tensor(by_hand))


@pytest.mark.parametrize(
    ("kind", "levels"), [("relu", [(4, 2)]), ("siren", []), ("siren", [(4, 2), (3, 2)]), ("siren", [(0, 1)])]
)
def test_what_is_no_neural_image(kind, levels):
    with pytest.raises(InputError, match="ascending"):
        NeuralImage(levels, kind=kind)
