import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from foveate.errors import InputError
from foveate.layers.upscaler import window_reader
from foveate.meter import count_flops
from foveate.ops.gaussians import Grid
from foveate.restore.gsasr import FAR, GSASR, STEP, Gaussians, reduced
from foveate.restore.gsasr_decoder import GaussianDecoder, ScaleBias

TINY = {"channels": 8, "blocks": 1, "dim": 8, "heads": 2, "side": 4, "cross": (1, 2), "among": (1, 2), "density": 2}
TINY |= {"expand": 1, "masked": True}


def tiny(std=0.3, **changes):
    """A small network with weights large enough for every path to show, and Gaussians that stay near their cells."""
    torch.manual_seed(0)
    net = GSASR(**(TINY | changes)).eval()
    for p in net.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=std)
    nn.init.normal_(net.decoder.heads["mean"].linears[-1].weight, std=0.01)
    return net


def picture(h, w, seed=0, dtype=torch.float32):
    return torch.rand(1, 3, h, w, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def numbers(*rows):
    """One row of cells, each given by its 9 numbers. Shape: [1, 1, n, 9] float64."""
    return torch.tensor(rows, dtype=torch.float64)[None, None]


def logit(p):
    return math.log(p / (1 - p))


# ---------------------------------------------------------------------- what is drawn


def test_a_round_gaussian_is_its_colour_in_the_middle_and_falls_by_half_an_exponent_in_one_deviation():
    raw = [logit(0.36 / 0.99999), logit(0.36 / 0.99999), 0, logit(0.5), logit(0.8), logit(0.4), logit(0.2), 0, 0]
    net = tiny(density=1)
    found = net.activate(numbers(raw, raw))
    assert found.centres[0].tolist() == [[0.5, 0.5], [1.5, 0.5]]
    one = Gaussians(*(t[:, :1] for t in found))
    width = (0.36 + 1e-6) / STEP
    fine = Grid(1, 2, dy=width, dx=width, centre=0.5 / width)  # the first pixel on the centre
    colour = torch.tensor([0.4, 0.2, 0.1], dtype=torch.float64)
    drawn = net.draw(one, fine)
    torch.testing.assert_close(drawn[0, :, 0, 0], colour, atol=1e-9, rtol=0)
    right = (drawn[0, :, 0, 1] / colour).log().mean()
    assert right.item() == pytest.approx(-0.5, abs=1e-9)


def test_the_sum_is_the_papers_and_the_first_size_is_the_vertical_one():
    torch.manual_seed(0)
    raw, net = torch.randn(2, 3, 4, 9, dtype=torch.float64), tiny()
    size, g = (7, 11), 2
    drawn = net.draw(net.activate(raw), Grid.over(1.5, 2, size))
    for b in range(2):
        total = torch.zeros(3, *size, dtype=torch.float64)
        for i in range(3):
            for j in range(4):
                r = raw[b, i, j]
                sv, sh = (0.99999 * torch.sigmoid(r[k]) + 1e-6 for k in (0, 1))
                rho = 0.999999 * torch.tanh(r[2])
                x, y = (j + 0.5 + r[7]) / g, (i + 0.5 + r[8]) / g
                # in output pixels, as the released code has it
                dx = torch.arange(size[1]) - (x * size[1] / 2 - 0.5)
                dy = (torch.arange(size[0]) - (y * size[0] / 1.5 - 0.5))[:, None]
                u, v = dx / (sh / 1.2 * size[1] / 2), dy / (sv / 1.2 * size[0] / 1.5)
                weight = torch.exp(-(u * u - 2 * rho * u * v + v * v) / (2 * (1 - rho**2)))
                weight[(u * u - 2 * rho * u * v + v * v) / (1 - rho**2) > FAR**2] = 0
                total += (torch.sigmoid(r[3]) * torch.sigmoid(r[4:7]))[:, None, None] * weight
        torch.testing.assert_close(drawn[b], total)


@given(st.integers(2, 5), st.integers(0, 99), st.sampled_from([1, 3, 5]))
@settings(deadline=None, max_examples=10)
def test_the_middle_of_odd_blocks_is_the_coarser_drawing(side, seed, factor):
    torch.manual_seed(seed)
    net = tiny()
    found = net.activate(torch.randn(1, 2 * side, 2 * side, 9))
    coarse, fine = (net.draw(found, Grid.over(side, side, (n * side, n * side + n))) for n in (2, 2 * factor))
    middle = slice(factor // 2, None, factor)
    torch.testing.assert_close(fine[..., middle, middle], coarse, atol=1e-5, rtol=1e-5)


def test_drawing_is_additive_and_has_no_order():
    torch.manual_seed(0)
    net = tiny()
    found, grid = net.activate(torch.randn(1, 8, 8, 9)), Grid.over(4, 4, (13, 15))
    whole, order = net.draw(found, grid), torch.randperm(64)
    parts = [net.draw(Gaussians(*(t[:, part] for t in found)), grid) for part in (slice(0, 20), slice(20, 64))]
    torch.testing.assert_close(parts[0] + parts[1], whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(net.draw(Gaussians(*(t[:, order] for t in found)), grid), whole, atol=1e-5, rtol=1e-5)
    twice = net.draw(found._replace(colours=2 * found.colours), grid)
    torch.testing.assert_close(twice, 2 * whole, atol=1e-5, rtol=1e-5)


def test_extreme_numbers_still_draw_something_finite():
    net = tiny(density=1)
    rows = [[a, b, c, 0, 1, 1, 1, 0, 0] for a in (-99.0, 99.0) for b in (-99.0, 99.0) for c in (-99.0, 99.0)]
    raw = numbers(*rows).float().requires_grad_()
    drawn = net.draw(net.activate(raw), Grid.over(1, 8, (4, 32)))
    assert torch.isfinite(drawn).all()
    assert drawn.max() > 0.1
    drawn.sum().backward()
    assert torch.isfinite(raw.grad).all()


def test_round_gaussians_are_round():
    found = tiny(isotropic=True).activate(torch.randn(1, 4, 4, 9))
    assert torch.equal(found.conics[..., 0], found.conics[..., 2])
    assert not found.conics[..., 1].any()


def test_gradients_are_those_of_the_dense_sum():
    torch.manual_seed(0)
    net, raw = tiny(), torch.randn(1, 4, 4, 9)
    grads = []
    for dtype in (torch.float32, torch.float64):
        r = raw.detach().to(dtype).requires_grad_()
        (net.draw(net.activate(r), Grid.over(2, 2, (5, 7))) - 0.3).square().sum().backward()
        grads.append(r.grad.double())
    torch.testing.assert_close(grads[0], grads[1], atol=1e-4, rtol=1e-3)
    assert grads[1].flatten(0, 2).any(0).all()


# ---------------------------------------------------------------------- how far Gaussians reach


def test_the_widest_gaussian_ends_where_the_box_of_the_paper_does():
    net = tiny(raster_ratio=0.1)
    source, size = (48, 40), (96, 120)
    box = 0.1 * (96 - 1) / 2, 0.1 * (120 - 1) / 2  # in output pixels
    assert net.reach(source, size) == pytest.approx(STEP * min(box[0] / 2, box[1] / 3))
    assert tiny().reach(source, size) == FAR
    assert tiny(raster_ratio=0.5).reach(source, size) == FAR


def test_a_short_reach_leaves_out_what_is_beyond_and_a_long_one_nothing():
    torch.manual_seed(0)
    raw = torch.randn(1, 8, 8, 9, dtype=torch.float64)
    net = tiny()
    found, grid = net.activate(raw), Grid.over(4, 4, (9, 9))
    whole = net.draw(found, grid, 60.0)
    torch.testing.assert_close(net.draw(found, grid), whole, atol=64 * math.exp(-(FAR**2) / 2), rtol=0)
    errors = [(net.draw(found, grid, reach) - whole).abs().max().item() for reach in (1.0, 2.0, 3.0)]
    assert errors == sorted(errors, reverse=True)
    for reach, error in zip((1.0, 2.0, 3.0), errors, strict=True):
        assert 0 < error <= found.colours.sum(1).max() * math.exp(-(reach**2) / 2)


# ---------------------------------------------------------------------- sizes and windows


@pytest.mark.parametrize("scale", [1.0, 1.3, 2.0, 3.7, 12.0, (2.0, 3.3)])
@pytest.mark.parametrize("base", [False, True])
def test_any_scale_gives_the_floor_of_the_size(scale, base):
    sy, sx = scale if isinstance(scale, tuple) else (scale, scale)
    assert tiny(base=base)(picture(5, 6), scale).shape == (1, 3, math.floor(sy * 5), math.floor(sx * 6))


def test_scales_of_both_axes_only_change_where_the_sum_is_looked_at():
    net, x = tiny(), picture(8, 8)
    with torch.no_grad():
        square, tall = net.enlarge(x, (24, 24)), net.enlarge(x, (72, 8))  # the same geometric mean
    torch.testing.assert_close(tall[:, :, 1::3], net.draw(net.gaussians(x, 3.0), Grid.over(8, 8, (24, 8))))
    torch.testing.assert_close(square[..., 1::3], tall[:, :, 1::3], atol=1e-5, rtol=1e-5)


def test_the_decoder_hears_of_the_scale():
    net, x = tiny(), picture(4, 4)
    assert (net.gaussians(x, 2.0).centres - net.gaussians(x, 4.0).centres).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("source", "size", "tile"),
    [((20, 31), (45, 60), 5), ((44, 17), (44, 47), 9), ((33, 44), (80, 44), 16), ((9, 38), (27, 114), 4)],
)
def test_windows_give_what_the_whole_picture_gives(source, size, tile):
    net, x = tiny(std=0.2, base=True), picture(*source)
    net.decoder.heads["rgb"].linears[-1].weight.data *= 10
    with torch.no_grad():
        whole = net.enlarge(x, size)
        parts = torch.cat(list(net.strips(window_reader(x), source, size, tile=tile)), 2)
    assert (whole - net.base.enlarge(x, size)).std() > 0.03
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-4)


def test_opposite_borders_meet_only_in_released_networks():
    x = picture(8, 44)  # wider than what one pixel sees
    other = torch.cat([x[..., :-1], x[..., -1:] + 0.5], -1)
    for masked in (True, False):
        net = tiny(masked=masked)
        with torch.no_grad():
            moved = (net.gaussians(other, 2.0).colours - net.gaussians(x, 2.0).colours).abs().sum(-1)
        moved = moved.view(16, 88)
        assert moved[:, -2:].max() > 0.1
        assert (moved[:, 0].max() > 1e-6) == (not masked)


# ---------------------------------------------------------------------- the decoder


def test_attention_to_copies_of_one_token_is_a_bias():
    torch.manual_seed(0)
    full, bias, t = nn.MultiheadAttention(8, 2, batch_first=True), ScaleBias(8), torch.randn(3, 8)
    nn.init.normal_(full.in_proj_bias)
    bias.value.weight.data, bias.value.bias.data = full.in_proj_weight.data[16:], full.in_proj_bias.data[16:]
    bias.out.weight.data, bias.out.bias.data = full.out_proj.weight.data, full.out_proj.bias.data
    copies = t[:, None].repeat(1, 5, 1)
    attended, _ = full(torch.randn(3, 7, 8), copies, copies)
    torch.testing.assert_close(attended, bias(t)[:, 0].expand_as(attended))


def test_the_halo_is_what_a_pixel_sees():
    net = tiny(std=1.0)
    x = picture(44, 44, dtype=torch.float64).requires_grad_()
    net = net.double()
    for p in net.parameters():  # then no ReLU stops a gradient
        p.data.abs_()
    sizes = net.decoder(net.encoder(x), x.new_ones(1))
    (gradient,) = torch.autograd.grad(sizes[0, 44, 44].sum(), x)
    seen = gradient.abs().sum((0, 1)).nonzero()
    reach = max(22 - int(seen.min()), int(seen.max()) - 22)
    assert 4 < reach <= net.encoder.halo + net.decoder.halo < net.halo


@pytest.mark.parametrize("density", [1, 2, 3, 4])
def test_every_pixel_has_its_gaussians(density):
    found = tiny(density=density).gaussians(picture(4, 8), 2.0)
    assert found.centres.shape == (1, 32 * density**2, 2)
    cells = found.centres.unflatten(1, (4 * density, 8 * density))[0]
    middles = (torch.arange(8 * density) + 0.5) / density
    assert (cells[..., 0] - middles).abs().max() < 1
    assert (cells[..., 1].mean(1).diff() > 0).all()


def test_with_base_it_begins_near_bicubic_interpolation_with_even_gaussians():
    torch.manual_seed(0)
    net, x = GSASR(**TINY, base=True).eval(), picture(8, 8)
    with torch.no_grad():
        assert (net(x, 2.0) - net.base.enlarge(x, (16, 16))).abs().mean() < 0.1
        found = net.gaussians(x, 2.0)
        even = net.draw(found._replace(colours=torch.full_like(found.colours, 0.5)), Grid.over(8, 8, (16, 16)))
    assert even[..., 4:-4, 4:-4].sub(1).abs().max() < 0.15


def test_reported_flops_are_those_of_the_run_and_a_bound_on_drawing():
    net, x = tiny(), picture(8, 12)
    with torch.no_grad():
        counted = count_flops(net.gaussians, x, 2.0)
    reach = FAR / STEP
    drawing = 30 * 4 * min(math.pi * reach**2, 96) * 16 * 24
    assert net.flops((8, 12), (16, 24)) - drawing == pytest.approx(counted, rel=0.05)
    assert tiny(base=True).flops((8, 12), (16, 24)) > net.flops((8, 12), (16, 24))


# ---------------------------------------------------------------------- habits of the house


@pytest.mark.parametrize("base", [False, True])
def test_gradients_reach_every_parameter(base):
    net = tiny(base=base).train()
    (net(picture(8, 8), 2.5) - 0.4).square().sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_bfloat16_is_close_to_float32():
    x = picture(8, 8)
    with torch.no_grad():
        exact = tiny(std=0.1, base=True)(x, 2.0)
        rough = tiny(std=0.1, base=True).to(torch.bfloat16)(x.bfloat16(), 2.0)
    assert rough.dtype == torch.bfloat16
    assert (rough - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_saving_and_loading_gives_the_same_network(tmp_path):
    net, x = tiny(base=True, raster_ratio=0.5), picture(5, 6)
    net.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(GSASR.from_pretrained(tmp_path)(x), net(x))


def test_what_cannot_be_done_is_said():
    net = tiny()
    with pytest.raises(InputError, match=r"1 or more, got \(0, 4\)"):
        net.enlarge(picture(4, 4), (0, 4))
    with pytest.raises(InputError, match="shape"):
        net.enlarge(picture(4, 4)[0], (8, 8))
    with pytest.raises(InputError, match="gsasr only enlarges"):
        net.reduce(picture(4, 4), (2, 2))
    with pytest.raises(InputError, match=r"above 0 and up to 1, got 1\.5"):
        tiny(raster_ratio=1.5)
    with pytest.raises(InputError, match="3 heads cannot share 8 channels"):
        GaussianDecoder(8, 8, 3, 4, (1, 1), (1, 1), 2, 1, True)
    with pytest.warns(UserWarning, match="4x4 to 8x2 shrinks a side"):
        net.enlarge(picture(4, 4), (2, 8))


def test_twins_to_train_with_have_256_levels():
    x = picture(12, 12)
    low = reduced(x, (5, 4))
    assert low.shape == (1, 3, 5, 4)
    torch.testing.assert_close(low, (low * 255).round() / 255)
