"""Decoders in whole numbers: near the float ones, exact in any order, cut anywhere."""

import pytest
import torch
from torch import nn

from foveate.compress.hyperprior import hyper_synthesis
from foveate.compress.transforms import JpegLike, TwoLayer, Up
from foveate.compress.whole import MOST, UNIT, WholeUp, settle, whole_sequence, whole_synthesis
from foveate.errors import WeightsError


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def _latents(channels: int, height: int = 3, width: int = 4) -> torch.Tensor:
    return (4 * UNIT * torch.randn(1, channels, height, width).double()).round()


@pytest.mark.parametrize("network", [TwoLayer(8), JpegLike(8), JpegLike(8, 16)], ids=["two-layer", "18", "16"])
def test_pictures_are_those_of_the_float_network(network: TwoLayer | JpegLike) -> None:
    network.requires_grad_(False)
    y = _latents(8)
    assert torch.allclose(whole_synthesis(network)(y).float(), network((y / UNIT).float()), atol=3e-3)


def test_side_information_is_that_of_the_float_network() -> None:
    network = hyper_synthesis(5, (3, 6, 7)).requires_grad_(False)
    z = _latents(3)
    whole = whole_sequence(network)(z)
    assert torch.equal(whole, whole.round())
    assert torch.allclose((whole / UNIT).float(), network((z / UNIT).float()), atol=3e-3)


def test_the_order_of_summation_does_not_matter() -> None:
    """Latent channels in another order, with their weights, add up in another order, to the same bits."""
    network, order = TwoLayer(40).requires_grad_(False), torch.randperm(40)
    y = _latents(40)
    first = whole_synthesis(network)(y)
    for layer in (network.base, network.skip):
        layer.weight.copy_(layer.weight[order])
    assert torch.equal(whole_synthesis(network)(y[:, order]), first)
    assert torch.equal(first * 2**26, (first * 2**26).round())


def test_a_part_with_one_more_block_on_each_side_is_a_part_of_the_whole() -> None:
    for network in (TwoLayer(4), JpegLike(4)):
        render = whole_synthesis(network.requires_grad_(False))
        y = _latents(4, 6, 7)
        part = render(y[..., 1:5, 2:6])
        assert torch.equal(part[..., 16:-16, 16:-16], render(y)[..., 32:64, 48:80])


def test_activations_are_rounded_to_the_nearest_and_clamped() -> None:
    fine = torch.tensor([0.0, 2.0**13 - 1, 2.0**13, -(2.0**13), -(2.0**13) - 1, 2.0**50]).double()
    assert settle(fine).tolist() == [0, 0, 1, 0, -1, MOST]


def test_weights_that_could_leave_the_exact_range_are_refused() -> None:
    layer = Up(64, 2, 13, 8)
    nn.init.constant_(layer.weight, 4.0)
    with pytest.raises(WeightsError, match="too large"):
        WholeUp(layer)
