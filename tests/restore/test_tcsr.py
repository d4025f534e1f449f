import pytest
import torch
import torch.nn.functional as F
from torch import nn

from foveate.errors import BudgetError, InputError
from foveate.layers.shift import EIGHT
from foveate.meter import count_flops, count_parameters
from foveate.restore.tcsr import EFFN, SIZES, TCSR, Block, NeighbourhoodAttention


def tiny(scale=2, dtype=torch.float64, **settings):
    """A small network with weights large enough for every path to show."""
    torch.manual_seed(0)
    net = TCSR(scale, **{"channels": 8, "blocks": 2, "kernel_size": 5, "heads": 2, **settings})
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net.to(dtype).eval()


def picture(h, w, dtype=torch.float64):
    return torch.rand(1, 3, h, w, generator=torch.Generator().manual_seed(0), dtype=dtype)


def test_parameters_of_the_published_sizes():
    counts = {f"TCSR-{size}": count_parameters(TCSR(4, **settings)) for size, settings in SIZES.items()}
    assert counts == {"TCSR-B": 689_848, "TCSR-L": 1_036_128}
    for name, published in {"TCSR-B": 682e3, "TCSR-L": 1030e3}.items():
        assert counts[name] == pytest.approx(published, rel=0.012)
    assert count_parameters(Block(64, 9, 4)) == 34_628


@pytest.mark.parametrize("side", [1, 5, 13])
def test_a_wider_neighbourhood_costs_parameters_in_its_table_only(side):
    assert count_parameters(NeighbourhoodAttention(64, side, 4)) == 4 * 64**2 + 4 * 64 + 4 * (2 * side - 1) ** 2


def test_the_shifting_network_is_its_definition():
    torch.manual_seed(0)
    layer, x = EFFN(8).double(), torch.randn(2, 5, 6, 8, dtype=torch.float64)
    kernels = torch.zeros(16, 1, 3, 3, dtype=torch.float64)
    for c in range(16):
        dy, dx = EIGHT[c // 2]
        kernels[c, 0, 1 + dy, 1 + dx] = 1
    wide = F.linear(x, layer.fc1.weight, layer.fc1.bias).permute(0, 3, 1, 2)
    moved = F.gelu(F.conv2d(wide, kernels, padding=1, groups=16)).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), F.linear(moved, layer.fc2.weight, layer.fc2.bias))


def test_attention_of_one_pixel_is_the_projected_value():
    torch.manual_seed(0)
    layer, x = NeighbourhoodAttention(8, 1, 2).double(), torch.randn(1, 4, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.proj(layer.qkv(x)[..., 16:]))


def test_a_block_sees_its_neighbourhood_and_one_pixel_more():
    block = Block(8, 5, 2).double()
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    x = torch.randn(1, 11, 11, 8, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(block(x)[:, 5, 5].sum(), x)
    seen = (gradient.abs().sum((0, 3)) > 0).nonzero()
    assert seen.amin(0).tolist() == [2, 2]
    assert seen.amax(0).tolist() == [8, 8]


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_with_a_silent_tail_the_output_is_the_base(scale, base):
    net, x = tiny(scale, base=base), picture(6, 7)
    for p in net.tail.parameters():
        nn.init.zeros_(p)
    expected = F.interpolate(x, scale_factor=scale, mode="bilinear") if base else net.mean.expand(1, 3, 6, 7)
    y = net(x)
    assert y.shape == (1, 3, 6 * scale, 7 * scale)
    torch.testing.assert_close(y, expected if base else expected[..., :1, :1].expand_as(y))


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (31, 33)])
def test_tiles_give_what_the_whole_picture_gives(size):
    net, x = tiny(), picture(*size)
    for tile in (None, 1 if max(size) < 9 else 3, 16):
        torch.testing.assert_close(net.upscale(x, tile=tile).image, net(x).detach(), atol=1e-9, rtol=1e-9)


def test_a_smaller_halo_would_show():
    net, x = tiny(), picture(31, 33)
    net.halo -= 6
    assert not torch.allclose(net.upscale(x, tile=3).image, net(x), atol=1e-9)


def test_a_picture_below_the_neighbourhood_is_mirrored_to_it():
    net, x = tiny(), picture(3, 5)
    larger = torch.cat([x, x[..., [1, 0], :]], 2)
    torch.testing.assert_close(net(x), net(larger)[..., :6, :])


def test_reported_flops_are_those_of_the_run():
    net, x = tiny(dtype=torch.float32), picture(9, 7, torch.float32)
    assert net.upscale(x).flops == count_flops(net.upscale, x)


def test_gradients_reach_every_parameter_and_bfloat16_runs():
    net, x = tiny(), picture(7, 8)
    net(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())
    smooth = TCSR(2, 8, 1, 5, 2, base=True).eval()
    exact, rough = smooth.upscale(x.float()).image, smooth.bfloat16().upscale(x.float()).image
    assert rough.dtype == torch.bfloat16
    assert (rough - exact).abs().mean() < 0.03 * exact.abs().mean()


def test_saving_and_loading_gives_the_same_network(tmp_path):
    net, x = tiny(3, torch.float32), picture(5, 6, torch.float32)
    net.save_pretrained(tmp_path)
    assert torch.equal(TCSR.from_pretrained(tmp_path)(x), net(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 0}, "1 or more"),
        ({"channels": 10, "heads": 2}, "divisible by 4, got 10"),
        ({"kernel_size": 4}, "odd, got 4"),
        ({"channels": 8, "heads": 3}, "3 heads do not divide 8"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        TCSR(**arguments)


def test_a_budget_is_refused_with_the_cheaper_method():
    with pytest.raises(BudgetError, match="for less, use method 'espcn'"):
        tiny().upscale(picture(5, 5), 0.5)
