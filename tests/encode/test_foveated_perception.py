"""Foveated perception: what stays, what is kept of the rest, and repeatability."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.data.samples import samples
from foveate.encode.foveated_perception import KINDS, FoveatedPerception, matched, recoloured
from foveate.errors import InputError
from foveate.meter import ssim
from foveate.ops import use
from foveate.ops.foveation import laplacian, polar


def pixels(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def photograph(side=96):
    return F.interpolate(samples()["chelsea"][None], (side, side), mode="bilinear", antialias=True)


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(KINDS), st.sampled_from([1, 3]))
@settings(deadline=None, max_examples=30)
def test_any_size_stays_a_picture(height, width, kind, channels):
    x = pixels(2, channels, height, width)
    y = FoveatedPerception(kind)(x)
    assert y.shape == x.shape
    assert y.isfinite().all()
    assert y.min() >= -1e-5
    assert y.max() <= 1 + 1e-5


@pytest.mark.parametrize("kind", ["texture", "blur"])
@pytest.mark.parametrize("gaze", [(0.5, 0.5), (0.2, 0.7)])
def test_the_fovea_is_untouched_whatever_the_noise(kind, gaze):
    x, at = pixels(2, 3, 70, 90), torch.tensor([gaze, gaze])
    see = FoveatedPerception(kind, fovea=1.5)
    fovea = polar((70, 90), at)[0][0] <= 1.5
    first, second = see(x, at), see(x, at, seeds=[7, 8])
    assert fovea.sum() > 50
    assert torch.equal(first[..., fovea], x[..., fovea])
    assert torch.equal(second[..., fovea], x[..., fovea])
    assert (first != x)[..., ~fovea].float().mean() > 0.9


def test_each_picture_has_its_own_gaze():
    x, gazes = pixels(2, 3, 64, 64), torch.tensor([[0.2, 0.3], [0.8, 0.6]])
    for kind in ("texture", "blur"):
        see = FoveatedPerception(kind)
        together = see(x, gazes, seeds=[4, 5])
        for i in range(2):
            alone = see(x[i], gazes[i], seeds=[4 + i])
            torch.testing.assert_close(together[i], alone, atol=1e-5, rtol=1e-4)


def test_a_seed_decides_the_noise():
    x = pixels(1, 3, 40, 40).expand(3, -1, -1, -1)
    y = FoveatedPerception(seed=5)(x)
    assert not torch.equal(y[0], y[1])
    assert torch.equal(FoveatedPerception()(x, seeds=[6, 6, 5])[[2, 0]], y[[0, 1]])


def test_without_noise_the_picture_comes_back():
    x = pixels(2, 3, 45, 61)
    torch.testing.assert_close(FoveatedPerception(slope=0.0)(x), x, atol=1e-5, rtol=0)
    assert torch.equal(FoveatedPerception("reference")(x), x)


def test_the_share_of_noise_grows_with_the_window():
    see = FoveatedPerception()
    alpha = see.alpha
    assert (alpha.diff() >= 0).all()
    assert 0 < alpha[0] < alpha[5] < 1
    torch.testing.assert_close(alpha, torch.tanh(1.281 * see.windows.radii() / 2))


def test_the_periphery_keeps_its_energy_as_texture_and_loses_it_by_blur():
    x = photograph()
    d = polar((96, 96))[0][0]
    texture = FoveatedPerception()
    blur = matched("blur", texture, x)
    energy = [float(laplacian(y, 1)[0][..., d > 5].square().mean()) for y in (x, texture(x), blur(x))]
    assert 0.7 < energy[1] / energy[0] < 1.3
    assert energy[2] < 0.1 * energy[0]
    assert (texture(x) - x)[..., d > 5].abs().mean() > 0.02


@pytest.mark.parametrize("kind", ["blur", "uniform"])
def test_matched_blurs_have_the_similarity_of_the_texture(kind):
    x = photograph()
    texture = FoveatedPerception()
    other = matched(kind, texture, x)
    assert float(ssim(other(x), x).mean()) == pytest.approx(float(ssim(texture(x), x).mean()), abs=0.005)


def test_both_paths_see_alike():
    x = photograph(50)
    for kind in KINDS:
        fast = FoveatedPerception(kind)(x)
        with use("reference"):
            plain = FoveatedPerception(kind)(x)
        torch.testing.assert_close(fast, plain, atol=1e-4, rtol=1e-3)


def test_an_encoder_and_its_decoder_may_be_given():
    x = pixels(1, 3, 64, 64)

    def encode(x):
        return [F.avg_pool2d(x, 8)]

    def decode(features):
        return F.interpolate(features[0], scale_factor=8, mode="nearest")

    see = FoveatedPerception(encode=encode, decode=decode)
    reference = FoveatedPerception("reference", encode=encode, decode=decode)
    assert torch.equal(reference(x), decode(encode(x)))
    y = see(x)
    assert y.shape == x.shape
    assert not torch.equal(y, reference(x))
    assert torch.equal(y[..., 31:33, 31:33], reference(x)[..., 31:33, 31:33])


def test_noise_takes_on_the_colours_of_the_picture():
    x, noise = photograph(), torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    z = recoloured(noise, x)
    torch.testing.assert_close(z.mean((2, 3)), x.mean((2, 3)), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cov(z[0].flatten(1)), torch.cov(x[0].flatten(1)), atol=2e-4, rtol=0.01)


def test_a_plain_picture_stays_plain_and_half_precision_stays_so():
    plain = torch.full((1, 3, 32, 32), 0.25)
    assert (FoveatedPerception()(plain) - plain).abs().max() < 1e-3
    low = FoveatedPerception()(pixels(1, 3, 32, 32).bfloat16())
    assert low.dtype == torch.bfloat16


def test_uniform_blur_is_the_authors_at_256_pixels():
    assert FoveatedPerception("uniform").sigma(torch.zeros(1, 3, 256, 256)).max() == pytest.approx(3.47)


def test_what_does_not_fit_is_refused():
    x = pixels(2, 3, 16, 16)
    for wrong in (
        lambda: FoveatedPerception("sharp"),
        lambda: FoveatedPerception(blur=-1),
        lambda: FoveatedPerception(encode=lambda x: [x]),
        lambda: FoveatedPerception()(x[:0]),
        lambda: FoveatedPerception()((255 * x).long()),
        lambda: FoveatedPerception()(x[None]),
        lambda: FoveatedPerception()(torch.full((1, 3, 8, 8), torch.nan)),
        lambda: FoveatedPerception()(x, gaze=torch.zeros(1, 2)),
        lambda: FoveatedPerception()(x, seeds=[1]),
    ):
        with pytest.raises(InputError):
            wrong()
