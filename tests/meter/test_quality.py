import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from foveate.errors import InputError
from foveate.meter import ms_ssim, psnr, psnr_y, ssim
from foveate.meter.quality import MS_SSIM_WEIGHTS, _halve, _similarity

SEEDS = st.integers(0, 2**16)


def photograph(height: int = 161, width: int = 170) -> Tensor:
    return torch.from_numpy(data.astronaut()[:height, :width].copy()).permute(2, 0, 1)[None].double() / 255


def noisy(x: Tensor, sigma: float, seed: int = 0) -> Tensor:
    return (x + sigma * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed))).clamp(0, 1)


def array(x: Tensor) -> np.ndarray:
    return x[0].permute(1, 2, 0).numpy()


@settings(deadline=None, max_examples=25)
@given(st.integers(11, 40), st.integers(11, 40), st.sampled_from([1, 3, 4]), SEEDS)
def test_values_are_those_of_scikit_image(height, width, channels, seed):
    torch.manual_seed(seed)
    x = torch.rand(1, channels, height, width, dtype=torch.float64)
    y = noisy(x, 0.1, seed)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    expected = structural_similarity(array(x), array(y), channel_axis=2, **options)
    assert float(ssim(x, y)) == pytest.approx(expected, abs=1e-10)
    assert float(psnr(x, y)) == pytest.approx(peak_signal_noise_ratio(array(x), array(y), data_range=1.0), abs=1e-9)


def test_a_border_is_left_out():
    x = torch.zeros(1, 3, 24, 24)
    y = x.clone()
    y[..., 3:-3, 3:-3] = 0.1
    assert float(psnr(x, y, border=3)) == pytest.approx(20, abs=1e-4)
    assert float(psnr(x, y)) > 21
    torch.testing.assert_close(ssim(x, y, border=3), ssim(x[..., 3:-3, 3:-3], y[..., 3:-3, 3:-3]))


def test_psnr_of_luminance_weighs_as_matlab_does():
    x = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    green = torch.tensor([0.0, 0.1, 0.0], dtype=torch.float64).view(1, 3, 1, 1)
    difference = 0.1 * 128.553 / 255
    assert float(psnr_y(x, x + green)) == pytest.approx(-20 * np.log10(difference))


def test_rounding_compares_what_a_file_would_hold():
    x = torch.full((1, 3, 8, 8), 100 / 255)
    assert psnr_y(x, x + 0.4 / 255).isfinite().all()
    assert psnr_y(x, x + 0.4 / 255, round_to_8bit=True).isinf().all()
    assert psnr_y(torch.ones_like(x), x * 0 + 1.7, round_to_8bit=True).isinf().all()
    torch.testing.assert_close(psnr_y(x, x + 0.6 / 255, round_to_8bit=True), psnr_y(x, x + 1 / 255))


def test_equal_pictures_are_perfect():
    x = photograph().float()
    assert psnr(x, x).isposinf().all()
    assert psnr_y(x, x, 4).isposinf().all()
    torch.testing.assert_close(ssim(x, x), torch.ones(1))
    torch.testing.assert_close(ms_ssim(x, x), torch.ones(1))


def test_each_picture_of_a_batch_is_judged_alone():
    x = photograph().repeat(2, 1, 1, 1)
    y = torch.cat([noisy(x[i : i + 1], s) for i, s in enumerate((0.02, 0.2))])
    for metric in (psnr, psnr_y, ssim, ms_ssim):
        together = metric(x, y)
        assert together.shape == (2,)
        assert together[0] > together[1]
        torch.testing.assert_close(together, torch.cat([metric(x[i : i + 1], y[i : i + 1]) for i in range(2)]))
        torch.testing.assert_close(together, metric(y, x))


def test_scale_of_values_does_not_matter_when_peak_follows():
    x = photograph()
    y = noisy(x, 0.1)
    for metric in (psnr, ssim, ms_ssim):
        torch.testing.assert_close(metric(255 * x, 255 * y, peak=255.0), metric(x, y))


