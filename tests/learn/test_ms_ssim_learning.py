"""The losses of structural similarity: values, closed forms, gradients, sizes, and the autoencoder they train."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from foveate.errors import InputError
from foveate.learn.ms_ssim_learning import ExpectedLossVAE, MSSSIMLoss, SSIMLoss, kl_to_normal, scales_for
from foveate.meter.quality import MS_SSIM_WEIGHTS, ms_ssim, ssim

SEEDS = st.integers(0, 2**16)


def two(height, width, channels=1, batch=2, seed=0):
    dice = torch.Generator().manual_seed(seed)
    x = torch.rand(batch, channels, height, width, dtype=torch.float64, generator=dice)
    noise = 0.2 * torch.randn(x.shape, dtype=torch.float64, generator=dice)
    return x, (x + noise).clamp(0, 1)


@settings(deadline=None, max_examples=25)
@given(st.integers(11, 60), st.integers(11, 60), SEEDS, st.booleans())
def test_it_is_zero_only_for_equal_pictures_symmetric_and_free_of_units(height, width, seed, per_pixel):
    x, y = two(height, width, seed=seed)
    loss = MSSSIMLoss(per_pixel=per_pixel)
    assert float(loss(x, x)) == pytest.approx(0, abs=1e-12)
    assert 0 < float(loss(x, y)) <= 1
    torch.testing.assert_close(loss(x, y), loss(y, x))
    torch.testing.assert_close(MSSSIMLoss(peak=255.0, per_pixel=per_pixel)(255 * x, 255 * y), loss(x, y))


def test_the_loss_is_one_minus_the_measure():
    x, y = two(32, 40)
    assert float(SSIMLoss()(x, y)) == pytest.approx(1 - float(ssim(x, y).mean()))
    kept = tuple(w / sum(MS_SSIM_WEIGHTS[:2]) for w in MS_SSIM_WEIGHTS[:2])
    assert float(MSSSIMLoss(eps=0)(x, y)) == pytest.approx(1 - float(ms_ssim(x, y, weights=kept).mean()))
    for per_pixel in (False, True):
        one = MSSSIMLoss(scales=1, eps=0, per_pixel=per_pixel)
        y = (0.9 * x + 0.05).clamp(0, 1)  # cs > 0 everywhere, or the clip at 0 would tell the two apart
        assert float(one(x, y)) == pytest.approx(float(SSIMLoss()(x, y)))


def test_a_constant_shift_leaves_the_luminance_of_the_coarsest_scale():
    level, shift = 0.4, 0.2
    ramp = level + 0.0 * torch.rand(1, 1, 64, 64, dtype=torch.float64)
    c1, weight = 0.01**2, MS_SSIM_WEIGHTS[2] / sum(MS_SSIM_WEIGHTS[:3])
    luminance = (2 * level * (level + shift) + c1) / (level**2 + (level + shift) ** 2 + c1)
    found = MSSSIMLoss(eps=0)(ramp, ramp + shift)
    assert float(found) == pytest.approx(1 - luminance**weight, rel=1e-9)


def test_multiplying_at_every_place_agrees_where_every_place_is_alike():
    """x against c x + b over a periodic picture: every window of a scale has almost the same statistics."""
    row = torch.arange(64, dtype=torch.float64)
    x = 0.5 + 0.3 * torch.sin(row * 2 * torch.pi / 16)[None, :] * torch.sin(row * 2 * torch.pi / 16)[:, None]
    x = x[None, None]
    y = 0.6 * x + 0.3
    means, places = (float(MSSSIMLoss(scales=2, per_pixel=p)(x, y)) for p in (False, True))
    assert means == pytest.approx(places, rel=0.1)


def test_maps_of_coarse_scales_lie_where_the_picture_has_them():
    """What differs in one corner lowers the product there, and only there."""
    from foveate.meter.quality import _halve, _maps, _on_finest

    x, _ = two(64, 64, batch=1)
    y = x.clone()
    y[..., :16, :16] = 1 - y[..., :16, :16]
    _, coarse = _maps(_halve(x), _halve(y), 1.0, 11, 1.5, 0.01, 0.03)
    fine = _on_finest(coarse, 1, 11, (54, 54))[0, 0]
    assert float(fine[-20:, -20:].min()) == pytest.approx(1)
    assert float(fine[:4, :4].max()) < 0.9
    column = torch.arange(22, dtype=torch.float64).expand(1, 1, 22, 22)  # pixel i of the map is at 2 (i + 5.5) - 5.5
    told = _on_finest(column, 1, 11, (54, 54))[0, 0, 0]
    assert torch.allclose(told[8:40], (torch.arange(8, 40, dtype=torch.float64) + 5.5) / 2 - 5.5)


def test_gradients_are_right_and_vanish_at_the_goal():
    torch.manual_seed(0)
    x, y = (torch.rand(1, 1, 24, 24, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for loss in (SSIMLoss(), MSSSIMLoss(), MSSSIMLoss(window=5, per_pixel=True), MSSSIMLoss(mix=0.16)):
        assert torch.autograd.gradcheck(loss, (x, y), fast_mode=True)
        if not getattr(loss, "mix", 0):
            (slope,) = torch.autograd.grad(loss(x, x.detach().clone()), x)
            assert float(slope.abs().max()) < 1e-9


def test_opposite_pictures_have_finite_slopes():
    x, _ = two(32, 32)
    y = (1 - x).requires_grad_()
    for per_pixel in (False, True):
        loss = MSSSIMLoss(per_pixel=per_pixel)(x, y)
        (slope,) = torch.autograd.grad(loss, y)
        assert torch.isfinite(slope).all()
        assert float(loss.detach()) > 0.3


def test_the_mix_is_a_weighted_mean_with_absolute_errors():
    x, y = two(32, 32)
    alone, absolute = float(MSSSIMLoss()(x, y)), float((x - y).abs().mean())
    assert float(MSSSIMLoss(mix=0.16)(x, y)) == pytest.approx(0.84 * alone + 0.16 * absolute)
    assert float(MSSSIMLoss(mix=0.16, peak=255.0)(255 * x, 255 * y)) == pytest.approx(0.84 * alone + 0.16 * absolute)


def test_a_loss_falls_when_it_is_followed_downhill():
    x, y = two(32, 32)
    y.requires_grad_()
    loss, adam = MSSSIMLoss(), torch.optim.Adam([y], lr=0.02)
    before = float(loss(x, y).detach())
    for _ in range(40):
        adam.zero_grad()
        loss(x, y).backward()
        adam.step()
    assert float(loss(x, y).detach()) < before / 10


@given(st.integers(11, 400), st.integers(11, 400))
@settings(deadline=None, max_examples=40)
def test_as_many_scales_as_windows_fit(height, width):
    scales, side = scales_for(height, width), min(height, width)
    assert side // 2 ** (scales - 1) >= 10
    assert side >= 10 * 2 ** (scales - 1) + 1
    assert scales == 5 or side < 10 * 2**scales + 1


@pytest.mark.parametrize(
    ("loss", "side", "words"),
    [
        (MSSSIMLoss(scales=5), 64, "64 x 64 pixels are too small for 5 scales .* need 161 x 161; use scales=3"),
        (MSSSIMLoss(), 10, "10 x 10 pixels hold no window of 11"),
        (SSIMLoss(), 10, "10 x 10"),
    ],
)
def test_pictures_too_small(loss, side, words):
    x = torch.rand(1, 1, side, side)
    with pytest.raises(InputError, match=words):
        loss(x, x)


@pytest.mark.parametrize("settings", [{"scales": 0}, {"scales": 6}, {"mix": 1.5}, {"eps": -1.0}])
def test_settings_that_make_no_sense(settings):
    with pytest.raises(InputError):
        MSSSIMLoss(**settings)


def test_pictures_of_another_rank_or_size():
    with pytest.raises(InputError, match=r"\[B, C, H, W\]"):
        MSSSIMLoss()(torch.rand(3, 32, 32), torch.rand(3, 32, 32))
    with pytest.raises(InputError, match="match"):
        MSSSIMLoss()(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 33))


def test_bfloat16_is_judged_in_single():
    x, y = (t.to(torch.bfloat16) for t in two(32, 32))
    assert float(MSSSIMLoss()(x, y)) == pytest.approx(float(MSSSIMLoss()(x.float(), y.float())))


def autoencoder(weight=1.0, distance=None):
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(256, 8))
    decoder = nn.Sequential(nn.Linear(4, 256), nn.Sigmoid(), nn.Unflatten(1, (1, 16, 16)))
    return ExpectedLossVAE(encoder, decoder, distance, weight)


def test_the_divergence_to_a_normal_is_that_of_torch():
    mean, log_variance = torch.randn(2, 5, 3).double()
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0, 1)).sum(1)
    torch.testing.assert_close(kl_to_normal(mean, log_variance), expected, check_dtype=False)


def test_codes_are_drawn_with_their_own_spread():
    torch.manual_seed(0)
    means, log_variances = torch.tensor([1.0, -2.0]), torch.tensor([0.0, 9.0]).log1p() * 2 - 1.0
    model = ExpectedLossVAE(lambda x: torch.cat([means, log_variances]).expand(len(x), -1), nn.Identity())
    codes = model.train()(torch.empty(20_000, 0))
    torch.testing.assert_close(codes.mean(0), means, atol=0.1, rtol=0)
    torch.testing.assert_close(codes.var(0), log_variances.exp(), rtol=0.05, atol=0)


def test_an_autoencoder_minimises_distance_and_divergence():
    torch.manual_seed(0)
    x, _ = two(16, 16)
    x, model = x.float(), autoencoder(weight=7.0).eval()
    mean, log_variance = model.encode(x)
    expected = float((7 * MSSSIMLoss()(x, model(x)) + kl_to_normal(mean, log_variance).mean()).detach())
    assert float(model.loss(x).detach()) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    model.loss(x).backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in model.parameters())
    assert float(autoencoder(distance=lambda a, b: (a - b).abs().mean()).loss(x).detach()) > 0
    with pytest.raises(InputError, match="weight=0"):
        autoencoder(weight=0)
