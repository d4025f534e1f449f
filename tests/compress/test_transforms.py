"""Analysis and syntheses: published sizes and costs, linearity, frames, the start at a basis."""

import pytest
import torch
from torch import Tensor, nn

from foveate.compress.hyperprior import hyper_analysis, hyper_synthesis
from foveate.compress.transforms import (
    ELIC,
    SMALL,
    Analysis,
    Deep,
    JpegLike,
    Stage,
    TwoLayer,
    Up,
    down,
    start_at_basis,
)
from foveate.meter import count_flops, count_parameters


@pytest.mark.parametrize(
    ("network", "parameters"),
    [
        (JpegLike(320), 311_043),
        (TwoLayer(320), 1_299_003),
        (Analysis(ELIC, None), 7_337_792),
        (hyper_analysis(320, (320, 320, 320), (3, 5, 5)), 6_042_560),
        (hyper_synthesis(320, (320, 320, 480), (5, 5, 3)), 9_166_240),
    ],
    ids=["JPEG-like", "two-layer", "ELIC", "hyper-analysis", "hyper-synthesis"],
)
def test_published_parameters(network: nn.Module, parameters: int) -> None:
    assert count_parameters(network) == parameters


@pytest.mark.parametrize(
    ("network", "published"),
    [(JpegLike(320), 2433), (TwoLayer(320), 10_677), (Deep(320, 192), 187_585)],
    ids=["JPEG-like", "two-layer", "deep"],
)
def test_published_flops_per_pixel(network: nn.Module, published: int) -> None:
    """The paper also counts biases and products of IGDN, a few per pixel; multiply-accumulates are exactly its."""
    counted = count_flops(network, torch.zeros(1, 320, 4, 4)) / 64**2
    assert counted <= published
    assert counted == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize(("kernel", "stride"), [(13, 8), (5, 2), (18, 16), (4, 2), (3, 1), (1, 1)])
def test_up_and_down_keep_the_frame(kernel: int, stride: int) -> None:
    up = Up(2, 3, kernel, stride)
    assert up(torch.zeros(1, 2, 3, 5)).shape == (1, 3, 3 * stride, 5 * stride)
    assert down(3, 2, kernel, stride)(torch.zeros(1, 3, 3 * stride, 5 * stride)).shape[2:] == (3, 5)


def test_what_overlaps_is_cut_less_at_the_beginning() -> None:
    """TensorFlow's "same": of the 5 samples that a kernel of 13 at stride 8 sticks out, 2 come first."""
    up = Up(1, 1, 13, 8)
    with torch.no_grad():
        up.weight.copy_(torch.arange(169.0).view(1, 1, 13, 13))
        up.bias.zero_()
        out = up(torch.ones(1, 1, 1, 1))
    assert torch.equal(out[0, 0], up.weight[0, 0, 2:10, 2:10])


def test_jpeg_like_is_a_block_transform() -> None:
    synthesis = JpegLike(6, kernel=16)
    with torch.no_grad():
        synthesis.up.bias.zero_()
        y, other = torch.randn(2, 1, 6, 2, 3)
        assert torch.allclose(synthesis(2 * y - 3 * other), 2 * synthesis(y) - 3 * synthesis(other), atol=1e-5)
        blocks = y[0].flatten(1).T @ synthesis.up.weight.flatten(1)  # [6 blocks, 3 * 256]
        expected = blocks.view(2, 3, 3, 16, 16).permute(2, 0, 3, 1, 4).reshape(1, 3, 32, 48)
        assert torch.allclose(synthesis(y), expected, atol=1e-5)
        changed = y.clone()
        changed[..., 1, 2] += 1
        moved = (synthesis(changed) != synthesis(y)).any(1)[0]
    assert moved[16:, 32:].all()
    assert moved.sum() == 256


def test_two_layers_without_the_base_are_linear() -> None:
    synthesis = TwoLayer(4)
    y, other = torch.randn(2, 1, 4, 2, 2)

    def bend() -> Tensor:
        zero = synthesis(torch.zeros_like(y))
        return (synthesis(y) + synthesis(other) - synthesis(y + other) - zero).abs().max()

    with torch.no_grad():
        assert bend() > 1e-4
        synthesis.base.weight.zero_()
        synthesis.base.bias.zero_()
        assert bend() < 1e-5


@pytest.mark.parametrize("kind", [TwoLayer, JpegLike])
def test_a_whole_basis_gives_the_picture_back(kind: type) -> None:
    basis = torch.linalg.qr(torch.randn(768, 768))[0].view(768, 3, 16, 16)
    analysis, synthesis = Analysis((Stage(4, 16, 16, 1, 0),), 768), kind(768)
    start_at_basis(analysis, synthesis, basis, 4.2)
    if isinstance(synthesis, TwoLayer):
        nn.init.zeros_(synthesis.base.weight)
        nn.init.zeros_(synthesis.base.bias)
    x = torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        assert torch.allclose(synthesis(analysis(x)), x, atol=1e-4)


def test_gradients_reach_every_parameter() -> None:
    for network in (Analysis(SMALL, 24), Analysis((Stage(8, 16, 16, 1, 2),), None), Deep(3, 4)):
        x = torch.randn(1, 3, 2, 2) if isinstance(network, Deep) else torch.randn(1, 3, 32, 32)
        network(x).square().sum().backward()
        assert all(p.grad is not None for p in network.parameters())
