import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import BudgetError, InputError
from foveate.layers.upscaler import enlarge
from foveate.meter import count_flops
from foveate.ops.color import rgb_to_ycbcr
from foveate.restore.espcn import ESPCN, as_transposed, icnr_

SCALES, SEEDS = st.integers(1, 4), st.integers(0, 2**32 - 1)


def tiny(scale=3, residual=False, dtype=torch.float64):
    """A small network with weights drawn at random, as after training."""
    torch.manual_seed(0)
    net = ESPCN(scale, (8, 4), residual)
    torch.nn.init.normal_(net.last.weight, std=0.2)
    return net.to(dtype)


def noise(channels, h, w, seed=0, dtype=torch.float64):
    return torch.rand(1, channels, h, w, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@given(SCALES, st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), SEEDS)
@settings(deadline=None, max_examples=25)
def test_the_shuffle_is_the_papers_index_formula_and_has_an_inverse(r, c, h, w, seed):
    t = noise(c * r * r, h, w, seed)
    image = ESPCN(r).shuffle(t)
    expected = torch.empty(1, c, r * h, r * w, dtype=torch.float64)
    for k in range(c):
        for y in range(r * h):
            for x in range(r * w):
                expected[0, k, y, x] = t[0, k * r * r + (y % r) * r + x % r, y // r, x // r]
    assert torch.equal(image, expected)
    assert torch.equal(F.pixel_unshuffle(image, r), t)
    assert torch.equal(ESPCN(r).shuffle(F.pixel_unshuffle(expected, r)), expected)


@given(SCALES, st.sampled_from([1, 3, 5]), st.integers(1, 2), st.integers(1, 6), st.integers(1, 6), SEEDS)
@settings(deadline=None, max_examples=40)
def test_a_sub_pixel_convolution_is_a_transposed_one(r, k, c, h, w, seed):
    x, weight = noise(2, h, w, seed), torch.randn(c * r * r, 2, k, k, dtype=torch.float64)
    sub_pixel = F.pixel_shuffle(F.conv2d(x, weight, padding=k // 2), r)
    kernel = as_transposed(weight, r)
    assert kernel.shape == (2, c, k * r, k * r)
    transposed = F.conv_transpose2d(x, kernel, stride=r, padding=r * (k - 1) // 2)
    torch.testing.assert_close(transposed, sub_pixel, atol=1e-10, rtol=0)


def test_the_error_is_the_same_before_and_after_the_shuffle():
    net, low, high = tiny(), noise(1, 5, 6), noise(1, 15, 18, 1)
    phases = net.last(net.body(low))
    torch.testing.assert_close(F.mse_loss(net.luminance(low), high), F.mse_loss(phases, F.pixel_unshuffle(high, 3)))


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_fresh_network_enlarges_without_a_checkerboard(scale):
    torch.manual_seed(0)
    blocks = F.pixel_unshuffle(ESPCN(scale).double().luminance(noise(1, 6, 7)), scale)
    torch.testing.assert_close(blocks, blocks[:, :1].expand_as(blocks), atol=1e-12, rtol=0)
    assert blocks[:, 0].std() > 1e-4


def test_a_fresh_residual_network_is_bicubic_interpolation():
    torch.manual_seed(0)
    y = noise(1, 6, 7, dtype=torch.float32)
    torch.testing.assert_close(ESPCN(2, residual=True).luminance(y), enlarge(y, 2, "bicubic"))


def test_equal_phases_come_from_the_first_filter_of_each_group():
    weight = torch.randn(2 * 9, 4, 3, 3)
    first = weight[::9].clone()
    assert icnr_(weight, 3) is weight
    assert torch.equal(weight.view(2, 9, 4, 3, 3), first[:, None].expand(-1, 9, -1, -1, -1))


@pytest.mark.parametrize("residual", [False, True])
def test_moving_the_input_by_one_pixel_moves_the_output_by_the_scale(residual):
    net, y = tiny(residual=residual), noise(1, 24, 25)
    moved = net.luminance(y.roll((1, 1), (2, 3)))
    border = 3 * (net.halo + 1)
    inside = (..., slice(border, -border), slice(border, -border))
    torch.testing.assert_close(moved[inside], net.luminance(y).roll((3, 3), (2, 3))[inside], atol=1e-10, rtol=0)


def test_work_per_pixel_grows_with_the_square_of_the_scale_by_9_times_32():
    y = noise(1, 5, 6, dtype=torch.float32)
    macs = {r: count_flops(ESPCN(r).luminance, y) / 2 / 30 for r in (1, 2, 3, 4)}
    assert macs[3] == 25 * 64 + 9 * 64 * 32 + 9 * 32 * 9
    assert {(macs[r] - macs[1]) / (r * r - 1) for r in (2, 3, 4)} == {9 * 32}


def test_the_published_network_has_22_729_parameters():
    assert [sum(p.numel() for p in m.parameters()) for m in (ESPCN(3).body[0], ESPCN(3).body[2], ESPCN(3).last)] == [
        1664,
        18464,
        2601,
    ]
    assert sum(p.numel() for p in ESPCN(3).parameters()) == 22_729


@pytest.mark.parametrize("residual", [False, True])
def test_colour_is_interpolated_and_luminance_goes_through_the_network(residual):
    net, x = tiny(2, residual), noise(3, 5, 6)
    done, source = rgb_to_ycbcr(net(x)), rgb_to_ycbcr(x)
    torch.testing.assert_close(done[:, :1], net.luminance(source[:, :1]))
    torch.testing.assert_close(done[:, 1:], F.interpolate(source[:, 1:], scale_factor=2, mode="bicubic"))
    y = noise(1, 5, 6)
    assert torch.equal(net(y), net.luminance(y))


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (17, 23)])
@pytest.mark.parametrize("residual", [False, True])
def test_tiles_give_what_the_whole_picture_gives(size, residual):
    net, x = tiny(residual=residual), noise(3, *size)
    for tile in (None, 4, 9):
        torch.testing.assert_close(net.upscale(x, tile=tile).image, net(x).detach(), atol=1e-12, rtol=0)


def test_reported_flops_are_those_of_the_run():
    net, x = tiny(dtype=torch.float32), noise(3, 9, 7, dtype=torch.float32)
    assert net.upscale(x).flops == count_flops(net.upscale, x)


def test_the_last_layer_learns_ten_times_slower():
    net = tiny()
    rest, last = net.parameter_groups(1e-3)
    assert (rest["lr"], last["lr"]) == (1e-3, 1e-4)
    assert {id(p) for p in last["params"]} == {id(p) for p in net.last.parameters()}
    assert {id(p) for g in (rest, last) for p in g["params"]} == {id(p) for p in net.parameters()}


def test_gradients_reach_every_parameter_and_bfloat16_runs():
    net = tiny()
    net(noise(3, 6, 6)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())
    image = tiny(dtype=torch.bfloat16).upscale(noise(3, 6, 6)).image
    torch.testing.assert_close(image.double(), tiny().upscale(noise(3, 6, 6)).image, atol=0.05, rtol=0)


def test_saving_and_loading_gives_the_same_network(tmp_path):
    net, x = tiny(2, True, torch.float32), noise(3, 5, 6, dtype=torch.float32)
    net.save_pretrained(tmp_path)
    assert torch.equal(ESPCN.from_pretrained(tmp_path)(x), net(x))


def test_the_residual_network_sees_detail_alone():
    net, y = tiny(2, True), noise(1, 30, 30)
    brighter = net.luminance(y + 0.25) - net.luminance(y)
    torch.testing.assert_close(brighter, torch.full_like(brighter, 0.25))


@pytest.mark.parametrize(("activation", "function"), [("tanh", torch.tanh), ("relu", torch.relu)])
def test_the_activation_may_be_chosen(activation, function):
    net, y = ESPCN(2, (8, 4), activation=activation).double(), noise(1, 5, 6)
    h = function(F.conv2d(y, net.body[0].weight, net.body[0].bias, padding=2))
    h = function(F.conv2d(h, net.body[2].weight, net.body[2].bias, padding=1))
    out = F.pixel_shuffle(F.conv2d(h, net.last.weight, net.last.bias, padding=1), 2)
    torch.testing.assert_close(net.luminance(y), out)


def test_an_unknown_activation_is_refused():
    with pytest.raises(InputError, match="'gelu'; use 'tanh' or 'relu'"):
        ESPCN(activation="gelu")


@pytest.mark.parametrize("scale", [0, -2, 1.5])
def test_a_scale_that_is_no_positive_integer_is_refused(scale):
    with pytest.raises(InputError, match=f"got {scale}"):
        ESPCN(scale)


def test_other_shapes_and_budgets_are_refused():
    with pytest.raises(InputError, match=r"\(1, 2, 4, 4\)"):
        tiny()(torch.zeros(1, 2, 4, 4, dtype=torch.float64))
    with pytest.raises(InputError, match=r"\(3, 4, 4\)"):
        tiny()(torch.zeros(3, 4, 4, dtype=torch.float64))
    with pytest.raises(BudgetError, match=r"ESPCN x3 takes shares from 1\.00 to 1 of its full cost, got 0\.5\.$"):
        tiny().upscale(noise(3, 4, 4), 0.5)
