import math

import pytest
import torch
import torch.nn.functional as F

from foveate.errors import BudgetError, InputError, WeightsError
from foveate.layers.shift import EIGHT
from foveate.meter import count_flops
from foveate.restore.scnet import SCNet, SCResBlock, UpShift


def tiny(scale=2, upsampling="mlp", shift=True, dtype=torch.float64, blocks=2):
    """A small network with weights large enough for every path to show."""
    torch.manual_seed(0)
    net = SCNet(scale, 8, blocks, upsampling, shift)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net.to(dtype)


def picture(h, w, dtype=torch.float64):
    return torch.rand(1, 3, h, w, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize(("upsampling", "total"), [("mlp", 154_371), ("ps", 179_331)])
def test_scnet_t_has_the_published_number_of_parameters(upsampling, total):
    assert sum(p.numel() for p in SCNet(4, upsampling=upsampling).parameters()) == total


def test_a_block_of_64_channels_has_8_320_parameters_and_8_192_multiply_accumulates():
    block = SCResBlock(64)
    assert sum(p.numel() for p in block.parameters()) == 8320
    assert count_flops(block, torch.zeros(1, 64, 5, 7)) == 2 * 8192 * 35


def test_the_published_network_spends_360_448_multiply_accumulates_per_pixel_on_square_layers():
    thin = 64 * 3 * (1 + 16)  # first and last convolution
    bilinear = 4 * (64 * (4 + 16) + 3 * 16)  # enlarging the features twice, and the picture
    assert SCNet(4).full_flops(1, 1) / 2 == 360_448 + thin + bilinear


@pytest.mark.parametrize("res_scale", [1.0, 0.5])
def test_the_block_is_its_definition(res_scale):
    torch.manual_seed(0)
    block, x = SCResBlock(16, res_scale).double(), torch.randn(2, 16, 5, 6, dtype=torch.float64)
    kernels = torch.zeros(16, 1, 3, 3, dtype=torch.float64)
    for c in range(16):
        dy, dx = EIGHT[c // 2]
        kernels[c, 0, 1 + dy, 1 + dx] = 1
    mixed = F.conv2d(x, block.conv1.weight, block.conv1.bias)
    shifted = F.conv2d(mixed, kernels, padding=1, groups=16).relu()
    expected = x + res_scale * F.conv2d(shifted, block.conv2.weight, block.conv2.bias)
    before = x.clone()
    torch.testing.assert_close(block(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected)
    assert torch.equal(x, before)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_n_blocks_see_n_pixels_around_and_without_the_shift_just_one(blocks):
    x = torch.rand(1, 8, 9, 9, dtype=torch.float64, requires_grad=True)
    for shift, reach in ((True, blocks), (False, 0)):
        body = tiny(shift=shift, blocks=blocks).body
        for p in body.parameters():
            p.data.abs_()  # then no ReLU stops the gradient
        (gradient,) = torch.autograd.grad(body(x)[..., 4, 4].sum(), x)
        seen = gradient.abs().sum((0, 1)) > 0
        assert torch.equal(seen.nonzero().amin(0), torch.tensor([4 - reach, 4 - reach]))
        assert seen.sum() == (2 * reach + 1) ** 2


@pytest.mark.parametrize("upsampling", ["mlp", "ps"])
@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_with_a_silent_last_layer_the_output_is_bilinear_interpolation(scale, upsampling):
    net, x = tiny(scale, upsampling), picture(4, 5)
    torch.nn.init.zeros_(net.conv_last.weight)
    torch.nn.init.zeros_(net.conv_last.bias)
    expected = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
    torch.testing.assert_close(net(x), expected)
    assert net(x).shape == (1, 3, 4 * scale, 5 * scale)


def test_weights_start_at_a_tenth_of_kaimings_and_biases_at_zero():
    torch.manual_seed(0)
    net = SCNet(4, 64, 2)
    convolutions = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    for c in convolutions:
        expected = 0.1 * math.sqrt(2 / c.in_channels)
        # The sampling error of a standard deviation is sigma / sqrt(2 n); 5 of them are never exceeded.
        tolerance = 5 / math.sqrt(2 * c.weight.numel())
        assert float(c.weight.detach().square().mean().sqrt()) == pytest.approx(expected, rel=tolerance)
        assert not c.bias.any()
    assert len(convolutions) == 1 + 2 * 2 + 2 * 2 + 2


def test_without_the_shift_every_low_resolution_pixel_is_mapped_alone():
    net, x = tiny(upsampling="ps", shift=False), picture(4, 4)
    other = x.clone()
    other[..., 1, 2] += 0.1
    change = net(other) - net(x)
    base = F.interpolate(other - x, scale_factor=2, mode="bilinear")
    touched = (change - base).abs().sum((0, 1)) > 1e-9
    assert touched.nonzero().tolist() == [[y, x] for y in (2, 3) for x in (4, 5)]


@pytest.mark.parametrize("upsampling", ["mlp", "ps"])
@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (19, 23)])
def test_tiles_give_what_the_whole_picture_gives(size, scale, upsampling):
    net, x = tiny(scale, upsampling), picture(*size)
    for tile in (None, 4, 11):
        done = net.upscale(x, tile=tile)
        torch.testing.assert_close(done.image, net(x).detach(), atol=1e-9, rtol=1e-9)


def test_reported_flops_are_those_of_the_run():
    net, x = tiny(4, "ps", dtype=torch.float32), picture(9, 7, torch.float32)
    assert net.upscale(x).flops == count_flops(net.upscale, x)


def test_the_shuffled_unit_works_at_the_small_size():
    x = torch.zeros(1, 8, 6, 7)
    costs = {kind: count_flops(UpShift(8, 2, kind), x) / 2 / 42 for kind in ("mlp", "ps")}
    assert costs == {"mlp": 4 * 2 * 8 * 8 + 4 * 4 * 8, "ps": 8 * 8 + 8 * 32}  # the interpolation has 4 taps


@pytest.mark.parametrize("upsampling", ["mlp", "ps"])
def test_gradients_reach_every_parameter_and_bfloat16_runs(upsampling):
    net, x = tiny(4, upsampling), picture(6, 6)
    net(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())
    image, exact = tiny(4, upsampling, dtype=torch.bfloat16).upscale(x).image, net.upscale(x).image
    assert image.dtype == torch.bfloat16
    assert (image - exact).abs().mean() < 0.03 * exact.abs().mean()


def test_saving_and_loading_gives_the_same_network(tmp_path):
    net, x = tiny(3, "ps", dtype=torch.float32), picture(5, 6, torch.float32)
    net.save_pretrained(tmp_path)
    assert torch.equal(SCNet.from_pretrained(tmp_path)(x), net(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 5}, "2, 3, 4 or 8, got 5"),
        ({"channels": 12}, "divisible by 8, got 12"),
        ({"upsampling": "cubic"}, "'cubic'; use 'mlp' or 'ps'"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        SCNet(**arguments)


def test_a_budget_is_refused_with_the_cheaper_method():
    with pytest.raises(BudgetError, match=r"SCNet x2 .* got 0\.5; for less, use method 'espcn'"):
        tiny().upscale(picture(4, 4), 0.5)


# ---------------------------------------------------------------------- official weights


def official(scale, upsampling, c=16, blocks=3):
    """A made-up checkpoint with the names and shapes of the released ones."""
    torch.manual_seed(0)
    step = 3 if scale == 3 else 2
    first, second = (0, 3) if upsampling == "ps" else (1, 4)
    shapes = {"conv_first": (c, 3), "conv_hr": (c, c), "conv_last": (3, c)}
    shapes |= {f"body.{i}.{name}": (c, c) for i in range(blocks) for name in ("conv1", "conv2")}
    for i in {2: [1], 3: [1], 4: [1, 2], 8: [1, 2, 3]}[scale]:
        shapes[f"upconv{i}.up_layer.{first}"] = (c, c)
        shapes[f"upconv{i}.up_layer.{second}"] = (c * (step**2 if upsampling == "ps" else 1), c)
    weights = {f"{name}.weight": torch.randn(*shape, 1, 1) / 4 for name, shape in shapes.items()}
    return weights | {f"{name}.bias": torch.randn(shape[0]) / 4 for name, shape in shapes.items()}


def by_the_book(state, x, scale, upsampling):
    """The network as its paper draws it, on a state dict."""

    def conv(x, name):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def shift(x):
        kernels = torch.zeros(x.shape[1], 1, 3, 3)
        for c in range(x.shape[1]):
            dy, dx = EIGHT[c * 8 // x.shape[1]]
            kernels[c, 0, 1 + dy, 1 + dx] = 1
        return F.conv2d(x, kernels, padding=1, groups=x.shape[1])

    f = F.leaky_relu(conv(x, "conv_first"), 0.1)
    for i in range(sum(k.endswith("conv1.weight") for k in state)):
        f = f + conv(shift(conv(f, f"body.{i}.conv1")).relu(), f"body.{i}.conv2")
    for i, step in enumerate({2: [2], 3: [3], 4: [2, 2], 8: [2, 2, 2]}[scale]):
        layer = f"upconv{i + 1}.up_layer"
        if upsampling == "ps":
            f = F.pixel_shuffle(conv(shift(F.leaky_relu(conv(f, f"{layer}.0"), 0.02)), f"{layer}.3"), step)
        else:
            f = F.interpolate(f, scale_factor=step, mode="bilinear", align_corners=False)
            f = conv(shift(F.leaky_relu(conv(f, f"{layer}.1"), 0.02)), f"{layer}.4")
        f = F.leaky_relu(f, 0.1)
    base = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
    return conv(F.leaky_relu(conv(f, "conv_hr"), 0.1), "conv_last") + base


@pytest.mark.parametrize("upsampling", ["mlp", "ps"])
@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_an_official_checkpoint_gives_the_published_network(scale, upsampling):
    state, x = official(scale, upsampling), picture(4, 5, torch.float32)
    net = SCNet.load_official({"params": state}, scale)
    assert not net.training
    torch.testing.assert_close(net(x), by_the_book(state, x, scale, upsampling), atol=1e-4, rtol=1e-4)
    assert torch.equal(SCNet.load_official(state, scale)(x), net(x))


@pytest.mark.parametrize("upsampling", ["mlp", "ps"])
def test_a_checkpoint_with_a_key_missing_or_too_many_is_refused(upsampling):
    state = official(4, upsampling)
    for missing in state:
        with pytest.raises(WeightsError):
            SCNet.load_official({k: v for k, v in state.items() if k != missing})
    with pytest.raises(WeightsError, match="conv_more"):
        SCNet.load_official(state | {"conv_more.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match="SCNet x2"):
        SCNet.load_official(state, 2)
    with pytest.raises(WeightsError):
        SCNet.load_official({k: v for k, v in state.items() if not k.startswith("body.")})
    with pytest.raises(WeightsError, match="conv_first"):
        SCNet.load_official({})
