import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.engine.importance import entropy, gradient, luma, pool_patches, saliency, variance
from foveate.errors import InputError

MAPS = [gradient, variance, saliency]


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 7), (33, 18)])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("fn", MAPS)
def test_maps_have_the_size_of_the_picture(fn, size, channels):
    out = fn(noise(2, channels, *size))
    assert out.shape == (2, 1, *size)
    assert bool(out.isfinite().all())
    assert bool((out >= 0).all())


@pytest.mark.parametrize("fn", [*MAPS, entropy])
def test_flat_pictures_are_easy_and_images_of_a_batch_do_not_mix(fn):
    x = torch.cat([torch.full((1, 3, 40, 40), 0.7), noise(1, 3, 40, 40)])
    both = fn(x)
    assert both[0].abs().max() < 1e-5
    assert both[1].mean() > 1e-3
    torch.testing.assert_close(both[1:], fn(x[1:]))


@pytest.mark.parametrize("fn", [*MAPS, entropy])
def test_bfloat16_is_measured_in_float32(fn):
    x = noise(1, 3, 20, 20).bfloat16()
    assert fn(x).dtype == torch.float32
    torch.testing.assert_close(fn(x), fn(x.float()))


def test_gradient_of_a_ramp_is_its_slope():
    y, x = torch.meshgrid(torch.arange(9.0), torch.arange(11.0), indexing="ij")
    ramp = (0.03 * x + 0.04 * y)[None, None]
    torch.testing.assert_close(gradient(ramp)[..., 1:-1, 1:-1], torch.full((1, 1, 7, 9), 0.05))


def test_variance_equals_that_of_each_window_even_far_from_zero():
    x = noise(1, 1, 12, 12) * 1e-3 + 100
    expected = x.unfold(2, 5, 1).unfold(3, 5, 1).double().flatten(-2).var(-1, correction=0).float()
    torch.testing.assert_close(variance(x, 5)[..., 2:-2, 2:-2], expected, rtol=0.05, atol=0)
    corner = x[..., :3, :3].double().var(correction=0).float()
    torch.testing.assert_close(variance(x, 5)[0, 0, 0, 0], corner, rtol=0.05, atol=0)


def test_entropy_counts_bits():
    x = torch.zeros(1, 1, 8, 16)
    x[..., 8:] = torch.arange(64).view(8, 8) / 255
    x[..., :4, :4] = 1
    quarter = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    torch.testing.assert_close(entropy(x, patch=8), torch.tensor([[[quarter, 6.0]]]))


def test_entropy_tells_all_8_bit_levels_apart():
    x = (torch.arange(256) / 255).view(1, 1, 16, 16)
    assert entropy(x, patch=16).item() == pytest.approx(8)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 20), st.integers(0, 99))
def test_entropy_of_a_patch_depends_on_it_alone(height, width, patch, seed):
    x = noise(2, 1, height, width, seed=seed)
    out = entropy(x, patch, bins=16)
    assert out.shape == (2, -(-height // patch), -(-width // patch))
    i, j = out.shape[1] - 1, out.shape[2] - 1
    level = (x[1, 0, i * patch :, j * patch :] * 16).floor().long().flatten()
    p = torch.bincount(level).double() / level.numel()
    expected = -torch.special.xlogy(p, p).sum() / math.log(2)
    assert out[1, i, j].item() == pytest.approx(expected.item(), abs=1e-5)


def test_entropy_in_bands_equals_entropy_at_once(monkeypatch):
    x = noise(2, 3, 50, 30)
    whole = entropy(x, 7)
    monkeypatch.setattr("foveate.engine.importance._HISTOGRAM_CELLS", 1)
    assert torch.equal(entropy(x, 7), whole)


def test_saliency_finds_the_odd_one_out():
    x = torch.sin(torch.arange(128) * 0.8).expand(1, 1, 128, 128) * 0.3 + 0.5
    x = x.clone()
    x[..., 72:88, 24:40] = x[..., 72:88, 24:40].transpose(-1, -2)
    peak = divmod(int(saliency(x).argmax()), 128)
    assert 66 <= peak[0] < 94
    assert 18 <= peak[1] < 46


@pytest.mark.parametrize("fn", MAPS)
def test_mirrored_picture_gives_mirrored_map(fn):
    x = noise(1, 1, 32, 64)
    torch.testing.assert_close(fn(x.flip(-1)), fn(x).flip(-1), rtol=1e-3, atol=1e-4)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.sampled_from(["mean", "max", "sum", "l2"]))
def test_pool_patches_equals_a_loop(height, width, patch, reduce):
    x = noise(2, height, width) - 0.5
    loop = {"mean": torch.mean, "max": torch.amax, "sum": torch.sum, "l2": torch.linalg.vector_norm}[reduce]
    expected = torch.stack(
        [torch.stack([loop(cell, dim=(1, 2)) for cell in band.split(patch, 2)], 1) for band in x.split(patch, 1)],
        1,
    )
    torch.testing.assert_close(pool_patches(x[:, None], patch, reduce), expected)


def test_pool_patches_ignores_what_lies_outside():
    x = torch.full((1, 3, 3), -2.0)
    assert torch.equal(pool_patches(x, 2, "max"), torch.full((1, 2, 2), -2.0))
    assert torch.equal(pool_patches(x, 2, "mean"), torch.full((1, 2, 2), -2.0))


def test_luma_weighs_rgb_and_averages_other_channels():
    x = noise(1, 3, 2, 2)
    torch.testing.assert_close(luma(x)[:, 0], 0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2])
    y = noise(1, 5, 2, 2)
    torch.testing.assert_close(luma(y), y.mean(1, keepdim=True))


def test_errors_say_what_was_passed():
    with pytest.raises(InputError, match=r"\(3, 4, 4\)"):
        gradient(torch.zeros(3, 4, 4))
    with pytest.raises(InputError, match="uint8"):
        entropy(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(InputError, match="not empty"):
        saliency(torch.zeros(1, 3, 0, 4))
    with pytest.raises(InputError, match="got 4"):
        variance(torch.zeros(1, 3, 4, 4), 4)
    with pytest.raises(InputError, match="got 0"):
        pool_patches(torch.zeros(1, 4, 4), 0)
    with pytest.raises(InputError, match="'median'"):
        pool_patches(torch.zeros(1, 4, 4), 2, "median")
    with pytest.raises(InputError, match="2 bins"):
        entropy(torch.zeros(1, 3, 4, 4), bins=1)
