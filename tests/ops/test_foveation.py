"""Foveation: pyramids that come back, blurs of the right width, windows that sum to one, and equal paths."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import InputError
from foveate.ops import foveation, use
from foveate.ops.foveation import (
    LogPolar,
    blur_reference,
    collapse,
    laplacian,
    log_polar_mix,
    mix_reference,
    polar,
    reduce,
    variance,
    varying_blur,
)

SIDES, SEEDS = st.integers(1, 23), st.integers(0, 2**32 - 1)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------- pyramid, blur


@given(SIDES, SIDES, st.integers(0, 4), SEEDS)
@settings(deadline=None, max_examples=40)
def test_both_paths_take_apart_alike_and_put_together_again(height, width, levels, seed):
    x = draw(2, 3, height, width, seed=seed)
    bands = laplacian(x, levels)
    with use("reference"):
        plain = laplacian(x, levels)
        again = collapse(plain)
    assert [b.shape for b in bands] == [b.shape for b in plain]
    for a, b in zip(bands, plain, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(collapse(bands), x, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(again, x, atol=2e-6, rtol=1e-5)


def test_a_level_is_the_mean_that_its_kernel_says():
    x = torch.zeros(1, 1, 8, 8)
    x[0, 0, 3, 4] = 64
    # Row 3 is the third tap of output row 1 and the first of row 2; column 4 the last of column 1, the second of 2.
    assert reduce(x)[0, 0].tolist() == [[0, 0, 0, 0], [0, 3, 9, 0], [0, 1, 3, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("sigma", [0.0, 0.4, 1.0, math.sqrt(1.5), 2.0, 3.7])
def test_a_constant_blur_has_its_variance_and_keeps_the_sum(sigma):
    x = torch.zeros(1, 1, 64, 64)
    x[0, 0, 31, 30] = 1
    y = varying_blur(x, torch.full((1, 64, 64), sigma))[0, 0]
    at = torch.arange(64.0)
    assert y.sum() == pytest.approx(1, abs=1e-5)
    for line, middle in ((y.sum(1), 31), (y.sum(0), 30)):
        assert (line * at).sum() == pytest.approx(middle, abs=1e-3)
        assert (line * (at - middle).square()).sum() == pytest.approx(sigma**2, abs=1e-3)


def test_where_nothing_is_asked_the_picture_stays_bit_for_bit():
    x, sigma = draw(2, 3, 41, 37), torch.full((2, 41, 37), 3.0)
    sigma[:, 10:20, 5:30] = 0
    y = varying_blur(x, sigma)
    assert torch.equal(y[..., 10:20, 5:30], x[..., 10:20, 5:30])
    assert y[..., 30:, :].std() < 0.5 < 0.9 < x[..., 30:, :].std()
    assert torch.equal(varying_blur(x, torch.zeros(1, 41, 37)), x)


def test_it_comes_near_the_gaussian_of_each_place():
    smooth = varying_blur(draw(1, 1, 48, 48), torch.full((1, 48, 48), 2.0))
    sigma = polar((48, 48))[0] * 0.3
    exact, near = blur_reference(smooth, sigma, 16), varying_blur(smooth, sigma)
    assert (near - exact).square().mean() < 0.02 * smooth.square().mean()
    assert (smooth - exact).square().mean() > 0.1 * smooth.square().mean()


@given(SIDES, SIDES, SEEDS)
@settings(deadline=None, max_examples=20)
def test_blur_is_linear_and_keeps_constants(height, width, seed):
    x, z = draw(2, 1, 1, height, width, seed=seed).unbind()
    sigma = draw(1, height, width, seed=seed + 1 if seed < 2**31 else 0).abs() * 4
    both = varying_blur(2 * x - z, sigma)
    torch.testing.assert_close(both, 2 * varying_blur(x, sigma) - varying_blur(z, sigma), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(varying_blur(torch.full_like(x, 0.7), sigma), torch.full_like(x, 0.7))


def test_gradients_of_a_blur_are_those_of_finite_differences():
    x = draw(1, 1, 7, 6).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: varying_blur(t, polar((7, 6))[0].double() * 0.2), (x,))


# ------------------------------------------------------------------------------------------------- windows


@given(st.floats(0.2, 1.5), st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None, max_examples=30)
def test_windows_are_positive_and_sum_to_one(scale, x, y):
    places = LogPolar(scale).places((40, 57), torch.tensor([[x, y]]))
    index, weight = places.windows()
    assert (weight >= 0).all()
    torch.testing.assert_close(weight.sum(2), torch.ones(1, 40 * 57), atol=1e-6, rtol=0)
    assert index.min() >= 0
    assert index.max() < (places.rings + 1) * places.sectors
    assert (places.sector < places.sectors).all()


@pytest.mark.parametrize("scale", [0.25, 0.4, 0.5, 0.7])
def test_diameter_over_eccentricity_is_the_scale(scale):
    windows = LogPolar(scale, degrees=26)
    size = (1, 20001)
    places = windows.places(size, torch.tensor([[0.0, 0.5]]))
    d = polar(size, torch.tensor([[0.0, 0.5]]))[0][0, 0]
    ring = places.ring[0, 0]
    for n in (3, 4):
        inside = d[(ring > n - 0.5) & (ring < n + 0.5)]
        centre = windows.fovea * math.exp(windows.width * (n + 1))
        assert (inside.max() - inside.min()) / centre == pytest.approx(scale, rel=0.05)


def test_radii_grow_in_proportion_and_nearly_fill_the_ring():
    windows = LogPolar(0.4)
    radii = windows.radii()
    torch.testing.assert_close(radii[1:] / radii[:-1], torch.full((windows.rings - 1,), math.exp(windows.width)))
    centre = windows.fovea * math.exp(windows.width)
    assert 0.7 < 2 * radii[0] / (0.4 * centre) < 1.2


@given(SIDES, SIDES, st.integers(0, 3), st.booleans(), SEEDS)
@settings(deadline=None, max_examples=40)
def test_both_paths_mix_alike(height, width, level, shared, seed):
    dice = torch.Generator().manual_seed(seed)
    windows = LogPolar(float(torch.rand((), generator=dice)) + 0.2)
    gaze = torch.rand(1 if shared else 2, 2, generator=dice)
    size = (height << level, width << level)
    places = windows.places(size, gaze, level)
    f, z = torch.randn(2, 2, 3, height, width, generator=dice).unbind()
    alpha = torch.rand(windows.rings, generator=dice)
    torch.testing.assert_close(
        log_polar_mix(f, z, places, alpha), mix_reference(f, z, places, alpha), atol=1e-4, rtol=1e-3
    )


def test_by_hand_as_a_product_with_dense_windows():
    windows = LogPolar(0.8)
    places = windows.places((20, 24))
    index, weight = places.windows()
    dense = torch.zeros(480, (windows.rings + 1) * windows.sectors).scatter_add(1, index[0], weight[0]).double()
    f, z, alpha = draw(480).double(), draw(480, seed=1).double(), torch.rand(windows.rings)
    out = torch.zeros(480, dtype=torch.float64)
    for i, w in enumerate(dense.T):
        ring = i // windows.sectors - 1
        a = float(alpha[ring]) if ring >= 0 and w.sum() ** 2 >= 2 * w.square().sum() > 0 else 0.0
        mean = lambda t, w=w: (w * t).sum() / w.sum().clamp_min(1e-30)  # noqa: E731
        spread = lambda t, m=mean: m((t - m(t)) ** 2).clamp_min(0).add(1e-10).sqrt()  # noqa: E731
        out += w * ((1 - a) * f + a * ((z - mean(z)) / spread(z) * spread(f) + mean(f)))
    found = log_polar_mix(f.float().view(1, 1, 20, 24), z.float().view(1, 1, 20, 24), places, alpha)
    torch.testing.assert_close(found.flatten().double(), out, atol=1e-4, rtol=1e-4)


def test_within_one_window_noise_gets_mean_and_deviation_of_the_features():
    f, z = 3 + 2 * draw(1, 2, 30, 30), draw(1, 2, 30, 30, seed=1)
    one = foveation.Places(torch.full((1, 30, 30), 2.0), torch.zeros(1, 30, 30), rings=5, sectors=4)
    y = log_polar_mix(f, z, one, torch.ones(5))
    torch.testing.assert_close(y.mean((2, 3)), f.mean((2, 3)), atol=1e-4, rtol=0)
    torch.testing.assert_close(y.std((2, 3)), f.std((2, 3)), atol=1e-4, rtol=0)
    standard = (z - z.mean((2, 3), keepdim=True)) / z.std((2, 3), keepdim=True)
    torch.testing.assert_close((y - y.mean((2, 3), keepdim=True)) / y.std((2, 3), keepdim=True), standard)


def test_nothing_changes_in_the_fovea_or_without_noise():
    f, z = draw(1, 2, 64, 64), draw(1, 2, 64, 64, seed=1)
    windows = LogPolar(0.4, fovea=2.0)
    places = windows.places((64, 64))
    assert torch.equal(log_polar_mix(f, z, places, torch.zeros(windows.rings)), f)
    y = log_polar_mix(f, z, places, torch.ones(windows.rings))
    fovea = places.ring[0] <= -1
    assert 10 < fovea.sum() < 200
    assert torch.equal(y[..., fovea], f[..., fovea])
    assert (y != f)[..., ~fovea].float().mean() > 0.99


def test_a_quarter_turn_of_everything_turns_the_result():
    windows = LogPolar(0.4)
    assert windows.sectors % 4 == 0
    f, z, alpha = draw(1, 2, 40, 40), draw(1, 2, 40, 40, seed=1), torch.rand(windows.rings)
    places = windows.places((40, 40))
    turned = log_polar_mix(f.rot90(1, (2, 3)), z.rot90(1, (2, 3)), places, alpha)
    torch.testing.assert_close(turned, log_polar_mix(f, z, places, alpha).rot90(1, (2, 3)), atol=1e-4, rtol=1e-4)


def test_gradients_of_a_mix_are_those_of_finite_differences():
    windows = LogPolar(0.8)
    places, alpha = windows.places((8, 8)), torch.full((windows.rings,), 0.6)
    f, z = (draw(1, 1, 8, 8, seed=s).double().requires_grad_() for s in (0, 1))
    assert torch.autograd.gradcheck(lambda a, b: log_polar_mix(a, b, places, alpha), (f, z))


def test_variances_are_those_of_the_kernels_that_lead_there():
    kernel = 3 / 8 * 0.25 * 2 + 1 / 8 * 2.25 * 2
    for level in range(5):
        assert variance(level) == pytest.approx(2 * kernel * sum(4**i for i in range(level)))


def test_what_does_not_fit_is_refused():
    x = draw(2, 3, 8, 8)
    places, alpha = LogPolar().places((8, 8)), torch.zeros(LogPolar().rings)
    for wrong in (
        lambda: laplacian(x[0], 1),
        lambda: laplacian(x, -1),
        lambda: laplacian(x.long(), 1),
        lambda: varying_blur(x, torch.zeros(8, 8)),
        lambda: varying_blur(x, torch.full((1, 8, 8), -1.0)),
        lambda: varying_blur(x, torch.full((1, 8, 8), float("nan"))),
        lambda: log_polar_mix(x, x[:1], places, alpha),
        lambda: log_polar_mix(x, x, places, alpha[1:]),
        lambda: log_polar_mix(x, x, LogPolar().places((9, 8)), alpha),
        lambda: polar((8, 8), torch.zeros(2)),
        lambda: LogPolar(scale=0),
        lambda: LogPolar(fovea=30),
    ):
        with pytest.raises(InputError):
            wrong()
