import pytest
import torch
import torch.nn.functional as F
from torch import nn

from foveate.errors import InputError
from foveate.layers.fold import fuse
from foveate.layers.varying_conv import FrozenTVConv, TVConv, TVConvNorm, replace_depthwise
from foveate.meter import count_flops, count_parameters


def learned(layer):
    """A layer whose maps and norms are no longer as they began."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return layer


@pytest.mark.parametrize(("stride", "size"), [(1, (7, 9)), (2, (4, 5))])
@pytest.mark.parametrize("bias", [False, True])
def test_frozen_it_gives_the_same(stride, size, bias):
    layer, x = learned(TVConv(6, size, stride=stride, bias=bias)), torch.randn(2, 6, 7, 9)
    frozen = layer.folded()
    with torch.no_grad():
        y = layer(x)
        assert y.shape == (2, 6, *size)
        assert torch.equal(frozen(x), y)
    assert not list(frozen.parameters())
    assert frozen.weight.numel() == 9 * 6 * size[0] * size[1]


@pytest.mark.parametrize("stride", [1, 2])
def test_kernels_alike_everywhere_are_a_depthwise_convolution(stride):
    kernel, x = torch.randn(5, 1, 3, 3), torch.randn(2, 5, 8, 6)
    weight = kernel.view(1, 5, 9, 1, 1).expand(-1, -1, -1, 8 // stride, 6 // stride)
    y = FrozenTVConv(weight, None, 3, stride)(x)
    torch.testing.assert_close(y, F.conv2d(x, kernel, stride=stride, padding=1, groups=5), atol=2e-6, rtol=1e-5)


def test_it_is_linear_in_the_picture_and_the_same_for_all_pictures():
    layer = learned(TVConv(4, (6, 6)))
    x, y = torch.randn(2, 1, 4, 6, 6)
    with torch.no_grad():
        together = layer(torch.cat((x, y)))
        assert torch.equal(together, torch.cat((layer(x), layer(y))))
        torch.testing.assert_close(layer(2 * x - 3 * y), 2 * layer(x) - 3 * layer(y), atol=1e-4, rtol=1e-4)


def test_a_fresh_layer_varies_at_the_border_alone_and_a_learned_one_everywhere():
    torch.manual_seed(0)
    layer = TVConv(2, (16, 16), layers=1)
    with torch.no_grad():
        inner = layer.weight()[..., 3:-3, 3:-3]
        torch.testing.assert_close(inner, inner[..., :1, :1].expand_as(inner), atol=1e-5, rtol=1e-4)
        assert not torch.allclose(layer.weight()[..., :1, :1], inner[..., :1, :1], atol=1e-3)
        inner = learned(layer).weight()[..., 3:-3, 3:-3]
        assert not torch.allclose(inner, inner[..., :1, :1].expand_as(inner), atol=1e-2)


def test_a_frozen_layer_multiplies_as_often_as_a_depthwise_convolution():
    frozen, x = TVConv(6, (8, 8)).folded(), torch.randn(1, 6, 8, 8)
    depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
    assert count_flops(frozen, x) == count_flops(depthwise, x) == 2 * 9 * 6 * 64
    assert frozen.weight.numel() == count_parameters(depthwise) * 64


def test_a_norm_folds_into_the_kernels():
    torch.manual_seed(0)
    layer = TVConvNorm(4, (5, 6), stride=2, bias=True)
    learned(layer)
    for _ in range(3):
        layer.train()(torch.randn(4, 4, 9, 12))
    x = torch.randn(2, 4, 9, 12)
    with torch.no_grad():
        expected = layer.eval()(x)
        torch.testing.assert_close(layer.folded()(x), expected, atol=1e-5, rtol=1e-5)
        with pytest.raises(InputError, match=r"after .eval\(\)"):
            layer.train().folded()


def test_kernels_for_another_size_are_asked_for():
    frozen = learned(TVConv(3, (6, 6), bias=True)).folded()
    with pytest.raises(InputError, match=r"6 x 6 places at stride 1, got \(1, 3, 7, 6\); see FrozenTVConv.resized"):
        frozen(torch.randn(1, 3, 7, 6))
    larger = frozen.resized((9, 12))
    assert larger(torch.randn(1, 3, 9, 12)).shape == (1, 3, 9, 12)
    assert torch.equal(frozen.resized((6, 6)).weight, frozen.weight)


def test_it_stands_for_a_networks_depthwise_convolutions_and_leaves_without_a_trace():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),  # has a bias, which stays
        nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False),
    )
    x = torch.randn(2, 3, 10, 9)
    expected = model.eval()(x)
    model.train()
    handle = replace_depthwise(model, x, maps=2, hidden=4)
    assert [type(m).__name__ for m in model] == ["Conv2d", "TVConv", "BatchNorm2d", "Conv2d", "TVConv"]
    assert model.training
    assert (model[1].size, model[1].stride, model[4].kernel_size) == ((5, 5), 2, 5)
    assert model(x).shape == expected.shape
    assert model[2].num_batches_tracked == 1  # the look at sizes taught the norm nothing
    handle.remove()
    assert torch.equal(nn.Sequential(*model).eval()[1].weight, model[1].weight)
    replace_depthwise(model, x)
    before = model.eval()(x)
    fuse(model)
    assert isinstance(model[1], FrozenTVConv)
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: TVConv(4, (6, 6), kernel_size=4), "odd, got 4"),
        (lambda: TVConv(4, (6, 6))(torch.randn(1, 3, 6, 6)), r"\[B, 4, H, W\]"),
        (lambda: replace_depthwise(nn.Sequential(nn.Conv2d(3, 3, 3)), torch.randn(1, 3, 6, 6)), "no depth-wise"),
    ],
)
def test_what_does_not_fit_is_refused(call, says):
    with pytest.raises(InputError, match=says):
        call()
