"""IARN: the inverse, what an untrained network is, the encoding, windows, IRN's sizes and keys."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from foveate.errors import InputError, WeightsError
from foveate.layers.resample import resize, wholes
from foveate.layers.rescaler import quantise
from foveate.layers.upscaler import window_reader
from foveate.meter import count_parameters
from foveate.ops.wavelet import dwt2
from foveate.restore.iarn import IARN, Coupling, Haar, encoding


def tiny(dtype=torch.float32, std=0.1, **config):
    """A small network whose couplings do something."""
    torch.manual_seed(0)
    model = IARN(**({"blocks": 4, "growth": 4, "layers": 3} | config))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model.to(dtype).eval()


def picture(height, width, batch=1, dtype=torch.float32):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0)).to(dtype)


def bicubic(x, size):
    return resize(x, wholes(tuple(x.shape[2:]), size))


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        ({"blocks": 4, "growth": 16, "layers": 3}, 64_896),
        ({}, 1_611_264),
        ({"blocks": [8], "split": "haar"}, 1_667_952),  # IRN x2, published as 1.66 million
        ({"blocks": [8, 8], "split": "haar"}, 4_355_136),  # IRN x4, published as 4.35 million
    ],
)
def test_parameters(config, parameters):
    assert count_parameters(IARN(**config)) == parameters


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 19), st.integers(1, 19), st.data())
def test_the_inverse_is_exact(height, width, data):
    size = (data.draw(st.integers(1, height)), data.draw(st.integers(1, width)))
    for dtype, error in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        model, x = tiny(dtype), picture(height, width, 2, dtype)
        with torch.no_grad():
            a, z = model.analyse(x, size)
            assert (a - bicubic(bicubic(x, size), (height, width))).abs().max() > 1e-3  # it is no identity
            torch.testing.assert_close(model.synthesise(a, z, size), x, atol=error, rtol=0)


@pytest.mark.parametrize("size", [(5, 4), (9, 4), (9, 12), (7, 11)])
def test_untrained_it_is_the_bicubic_cycle(size):
    model, x = IARN(2, 4, 2), picture(9, 12)
    low, restored = model(x, size)
    there_and_back = bicubic(bicubic(x, size), (9, 12))
    torch.testing.assert_close(low, quantise(bicubic(there_and_back, size)))
    torch.testing.assert_close(restored, bicubic(low, (9, 12)))


def test_at_scale_1_nothing_is_split_off():
    model, x = IARN(2, 4, 2), quantise(picture(6, 7))
    a, z = model.analyse(x, (6, 7))
    assert torch.equal(a, x)
    assert not z.any()
    assert not encoding((6, 7), (6, 7), ((0, 6), (0, 7)), x)[:, :2].any()
    assert torch.equal(model(x, (6, 7))[1], x)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6))
def test_the_encoding_averages_to_zero_over_a_cell_and_holds_the_inverse_scales(s_y, s_x, h, w):
    e = encoding((s_y * h, s_x * w), (h, w), ((0, s_y * h), (0, s_x * w)), torch.zeros(1))[0]
    assert e.shape == (4, s_y * h, s_x * w)
    assert e[0].view(h, s_y, -1).mean(1).abs().max() < 1e-6
    assert e[1].view(-1, w, s_x).mean(2).abs().max() < 1e-6
    assert torch.equal(e[2:, 0, 0], torch.tensor([1 / s_y, 1 / s_x]))


def test_swapping_the_axes_of_picture_and_scale_transposes_the_encoding():
    e = encoding((12, 20), (5, 13), ((0, 12), (0, 20)), torch.zeros(1))
    swapped = encoding((20, 12), (13, 5), ((0, 20), (0, 12)), torch.zeros(1))
    assert torch.equal(e[:, [1, 0, 3, 2]].mT, swapped)


@pytest.mark.parametrize("size", [(23, 31), (9, 13), (8, 31), (1, 2)])
@pytest.mark.parametrize("tile", [5, 11])
def test_windows_give_the_whole(size, tile):
    model, x = tiny(blocks=2), picture(23, 31)
    with torch.no_grad():
        low = model.reduce(x, size)
        cut = torch.cat(list(model.strips(window_reader(x), (23, 31), size, shrink=True, tile=tile)), 2)
        torch.testing.assert_close(cut, low, atol=1e-5, rtol=0)
        low = quantise(low)
        high = model.enlarge(low, (23, 31))
        cut = torch.cat(list(model.strips(window_reader(low), size, (23, 31), shrink=False, tile=tile)), 2)
        torch.testing.assert_close(cut, high, atol=2e-5, rtol=0)


# ---------------------------------------------------------------------- IRN


def test_haar_keeps_means_and_differences_in_irns_order():
    x = picture(4, 6, 2)
    bands, wavelet = Haar()(x, None), dwt2(x) / 2
    a, b, c, d = (x[..., i::2, j::2] for i in (0, 1) for j in (0, 1))
    expected = [a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d]
    torch.testing.assert_close(bands, torch.cat(expected, 1) / 4)
    assert torch.equal(bands[:, :3], wavelet[:, :3])
    torch.testing.assert_close(Haar().inverse(bands, None), x)


@pytest.mark.parametrize(("levels", "sides"), [([1], (6, 9)), ([2, 1], (13, 10))])
def test_with_haar_the_inverse_is_exact_at_odd_sizes_too(levels, sides):
    model = tiny(torch.float64, blocks=levels, split="haar", layers=2)
    x = picture(*sides, dtype=torch.float64)
    size = tuple(-(-n // model.scale) for n in sides)
    a, z = model.analyse(x, size)
    assert tuple(a.shape[2:]) == size
    restored = model.synthesise(a, z, size)[..., : sides[0], : sides[1]]
    torch.testing.assert_close(restored, x, atol=1e-10, rtol=0)
    assert torch.equal(model.reduce(x, size), a)
    cut = torch.cat(list(model.strips(window_reader(x), sides, size, tile=5)), 2)
    torch.testing.assert_close(cut, a, atol=1e-10, rtol=0)


def test_the_log_determinant_is_the_sum_of_log_scales():
    torch.manual_seed(0)
    coupling = Coupling(6, 0, 3, 2).double()
    for parameter in coupling.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(1, 6, 2, 2, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: coupling(v.view(1, 6, 2, 2), None).flatten(), x.flatten())
    a = coupling(x, None)[:, :3]
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], coupling.log_scale(a, None).sum())


def test_checkpoints_of_irn_are_loaded():
    ours = tiny(blocks=[2, 1], split="haar", layers=5)
    state = ours.state_dict() | {f"operations.{i}.haar_weights": torch.ones(12, 1, 2, 2) for i in (0, 3)}
    assert "operations.1.F.conv5.bias" in state
    loaded = IARN.load_official(state)
    assert (loaded.scale, loaded.split) == (4, "haar")
    x = picture(8, 8)
    with torch.no_grad():
        assert torch.equal(loaded.reduce(x, (2, 2)), ours.reduce(x, (2, 2)))


@pytest.mark.parametrize("damage", ["empty", "foreign", "missing"])
def test_other_checkpoints_are_refused(damage):
    state = tiny(blocks=[1], split="haar", layers=5).state_dict() | {
        "operations.0.haar_weights": torch.ones(12, 1, 2, 2)
    }
    if damage == "missing":
        del state["operations.1.G.conv3.weight"]
    with pytest.raises(WeightsError, match=r"no IRN|does not fit"):
        IARN.load_official({"empty": {}, "foreign": {"conv.weight": torch.ones(1)}}.get(damage, state))


# ---------------------------------------------------------------------- training


def test_the_loss_is_what_it_says():
    model, x, size = tiny(), picture(8, 10, 2), (5, 4)
    a, z = model.analyse(x, size)
    small = bicubic(a, size)
    restored = model.synthesise(bicubic(quantise(small), (8, 10)), torch.zeros_like(z), size)
    expected = ((restored - x) ** 2 + 1e-6).sqrt().mean() + 3 * (small - bicubic(x, size)).square().mean()
    expected += 0.5 * z.square().mean() + 2 * (bicubic(small, (8, 10)) - a).abs().mean()
    torch.testing.assert_close(model.loss(x, size, guide=3, latent=0.5, stay=2, noise=0), expected)


@pytest.mark.parametrize("config", [{}, {"blocks": [2], "split": "haar"}])
def test_gradients_reach_every_parameter(config):
    model = tiny(**config)
    model.loss(picture(8, 8, 2), (4, 4)).backward()
    assert [name for name, p in model.named_parameters() if not p.grad.any()] == []


def test_low_precision_keeps_what_is_added_and_taken_away():
    model, x = tiny(), picture(9, 11)
    exact = model(x, (5, 6))
    rough = model.bfloat16()(x.bfloat16(), (5, 6))
    assert rough[0].dtype == torch.bfloat16
    for a, b in zip(exact, rough, strict=True):
        assert (a - b.float()).abs().mean() < 0.02
    a, z = model.analyse(x, (5, 6))
    assert (model.synthesise(a, z, (5, 6)) - x).abs().max() < 1e-2


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"split": "pixels"}, "unknown split 'pixels'"),
        ({"blocks": 0}, "blocks=0"),
        ({"blocks": []}, "blocks="),
        ({"blocks": [4, 4]}, "only with split='haar'"),
        ({"growth": 0}, "growth=0"),
    ],
)
def test_impossible_networks_are_refused(config, message):
    with pytest.raises(InputError, match=message):
        IARN(**config)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.reduce(picture(8, 8), (9, 4)), "larger on a side"),
        (lambda m: m.enlarge(picture(8, 8), (9, 4)), "smaller on a side"),
        (lambda m: m.reduce(torch.zeros(3, 8, 8), (4, 4)), r"\[B, 3, H, W\]"),
        (lambda m: m.reduce(torch.full((1, 3, 8, 8), float("nan")), (4, 4)), "NaN"),
        (lambda m: IARN([1], 2, 2, "haar").reduce(picture(8, 8), (3, 4)), "knows scale 2 alone"),
        (lambda m: IARN([1], 2, 2, "haar").enlarge(picture(4, 4), (9, 8)), "knows scale 2 alone"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call(tiny())
