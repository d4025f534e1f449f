import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from foveate.errors import InputError
from foveate.ops.dcnv4 import DCNv4, column_taps, conformance_example, dcnv4, packed_reads


def packed_of(offset, weight, tail=0):
    """Offsets [B, H, W, G, K, 2] and weights [B, H, W, G, K] as DCNv4 packs them, with a tail that means nothing."""
    numbers = torch.cat((offset.flatten(-2), weight), -1).flatten(3)
    return torch.cat((numbers, torch.full((*numbers.shape[:3], tail), 7.0, dtype=numbers.dtype)), -1)


def by_loops(value, packed, groups, kernel, stride, padding, dilation, scale, remove_center):
    """The operator as its equations are written, pixel by pixel."""
    b, height, width, c = value.shape
    d, half = c // groups, dilation * (kernel - 1) // 2
    places = [(i, j) for i in range(kernel) for j in range(kernel)]
    places = [(i, j) for i, j in places if not (remove_center and i == j == kernel // 2)]
    k = len(places)
    out = value.new_zeros(b, *packed.shape[1:3], c)

    def pixel(n, y, x, channels):
        return value[n, y, x, channels] if 0 <= y < height and 0 <= x < width else value.new_zeros(d)

    for n, oy, ox, g in torch.cartesian_prod(*map(torch.arange, (b, *packed.shape[1:3], groups))).tolist():
        numbers, channels = packed[n, oy, ox, 3 * k * g : 3 * k * (g + 1)], slice(g * d, (g + 1) * d)
        for t, (i, j) in enumerate(places):
            x = (half - padding + ox * stride) - half * scale + (i * dilation + numbers[2 * t].item()) * scale
            y = (half - padding + oy * stride) - half * scale + (j * dilation + numbers[2 * t + 1].item()) * scale
            left, top = int(x // 1), int(y // 1)
            for dy in (0, 1):
                for dx in (0, 1):
                    share = (1 - abs(x - left - dx)) * (1 - abs(y - top - dy))
                    out[n, oy, ox, channels] += numbers[2 * k + t] * share * pixel(n, top + dy, left + dx, channels)
    return out


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "scale", "remove_center"),
    [(3, 1, 1, 1, 1.0, False), (3, 1, 1, 1, 0.5, True), (3, 2, 1, 1, 2.0, False), (3, 1, 0, 2, 1.0, False)],
)
def test_it_is_what_the_equations_say(kernel, stride, padding, dilation, scale, remove_center):
    torch.manual_seed(0)
    value = torch.randn(1, 5, 6, 4, dtype=torch.float64)
    rows, columns = ((n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for n in (5, 6))
    k = kernel**2 - remove_center
    packed = packed_of(
        torch.randn(1, rows, columns, 2, k, 2, dtype=torch.float64),
        torch.randn(1, rows, columns, 2, k, dtype=torch.float64),
        tail=2,
    )
    found = dcnv4(
        value, packed, 2, kernel_size=kernel, stride=stride, padding=padding, dilation=dilation, offset_scale=scale,
        remove_center=remove_center,
    )  # fmt: skip
    expected = by_loops(value, packed, 2, kernel, stride, padding, dilation, scale, remove_center)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_constant_weights_are_a_depthwise_convolution_with_transposed_kernels():
    value, kernels = torch.randn(2, 6, 7, 8), torch.randn(2, 3, 3)
    weight = kernels.mT.flatten(1).expand(2, 6, 7, 2, 9)
    y = dcnv4(value, packed_of(torch.zeros(2, 6, 7, 2, 9, 2), weight), 2)
    expected = F.conv2d(
        value.permute(0, 3, 1, 2), kernels.repeat_interleave(4, 0)[:, None], padding=1, groups=8
    ).permute(0, 2, 3, 1)
    torch.testing.assert_close(y, expected, atol=2e-6, rtol=1e-5)


def test_a_scale_of_offsets_is_other_offsets():
    value, offset, weight = torch.randn(1, 5, 5, 4), torch.randn(1, 5, 5, 1, 9, 2), torch.randn(1, 5, 5, 1, 9)
    moved = (0.5 - 1) * torch.tensor(column_taps(3)) + 0.5 * offset
    torch.testing.assert_close(
        dcnv4(value, packed_of(offset, weight), 1, offset_scale=0.5), dcnv4(value, packed_of(moved, weight), 1)
    )


def test_without_its_centre_it_is_the_whole_with_a_centre_of_zero():
    value, offset, weight = torch.randn(1, 5, 5, 4), torch.randn(1, 5, 5, 2, 9, 2), torch.randn(1, 5, 5, 2, 9)
    weight[..., 4] = 0
    rim = [t for t in range(9) if t != 4]
    without = dcnv4(value, packed_of(offset[..., rim, :], weight[..., rim]), 2, remove_center=True)
    torch.testing.assert_close(without, dcnv4(value, packed_of(offset, weight), 2))


def test_softmax_makes_averages_and_dcnv4_need_not():
    value, offset, weight = torch.rand(1, 6, 6, 4), torch.zeros(1, 6, 6, 1, 9, 2), torch.randn(1, 6, 6, 1, 9)
    packed = packed_of(offset, weight)
    inner = (slice(None), slice(1, -1), slice(1, -1))
    averages = dcnv4(value, packed, 1, softmax=True)[inner]
    assert averages.min() >= value.min()
    assert averages.max() <= value.max()
    by_hand = dcnv4(value, packed_of(offset, weight.softmax(-1)), 1)[inner]
    torch.testing.assert_close(averages, by_hand)
    assert dcnv4(value, packed, 1)[inner].min() < 0


def test_a_fresh_module_gives_its_bias():
    module = DCNv4(32, 2, dw_kernel_size=3)
    torch.nn.init.normal_(module.output_proj.bias)
    y = module(torch.randn(2, 5, 6, 32))
    assert torch.equal(y, module.output_proj.bias.expand_as(y))


def test_the_gate_mixes_in_the_pixels_own_value():
    module, x = DCNv4(8, 2, center_feature_scale=True, pointwise=False), torch.randn(1, 4, 5, 8)
    torch.testing.assert_close(module(x), x / 2)  # a fresh gate is one half, and nothing is gathered yet
    torch.nn.init.constant_(module.center_feature_scale_proj_bias, 30.0)
    torch.testing.assert_close(module(x), x)


def test_a_module_without_projections_gathers_its_input():
    module = DCNv4(8, 2, pointwise=False)
    with torch.no_grad():
        module.offset_mask.bias[18:27] = module.offset_mask.bias[45:54] = 1  # weights of both groups, offsets zero
    x = torch.randn(1, 4, 5, 8)
    expected = 9 * F.avg_pool2d(x.permute(0, 3, 1, 2), 3, 1, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)


def test_the_packed_numbers_are_filled_up_to_a_multiple_of_eight():
    assert [DCNv4(16 * g, g).offset_mask.out_features for g in (1, 4, 5, 8)] == [32, 112, 136, 216]
    assert DCNv4(16, 1, remove_center=True).offset_mask.out_features == 24


def test_it_has_the_official_names():
    module = DCNv4(32, 2, dw_kernel_size=3, center_feature_scale=True)
    assert {name.split(".")[0] for name in module.state_dict()} == {
        "offset_mask", "offset_mask_dw", "value_proj", "output_proj",
        "center_feature_scale_proj_weight", "center_feature_scale_proj_bias",
    }  # fmt: skip


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    module = DCNv4(32, 2, dw_kernel_size=3, center_feature_scale=True)
    torch.nn.init.normal_(module.offset_mask.weight, std=0.1)
    torch.nn.init.normal_(module.center_feature_scale_proj_weight)
    (module(torch.randn(1, 5, 6, 32)) * torch.randn(1, 5, 6, 32)).sum().backward()
    assert [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    module, inputs = conformance_example()
    assert gradcheck(module, inputs)


def test_groups_read_once_what_channels_read_sixteen_times():
    channels, groups = packed_reads(128, 8)
    assert channels == 16 * groups


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: DCNv4(10, 4), "4 groups cannot share 10"),
        (lambda: DCNv4(8, 2, kernel_size=2), "kernel_size=2"),
        (lambda: DCNv4(8, 2, dw_kernel_size=4), "dw_kernel_size=4"),
        (lambda: DCNv4(8, 2)(torch.randn(2, 20, 8)), r"\[B, H, W, 8\]"),
        (lambda: dcnv4(torch.randn(1, 4, 4, 8), torch.randn(1, 4, 4, 53), 2), r"\[B, Ho, Wo, 54\]"),
    ],
)
def test_what_does_not_fit_is_refused(call, says):
    with pytest.raises(InputError, match=says):
        call()
