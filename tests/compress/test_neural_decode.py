"""Exact evaluation: the picture that floating point gives, and the same bits in any order and any part."""

import pytest
import torch

from foveate.compress import neural_codes, neural_decode
from foveate.compress.neural_decode import places, render, sine, snap
from foveate.layers.implicit import NeuralImage


@pytest.fixture(params=["fourier", "siren"])
def net(request):
    image = NeuralImage([(6, 2), (20, 3)], 3, request.param, generator=torch.Generator().manual_seed(0))
    codes = {n: neural_codes.encode(p, neural_codes.bits_of(n, 4)) for n, p in image.named_parameters()}
    neural_codes.put(image, codes)
    return image


def test_sines():
    turns = torch.cat([torch.linspace(-5, 5, 4001), torch.tensor([1e6 + 0.125])]).double()
    assert (sine(turns) - torch.sin(2 * torch.pi * turns)).abs().max() < 2.0**-24
    assert (sine(turns) * 2.0**24).frac().eq(0).all()
    assert (snap(torch.tensor([0.3, -7e5], dtype=torch.float64)) * 2**20).tolist() == [314573, -(512 * 2**20)]


def test_the_picture_is_that_of_floating_point(net):
    y, x = places(9, 9 / 14).float(), places(14).float()
    for level in range(2):
        expected = net(y, x, [level])[0].T.view(3, 9, 14).clamp(0, 1)
        torch.testing.assert_close(render(net, 9, 14, level), expected, atol=3e-5, rtol=0)


def test_the_order_of_sums_does_not_matter(net):
    before = render(net, 12, 17)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        net.hidden[0] = net.hidden[0][order]
        net.biases[0] = net.biases[0][order]
        net.hidden[1] = net.hidden[1][:, order]
        if net.kind == "fourier":
            net.frequencies[1], net.phases[1] = net.frequencies[1][order].clone(), net.phases[1][order].clone()
    assert torch.equal(render(net, 12, 17), before)


def test_parts_of_it_are_the_same_bits(net, monkeypatch):
    whole = render(net, 30, 21)
    assert torch.equal(render(net, 30, 21, window=(4, 11, 9, 15)), whole[:, 11:26, 4:13])
    threads = torch.get_num_threads()
    monkeypatch.setattr(neural_decode, "_CELLS", 100)
    try:
        torch.set_num_threads(2)
        assert torch.equal(render(net, 30, 21), whole)
    finally:
        torch.set_num_threads(threads)


def test_other_sizes_sample_the_same_picture(net):
    whole = render(net, 10, 12)
    torch.testing.assert_close(render(net, 10, 12, size=(36, 30))[:, 1::3, 1::3], whole, atol=1e-5, rtol=0)
    halved = torch.nn.functional.avg_pool2d(whole, 2)
    torch.testing.assert_close(render(net, 10, 12, size=(6, 5)), halved, atol=1e-5, rtol=0)
    part = render(net, 10, 12, size=(6, 5), window=(1, 2, 3, 2))
    assert torch.equal(part, render(net, 10, 12, size=(6, 5))[:, 2:4, 1:4])


def test_a_window_costs_what_is_in_it(net, monkeypatch):
    seen, forward = [], NeuralImage.forward

    def counted(self, y, x, *rest):
        seen.append(len(y) * len(x))
        return forward(self, y, x, *rest)

    monkeypatch.setattr(NeuralImage, "forward", counted)
    render(net, 5000, 4000, window=(7, 9, 4, 3))
    assert sum(seen) == 12
