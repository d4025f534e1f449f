"""BAIRNet: what the untrained pair is, sizes, windows, the sampling grid, gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate import ops
from foveate.errors import InputError
from foveate.layers.resample import Axis, resize, wholes
from foveate.layers.rescaler import quantise
from foveate.layers.upscaler import window_reader
from foveate.meter import count_parameters
from foveate.restore.bidirectional_rescaling import (
    BAIRNet,
    Body,
    Resampler,
    ScaleAdaption,
    _nearest,
    _places,
    _sampled,
    codes_of,
)


@pytest.fixture(autouse=True)
def reference():
    """No compiled kernels: sampling has tests of its own, and compiling takes longer than all of these."""
    with ops.use("reference"):
        yield


def tiny():
    """A small pair that does something."""
    torch.manual_seed(0)
    return BAIRNet.conformance_example()[0].eval()


def picture(height, width, batch=1):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def bicubic(x, size):
    return resize(x, wholes(tuple(x.shape[2:]), size))


@pytest.mark.parametrize(
    ("config", "parameters"), [({}, 3_776_706), ({"channels": 16, "blocks": 4, "every": 0}, 49_306)]
)
def test_parameters(config, parameters):
    assert count_parameters(BAIRNet(**config)) == parameters


@pytest.mark.parametrize("size", [(7, 5), (9, 12), (1, 1), (4, 12)])
def test_untrained_it_is_the_bicubic_cycle(size):
    x = picture(9, 12, 2)
    low, restored = BAIRNet(8, 2, 2)(x, size)
    torch.testing.assert_close(low, quantise(bicubic(x, size)))
    torch.testing.assert_close(restored, bicubic(low, (9, 12)))


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 16), st.integers(1, 16), st.data())
def test_sizes_are_exact(height, width, data):
    size = (data.draw(st.integers(1, height)), data.draw(st.integers(1, width)))
    with torch.no_grad():
        low, restored = tiny()(picture(height, width), size)
    assert (tuple(low.shape), tuple(restored.shape)) == ((1, 3, *size), (1, 3, height, width))


def test_at_scale_1_untrained_pictures_of_8_bits_go_round_bit_for_bit():
    model, x = BAIRNet(8, 1, 0), quantise(picture(7, 9))
    low, restored = model(x, (7, 9))
    assert torch.equal(low, x)
    assert torch.equal(quantise(restored), x)
    codes = codes_of(wholes((7, 9), (7, 9)), x)
    assert not codes[:, :2].any()
    assert (codes[:, 2:] == 1).all()


@pytest.mark.parametrize("size", [(23, 31), (9, 13), (8, 31), (1, 2)])
@pytest.mark.parametrize("tile", [5, 11])
def test_windows_give_the_whole(size, tile):
    model, x = tiny(), picture(23, 31)
    with torch.no_grad():
        low = model.reduce(x, size)
        assert (low - bicubic(x, size)).abs().max() > 1e-3
        cut = torch.cat(list(model.strips(window_reader(x), (23, 31), size, shrink=True, tile=tile)), 2)
        torch.testing.assert_close(cut, low, atol=1e-5, rtol=0)
        low = quantise(low)
        high = model.enlarge(low, (23, 31))
        cut = torch.cat(list(model.strips(window_reader(low), size, (23, 31), shrink=False, tile=tile)), 2)
        torch.testing.assert_close(cut, high, atol=1e-5, rtol=0)


@pytest.mark.parametrize("every", [0, 1])
def test_the_halo_is_how_far_a_body_sees(every):
    torch.manual_seed(0)
    body = Body(4, 1, every).double()
    x = torch.rand(1, 3, 31, 31, dtype=torch.float64, requires_grad=True)
    body(x, torch.tensor([0.5, 0.5], dtype=torch.float64))[..., 15, 15].sum().backward()
    rows = x.grad[0].abs().sum((0, 2)).nonzero().flatten().tolist()
    assert (rows[0], rows[-1]) == (15 - body.halo, 15 + body.halo)


@pytest.mark.parametrize("size", [(15, 9), (6, 7), (3, 20), (2, 1)])
def test_the_sampling_grid_is_pytorchs(size):
    f = torch.rand(2, 5, 6, 7)
    rows, columns = wholes((6, 7), size)
    places = _places(columns.centres(), rows.centres())[None, None].float()
    torch.testing.assert_close(_sampled(f, places), F.interpolate(f, size, mode="bilinear"), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("source", "target", "count"), [(12, 6, 2), (12, 4, 3), (12, 3, 4), (12, 2, 4), (10, 6, 2)])
def test_the_nearest_pixels_are_merged(source, target, count):
    axis = Axis.whole(source, target)
    found = _nearest(axis.centres(), axis)
    assert found.shape == (target, count)
    if source % target == 0 and count == source // target:
        assert torch.equal(found.flatten(), torch.arange(source))  # each pixel once
    for centre, pixels in zip(axis.centres().tolist(), found.tolist(), strict=True):
        farthest = max(abs(p - centre) for p in pixels)
        assert farthest <= count / 2 + 1e-9
    part = Axis(source, target, (1, target), (1, source))
    assert torch.equal(_nearest(part.centres(), part) + 1, found[1:])  # windows do not change what is merged


def test_merging_weights_are_a_mean():
    torch.manual_seed(0)
    layer = Resampler(4, merging=True, rank=2)
    for name in ("compress", "expand"):
        torch.nn.init.zeros_(getattr(layer, name).weight)
    f = torch.full((1, 4, 8, 8), 0.7)
    torch.testing.assert_close(layer(f, wholes((8, 8), (3, 4))), torch.full((1, 4, 3, 4), 0.7))


def test_the_filter_of_a_pixel_is_the_mixture_of_low_rank_experts():
    torch.manual_seed(0)
    layer = Resampler(4, merging=False, experts=3, rank=2).double()
    f, axes = torch.randn(1, 4, 5, 5, dtype=torch.float64), wholes((5, 5), (5, 5))
    codes = codes_of(axes, f)
    h = F.relu(layer.look(torch.cat([codes, f], 1)))
    routing = torch.sigmoid(layer.routing(h))[0, :, 2, 3]
    compress = layer.compress.weight.view(3, 2, 4)
    expand = layer.expand.weight.view(4, 3, 2)
    a, b = torch.einsum("k,krc->rc", routing, compress), torch.einsum("k,ckr->cr", routing, expand)
    g = f[0, :, 2, 3]  # offsets are zero at first
    torch.testing.assert_close(layer(f, axes)[0, :, 2, 3], g + b @ a @ g)


def test_scale_adaption_is_a_masked_convolution_of_mixed_kernels():
    torch.manual_seed(0)
    layer = ScaleAdaption(4, experts=2)
    f = torch.randn(1, 4, 6, 6)
    for scales in (torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.25])):
        share = layer.mixture(scales).softmax(0)
        kernel = share[0] * layer.weight[0] + share[1] * layer.weight[1]
        expected = f + layer.mask(f) * F.conv2d(f, kernel, padding=1)
        torch.testing.assert_close(layer(f, scales), expected, atol=1e-6, rtol=0)


def test_gradients_reach_every_parameter():
    model = tiny().train()
    model.loss(picture(12, 14, 2), (5, 6)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_loss_is_what_it_says():
    model, x, size = tiny(), picture(8, 10, 2), (5, 4)
    low, back = model.reduce(x, size), model(x, size)[1]
    again = model(quantise(back), size)[1]
    expected = (
        (x - back).abs().mean() + 2 * (low - bicubic(x, size)).square().mean() + 0.5 * (again - back).abs().mean()
    )
    torch.testing.assert_close(model.loss(x, size, fidelity=2, idempotence=0.5), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BAIRNet(channels=0), "channels=0"),
        (lambda: tiny().reduce(picture(8, 8), (9, 4)), "larger on a side"),
        (lambda: tiny().enlarge(picture(8, 8), (9, 4)), "smaller on a side"),
        (lambda: tiny().enlarge(torch.zeros(1, 1, 8, 8), (9, 9)), r"\[B, 3, H, W\]"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