def test_ms_ssim_is_the_weighted_product_over_scales():
    x = photograph()[:, :1]
    y = noisy(x, 0.1)
    a, b, expected = x, y, 1.0
    for scale, weight in enumerate(MS_SSIM_WEIGHTS):
        similarity, contrast = _similarity(a, b, 1.0, 11, 1.5, 0.01, 0.03)
        expected *= float(similarity if scale == 4 else contrast) ** weight
        a, b = _halve(a), _halve(b)
    assert float(ms_ssim(x, y)) == pytest.approx(expected)
    assert float(ms_ssim(x, y, weights=(1.0,))) == pytest.approx(float(ssim(x, y)))
    # A lone constant shift touches luminance, which only the coarsest scale judges.
    shifted = ms_ssim(x, x + 0.2)
    for _ in range(4):
        x = _halve(x)
    assert float(shifted) == pytest.approx(float(ssim(x, x + 0.2)) ** MS_SSIM_WEIGHTS[-1], rel=1e-3)


def test_halving_repeats_an_odd_last_row():
    x = torch.tensor([[0.0, 1.0, 4.0], [2.0, 3.0, 6.0], [8.0, 8.0, 5.0]])[None, None]
    torch.testing.assert_close(_halve(x), torch.tensor([[[[1.5, 5.0], [8.0, 5.0]]]]))


def test_opposite_pictures_score_zero_with_finite_gradients():
    x = photograph()[:, :1]
    y = (1 - x).requires_grad_()
    score = ms_ssim(x, y)
    score.sum().backward()
    assert float(score.detach()) == 0
    assert y.grad.isfinite().all()


def test_the_smallest_picture_of_ms_ssim_is_the_one_its_error_names():
    x = torch.rand(1, 1, 161, 161)
    assert ms_ssim(x, x).isfinite().all()
    with pytest.raises(InputError, match="161 x 160 pixels, expected at least 161 x 161"):
        ms_ssim(x[:, :, :160], x[:, :, :160])


def test_gradients_are_right():
    torch.manual_seed(0)
    x, y = (torch.rand(2, 3, 12, 13, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for metric in (psnr, psnr_y, ssim, lambda a, b: ms_ssim(a, b, weights=(0.4, 0.6), window=5)):
        assert torch.autograd.gradcheck(metric, (x[:, :, :, :], y), fast_mode=True)


def test_half_precision_is_judged_in_single():
    x = torch.rand(1, 3, 16, 16).bfloat16()
    y = (x + 0.125).bfloat16()
    for metric in (psnr, psnr_y, ssim):
        assert metric(x, y).dtype == torch.float32
        torch.testing.assert_close(metric(x, y), metric(x.float(), y.float()))


GOOD = torch.rand(1, 3, 16, 16)


@pytest.mark.parametrize("metric", [psnr, psnr_y, ssim, ms_ssim])
@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (GOOD.numpy(), GOOD, "ndarray"),
        (GOOD[0], GOOD[0], r"\[B, C, H, W\]"),
        ((GOOD * 255).byte(), (GOOD * 255).byte(), "uint8"),
        (GOOD, GOOD[..., :-1], "match"),
        (GOOD[:0], GOOD[:0], "nothing is left"),
        (GOOD[..., :0], GOOD[..., :0], "nothing is left"),
    ],
)
def test_pictures_that_cannot_be_compared(metric, x, y, words):
    with pytest.raises(InputError, match=words):
        metric(x, y)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: psnr(GOOD, GOOD, border=8), "border 8"),
        (lambda: psnr(GOOD, GOOD, border=-1), "border=-1"),
        (lambda: psnr(GOOD, GOOD, peak=0.0), "peak=0.0"),
        (lambda: psnr_y(GOOD[:, :1], GOOD[:, :1]), "three channels"),
        (lambda: ssim(GOOD, GOOD, border=3), "10 x 10 pixels, expected at least 11 x 11"),
        (lambda: ssim(GOOD, GOOD, window=4), "odd window"),
        (lambda: ms_ssim(GOOD, GOOD, weights=()), "no weights"),
    ],
)
def test_settings_that_make_no_sense(call, words):
    with pytest.raises(InputError, match=words):
        call()
