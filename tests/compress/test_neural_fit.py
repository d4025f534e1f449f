"""Fitting neural images: errors fall at every level, heads are solved for, stopping stops."""

import pytest
import torch

from foveate.compress import neural_codes, neural_fit
from foveate.compress.gaussian_fit import pace
from foveate.compress.neural_decode import places, render
from foveate.layers.implicit import NeuralImage


@pytest.fixture
def target():
    y, x = places(20)[:, None].float(), places(28)[None].float()
    return torch.stack([0.5 + 0.3 * torch.sin(5 * x + y), 0.5 + 0.2 * (x * y), 0.4 + 0.3 * torch.cos(4 * y) + 0 * x])


def squared(net, target, level=-1):
    return float((render(net, *target.shape[1:], level) - target).square().mean())


@pytest.mark.parametrize("kind", ["fourier", "siren"])
def test_every_level_learns(kind, target):
    generator = torch.Generator().manual_seed(0)
    net = NeuralImage([(4, 2), (8, 2), (12, 2)], 3, kind, 2.0, generator)
    before = [squared(net, target, level) for level in range(3)]
    assert not neural_fit.fit(net, target, pace(60), generator)
    for level, most in enumerate((0.75, 0.6, 0.2)):
        assert squared(net, target, level) < most * before[level]
    frequencies = NeuralImage([(4, 2), (8, 2), (12, 2)], 3, kind, 2.0, torch.Generator().manual_seed(0)).frequencies
    assert torch.equal(frequencies, net.frequencies) == (kind == "fourier")


def test_a_picture_without_error_does_no_harm():
    net = NeuralImage([(2, 1), (4, 1)])
    with torch.no_grad():
        for head in net.heads:
            head.zero_()
    neural_fit.fit(net, torch.full((3, 5, 6), 0.5), pace(3), torch.Generator())
    assert all(p.isfinite().all() for p in net.parameters())


def test_it_stops_when_told(target):
    net, seen = NeuralImage([(4, 1)]), []
    stopped = neural_fit.fit(
        net, target, pace(50), torch.Generator(), report=lambda share, dB: seen.append((share, dB)) or len(seen) == 3
    )
    assert stopped
    assert [round(share, 2) for share, _ in seen] == [0, 0.02, 0.04]
    assert all(0 < dB < 60 for _, dB in seen)


def test_with_one_filter_the_head_is_the_optimum_of_least_squares(target):
    net = NeuralImage([(16, 0)], top=2.0)
    (z,) = net(places(20, 20 / 28).float(), places(28).float(), [0], heads=False)
    seen, wanted = torch.cat([z, torch.ones(len(z), 1)], 1).double(), target.flatten(1).T.double()
    best = float((seen @ torch.linalg.lstsq(seen, wanted).solution - wanted).square().mean())
    neural_fit.quantise(net, target, 4)
    y, x = places(20, 20 / 28).float(), places(28).float()
    reached = float((net(y, x)[0].detach().T.view_as(target) - target).square().mean())
    assert best <= reached < 1.1 * best + 2e-4


def test_a_network_gets_the_weights_its_codes_stand_for(target):
    net = NeuralImage([(4, 2), (9, 2)], generator=torch.Generator().manual_seed(0))
    codes = neural_fit.quantise(net, target, 4)
    assert set(codes) == set(neural_codes.stored(net))
    assert all(torch.equal(codes[n].weights(), p) for n, p in net.named_parameters())
    assert codes["hidden"].values.abs().max() == 7


def test_batches_look_at_every_part():
    generator = torch.Generator().manual_seed(0)
    chosen = torch.stack([neural_fit._strata(100, 10, generator) for _ in range(200)])
    assert torch.equal(chosen // 10, torch.arange(10).expand(200, -1))
    assert len(chosen.unique()) == 100
    assert torch.equal(neural_fit._strata(7, 7, generator), torch.arange(7))
    for height, width in [(1, 9), (20, 20), (500, 700), (3, 9000), (9000, 3)]:
        rows, columns = neural_fit._shape(height, width)
        assert 1 <= rows <= height
        assert 1 <= columns <= width
        assert min(height * width, neural_fit.BATCH) * 0.9 <= rows * columns <= neural_fit.BATCH
