import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from foveate.data.degrade import downscale
from foveate.errors import InputError
from foveate.meter import count_flops
from foveate.restore.adk_net import NORMALISATIONS, ADKNet, describe, sample_camera


def net(scale=2, **settings):
    """A small network with weights large enough for every path to show."""
    torch.manual_seed(0)
    model = ADKNet(scale, **{"features": 8, "blocks": 1, "trunk": 1, **settings})
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model.double().eval()


def picture(h, w, dtype=torch.float64):
    return torch.rand(1, 3, h, w, generator=torch.Generator().manual_seed(0), dtype=dtype)


def bicubic(scale):
    """Keys' cubic, stretched by the scale, at the taps of a small pixel. Shape: [1, 3, K * K, 1, 1]."""
    size = 4 * scale - scale % 2
    t = ((torch.arange(size, dtype=torch.float64) - (size - 1) / 2) / scale).abs()
    near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    line = torch.where(t <= 1, near, torch.where(t < 2, far, 0))
    line = line / line.sum()
    return torch.outer(line, line).flatten().view(1, 1, -1, 1, 1).expand(1, 3, -1, 1, 1)


@given(st.sampled_from(NORMALISATIONS), st.sampled_from([2, 3, 4, 6]), st.integers(24, 30), st.floats(0, 1))
@settings(deadline=None, max_examples=20)
def test_kernels_sum_to_one_so_constants_stay(normalise, scale, side, level):
    model = net(scale, normalise=normalise)
    colours = torch.tensor([level, level / 2, 1 - level], dtype=torch.float64).view(1, 3, 1, 1)
    x = colours.expand(1, 3, side, side + 3)
    y = model.reduce(x)
    assert y.shape == (1, 3, -(-side // scale), -(-(side + 3) // scale))
    torch.testing.assert_close(y, colours.expand_as(y), atol=1e-9, rtol=0)
    total = model.kernels(picture(side, side)).sum(2)
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-9, rtol=0)


@pytest.mark.parametrize("normalise", ["softmax", "sum"])
def test_positive_kernels_stay_within_the_range_of_their_window(normalise):
    model, x = net(normalise=normalise), picture(20, 22)
    for p in model.generators.parameters():
        p.data *= 3
    y, padded = model(x), F.pad(x, (3, 3, 3, 3), mode="reflect")
    assert (y <= F.max_pool2d(padded, 8, 2) + 1e-9).all()
    assert (y >= -F.max_pool2d(-padded, 8, 2) - 1e-9).all()
    assert model.kernels(x).min() > 0


def test_signed_kernels_have_lobes():
    assert net().kernels(picture(20, 22)).min() < 0


@pytest.mark.parametrize(("scale", "size"), [(2, 8), (3, 11), (4, 4), (3, 3)])
def test_one_tap_picks_pixels(scale, size):
    model, x = net(scale, kernel_size=size), picture(24, 36)
    kernels = torch.zeros(1, 3, size**2, 1, 1, dtype=torch.float64)
    margin = (size - scale) // 2
    kernels[:, :, margin * size + margin + 1] = 1
    assert torch.equal(model.resample(x, kernels), x[..., ::scale, 1::scale])


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_kernel_of_bicubic_gives_bicubic(scale):
    x = picture(20 * scale, 24 * scale)
    y, expected = net(scale).resample(x, bicubic(scale)), downscale(x, scale)
    torch.testing.assert_close(y[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2], atol=1e-9, rtol=0)


def test_a_colour_has_its_own_generator_and_only_reads_its_own_pixels():
    model, x = net(), picture(20, 22)
    kernels, before = model.kernels(x), model(x)
    other = x.clone()
    other[:, 2] = 0
    assert torch.equal(model.resample(other, kernels)[:, :2], before[:, :2])
    model.generators[2][-1].bias.data += torch.randn(64, dtype=torch.float64)
    after = model(x)
    assert torch.equal(after[:, :2], before[:, :2])
    assert not torch.allclose(after[:, 2], before[:, 2])
    same = net(shared=True).kernels(x)
    assert same.shape == kernels.shape == (1, 3, 64, 10, 11)
    assert torch.equal(same[:, 0], same[:, 2])


@pytest.mark.parametrize("scale", [2, 3, 4, 5])
def test_it_begins_as_a_box(scale):
    x = picture(12 * scale, 13 * scale)
    model = ADKNet(scale, 8, 1, 1).double()
    margin = (model.kernel_size - scale) // 2
    box = F.avg_pool2d(F.pad(x, (margin,) * 4, mode="reflect"), model.kernel_size, scale)
    torch.testing.assert_close(model(x), box)


@pytest.mark.parametrize("scale", [2, 3])
def test_parts_give_what_the_whole_picture_gives(scale):
    model, x = net(scale), picture(40 * scale - 1, 33 * scale)
    whole = model(x).detach()
    for tile in (3, 16, 128):
        torch.testing.assert_close(model.reduce(x, tile=tile), whole, atol=1e-9, rtol=1e-9)
    model.halo = 3
    assert not torch.allclose(model.reduce(x, tile=3), whole, atol=1e-9)


def test_sizes_are_rounded_up_or_down_and_others_refused():
    model, x = net(), picture(21, 24)
    assert model.reduce(x).shape == (1, 3, 11, 12)
    torch.testing.assert_close(model.reduce(x, (10, 12)), model.reduce(x[..., :20, :]))
    mirrored = torch.cat([x, x[..., 19:20, :]], 2)
    torch.testing.assert_close(model.reduce(x, (11, 12)), model.reduce(mirrored))
    for size in ((9, 12), (10, 11), (21, 24)):
        with pytest.raises(InputError, match=r"reduces 21 x 24 to 10\.5 x 12"):
            model.reduce(x, size)


def test_flops_are_those_of_the_run():
    model = net().float()
    assert model.flops((64, 48), (32, 24)) == model.flops((64, 48)) == count_flops(model, picture(64, 48).float())


def test_gradients_reach_every_parameter_and_bfloat16_runs():
    model, x = net(), picture(18, 20)
    (model(x) - downscale(x, 2)).abs().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    exact, rough = model.reduce(x), model.bfloat16().reduce(x)
    assert rough.dtype == torch.bfloat16
    assert (rough - exact).abs().mean() < 0.03


@pytest.mark.parametrize("normalise", NORMALISATIONS)
def test_the_first_step_moves_what_begins_at_zero(normalise):
    model, x = ADKNet(2, 8, 1, 1, normalise=normalise), picture(18, 20).float()
    (model(x) - x[..., ::2, ::2]).square().sum().backward()
    assert all(g[-1].weight.grad.any() for g in model.generators)


def test_saving_and_loading_gives_the_same_network(tmp_path):
    model, x = net(3).float(), picture(20, 22).float()
    model.save_pretrained(tmp_path)
    assert torch.equal(ADKNet.from_pretrained(tmp_path).reduce(x), model.reduce(x))


def test_kernels_are_described():
    kernels = torch.zeros(1, 3, 64, 2, 2, dtype=torch.float64)
    kernels[:, 0] = 1 / 64
    kernels[:, 1, 3 * 8 + 3 : 3 * 8 + 5] = 0.5  # the two middle pixels of the row above the middle
    kernels[:, 2, 7 * 8 + 7] = 1
    found = {name: values[0, :, 0, 0].tolist() for name, values in describe(kernels, 2).items()}
    assert found["x"] == pytest.approx([0, 0, 1.75])
    assert found["y"] == pytest.approx([0, -0.25, 1.75])
    assert found["entropy"] == pytest.approx([6, 1, 0])
    assert found["spread"] == pytest.approx([((64 - 1) / 12) ** 0.5 / 2, 0.25 / 2**0.5, 0])


def test_the_sample_camera_is_what_it_says():
    x = picture(24, 28) * 0.01 + 0.5  # without edges
    x[..., 12:, :] += 0.4  # but one
    y = sample_camera(x, 2)
    assert y.shape == (1, 3, 12, 14)
    torch.testing.assert_close(y[:, 1], F.avg_pool2d(x[:, 1], 2))
    moved = 0.7 * x[:, :1, :, :-1] + 0.3 * x[:, :1, :, 1:]
    torch.testing.assert_close(y[:, 0, :, 2:-3], downscale(moved[..., :-1], 2)[:, 0, :, 2:-2], atol=1e-9, rtol=0)
    place = torch.arange(8, dtype=torch.float64) - 3.5
    for row, sigma in ((3, 1.2), (6, 0.4)):
        line = torch.exp(-(place**2) / (2 * sigma**2))
        kernel = torch.outer(line, line) / line.sum() ** 2
        window = x[0, 2, 2 * row - 3 : 2 * row + 5, 2 * 6 - 3 : 2 * 6 + 5]
        torch.testing.assert_close(y[0, 2, row, 6], (kernel * window).sum())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 1}, "2 or more, got 1"),
        ({"scale": 2.0}, "whole number"),
        ({"scale": 7}, "factors 2, 3 and 5, got 7"),
        ({"kernel_size": 7}, "got 7 for scale 2"),
        ({"kernel_size": 2, "scale": 4}, "got 2 for scale 4"),
        ({"normalise": "l1"}, "'l1'; use one of"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        ADKNet(**arguments)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 1, 20, 20), r"\[B, 3, H, W\]"),
        (torch.zeros(0, 3, 20, 20), "empty"),
        (torch.full((1, 3, 20, 20), torch.nan), "NaN"),
        (torch.full((1, 3, 20, 20), 255.0), "0..1, got 255 to 255"),
        (torch.zeros(1, 3, 20, 20, dtype=torch.uint8), "uint8"),
    ],
)
def test_what_is_no_picture_is_refused(x, message):
    with pytest.raises(InputError, match=message):
        net().reduce(x)


def test_pictures_smaller_than_a_kernel_are_mirrored() -> None:
    net = ADKNet(2, features=8, blocks=1, trunk=1)
    x = torch.rand(1, 3, 3, 5, generator=torch.Generator().manual_seed(0))
    assert net.reduce(x).shape == (1, 3, 2, 3)
    wide = torch.cat([x, x[..., 1:2, :], x[..., :1, :], x[..., 1:, :], x[..., 1:2, :]], 2)
    wide = torch.cat([wide, wide[..., [3, 2, 1]]], 3)
    torch.testing.assert_close(net.reduce(x), net.reduce(wide)[..., :2, :3])
