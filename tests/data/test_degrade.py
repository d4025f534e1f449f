import numpy as np
import pytest
import torch
from PIL import Image

from foveate.data.degrade import downscale, mod_crop, upscale
from foveate.errors import InputError


@pytest.fixture
def noise():
    return np.random.default_rng(0).integers(80, 176, (26, 37, 3)).astype(np.uint8)


def tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_tensor_and_pillow_agree_to_a_grey_level(noise, scale):
    image = Image.fromarray(noise)
    small = downscale(tensor(image), scale, rounded=True)
    assert small.shape[-2:] == (26 // scale, 37 // scale)
    assert (small - tensor(downscale(image, scale))).abs().max() < 1.5 / 255
    assert (upscale(tensor(image), scale).clamp(0, 1) - tensor(upscale(image, scale))).abs().max() < 1.5 / 255


def test_kernel_is_keys_with_a_half():
    impulse = torch.zeros(1, 1, 1, 9)
    impulse[..., 4] = 1
    t = torch.tensor([1.75, 1.25, 0.75, 0.25])
    keys = torch.where(t <= 1, 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2)
    assert torch.allclose(upscale(impulse, 2)[0, 0, 0, 5:9], keys, atol=1e-6)


def test_constant_stays_constant_and_rounding_gives_grey_levels():
    flat = torch.full((1, 1, 9, 9), 0.3)
    assert torch.allclose(downscale(flat, 3), torch.full((1, 1, 3, 3), 0.3), atol=1e-6)
    assert torch.allclose(upscale(flat, 3), torch.full((1, 1, 27, 27), 0.3), atol=1e-6)
    levels = downscale(torch.rand(1, 1, 8, 8), 2, rounded=True) * 255
    assert torch.allclose(levels, levels.round(), atol=1e-4)


def test_mod_crop_keeps_the_upper_left():
    x = torch.arange(35.0).reshape(1, 1, 5, 7)
    assert torch.equal(mod_crop(x, 3), x[..., :3, :6])
    assert mod_crop(Image.new("L", (7, 5)), 3).size == (6, 3)


def test_bad_scales_and_shapes():
    for scale in (0, -1, 1.5, 6):
        with pytest.raises(InputError, match=r"scale"):
            downscale(torch.zeros(1, 1, 5, 5), scale)
    with pytest.raises(InputError, match=r"\[B, C, H, W\]"):
        upscale(torch.zeros(3, 5, 5), 2)
