import pytest
import torch
from torch import nn

from foveate.errors import InputError, WeightsError
from foveate.layers.checkpoint import Checkpoint
from foveate.layers.map_norm import MapNorm
from foveate.layers.subpixel import subpixel_steps

STATE = {"0.weight": torch.ones(2, 3), "0.bias": torch.zeros(2), "10.mask": torch.ones(1)}


@pytest.mark.parametrize("wrapper", [None, "params", "params_ema"])
def test_sizes_and_numbers_are_read_off(wrapper):
    found = Checkpoint({wrapper: STATE} if wrapper else STATE, "Net")
    assert found.size("0.weight") == (2, 3)
    assert found.count("") == 11
    assert found.count("layers.") == 0
    with pytest.raises(WeightsError, match=r"no Net checkpoint: 1\.weight is missing; there is 0\.bias, 0\.weight"):
        found.size("1.weight")


def test_a_network_is_filled_and_evaluates():
    net = Checkpoint(STATE, "Net").into(nn.Sequential(nn.Linear(3, 2)), skip=("mask",))
    assert not net.training
    assert net(torch.ones(1, 3)).tolist() == [[3, 3]]
    with pytest.raises(WeightsError, match=r"does not fit Net(?s:.)*10\.mask"):
        Checkpoint(STATE, "Net").into(nn.Sequential(nn.Linear(3, 2)))


def test_map_norm_is_layer_norm_of_each_place():
    x, norm = torch.randn(2, 5, 3, 4), MapNorm(5, eps=1e-3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    apart = x - x.mean(1, keepdim=True)
    expected = apart / (apart.square().mean(1, keepdim=True) + 1e-3).sqrt()
    expected = expected * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize(("scale", "parameters"), [(1, 0), (2, 592), (3, 1332), (4, 1184), (8, 1776)])
def test_steps_enlarge(scale, parameters):
    steps = nn.Sequential(*subpixel_steps(4, scale))
    assert steps(torch.rand(1, 4, 3, 5)).shape == (1, 4, 3 * scale, 5 * scale)
    assert sum(p.numel() for p in steps.parameters()) == parameters


@pytest.mark.parametrize("scale", [0, 5, 6])
def test_other_scales_are_refused(scale):
    with pytest.raises(InputError, match=f"or by 3; got {scale}"):
        subpixel_steps(4, scale)
