import pytest
import torch
import torch.nn.functional as F

from foveate.layers.residual import ResidualBlock, add_, relu_


def test_sum_and_relu_work_in_place_only_where_no_gradient_is_asked_for():
    x, y = torch.randn(5), torch.randn(5)
    before = x.clone()
    assert torch.equal(add_(x, y), before + y)
    assert torch.equal(relu_(x), before.relu())
    assert torch.equal(x, before)
    with torch.no_grad():
        assert relu_(x) is x
        assert torch.equal(x, before.relu())
        assert add_(x, y) is x
        assert torch.equal(x, before.relu() + y)


@pytest.mark.parametrize("res_scale", [1.0, 0.1])
def test_the_block_is_its_definition_and_leaves_its_input_alone(res_scale):
    torch.manual_seed(0)
    block, x = ResidualBlock(4, res_scale).double(), torch.randn(2, 4, 5, 6, dtype=torch.float64)
    first, last = block.body[0], block.body[2]
    hidden = F.conv2d(x, first.weight, first.bias, padding=1).relu()
    expected = x + res_scale * F.conv2d(hidden, last.weight, last.bias, padding=1)
    before = x.clone()
    torch.testing.assert_close(block(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected)
    assert torch.equal(x, before)


def test_a_block_of_64_channels_has_the_published_73_856_parameters():
    assert sum(p.numel() for p in ResidualBlock(64).parameters()) == 73_856


def test_gradients_reach_input_and_every_parameter():
    torch.manual_seed(0)
    block, x = ResidualBlock(4), torch.randn(1, 4, 5, 5, requires_grad=True)
    block(x).square().sum().backward()
    assert all(t.grad is not None and t.grad.any() for t in (x, *block.parameters()))
