import pytest
import torch
import torch.nn.functional as F
from torch import nn

from foveate.errors import InputError
from foveate.layers.fold import ConvNorm
from foveate.layers.resnet import BasicBlock, ResNet
from foveate.meter import count_flops, count_parameters


@pytest.mark.parametrize(
    ("blocks", "millions", "mmacs"),
    [(3, 0.27, 41), (5, 0.46, 69), (9, 0.85, 126)],  # ResNet-20, -32 and -56 of the paper
)
def test_published_sizes(blocks, millions, mmacs):
    net = ResNet(depths=(blocks,) * 3).eval()
    assert count_parameters(net) / 1e6 == pytest.approx(millions, abs=0.01)
    assert count_flops(net, torch.zeros(1, 3, 32, 32)) / 2e6 == pytest.approx(mmacs, abs=0.5)


def test_a_block_is_what_the_equation_says():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 6)
    plain, strided = BasicBlock(4, 4).eval(), BasicBlock(4, 6, 2).eval()
    with torch.no_grad():
        for block, stride in ((plain, 1), (strided, 2)):
            first, second = block.body[0], block.body[2]
            inner = F.relu(F.conv2d(x, first.c.weight, stride=stride, padding=1) / (1 + 1e-5) ** 0.5)
            branch = F.conv2d(inner, second.c.weight, padding=1) / (1 + 1e-5) ** 0.5
            other = x if stride == 1 else F.conv2d(x, block.shortcut.c.weight, stride=2) / (1 + 1e-5) ** 0.5
            torch.testing.assert_close(block(x.clone()), F.relu(branch + other))
        assert torch.equal(BasicBlock(4, 4, gamma=0.0).eval()(x), F.relu(x))


def test_folding_changes_nothing():
    torch.manual_seed(0)
    net, x = ResNet(widths=(8, 12), depths=(1, 2)), torch.rand(2, 3, 17, 20)
    with torch.no_grad():
        for _ in range(3):
            net.train()(torch.rand(4, 3, 16, 16))
        expected = net.eval()(x)
        torch.testing.assert_close(net.fuse()(x), expected, atol=1e-5, rtol=1e-4)
    assert not [m for m in net.modules() if isinstance(m, ConvNorm | nn.BatchNorm2d)]
    assert net.forward_features(x).shape == (2, 12, 9, 10)


def test_gradients_reach_every_parameter():
    net = ResNet(widths=(8, 12), depths=(1, 1), stride=2)
    (net(torch.rand(4, 3, 16, 16)) * torch.rand(4, 10)).sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("settings", [{"widths": (8,)}, {"widths": (), "depths": ()}, {"stride": 0}])
def test_settings_that_do_not_fit(settings):
    with pytest.raises(InputError, match="at least 1"):
        ResNet(**settings)
