"""The transformation network: its sizes, its two geometries, official weights, and tiles without seams."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.engine.tiles import stream
from foveate.errors import InputError, WeightsError
from foveate.learn.image_transform import Conv, InstanceNorm, TransformNet
from foveate.meter import count_parameters


def network(**settings):
    torch.manual_seed(0)
    return TransformNet(**{"widths": (4, 6, 8), "blocks": 2, **settings}).eval()


def test_it_has_the_parameters_of_the_published_network_in_both_geometries():
    with torch.device("meta"):
        for valid in (False, True):
            assert count_parameters(TransformNet(valid=valid)) == 1_679_235
        # Super-resolution x4: 9x9 to 64, four blocks, two doublings, 9x9 to RGB, batch norms.
        conv = lambda i, o, k: i * o * k * k + o  # noqa: E731
        expected = conv(3, 64, 9) + 128 + 4 * 2 * (conv(64, 64, 3) + 128) + 2 * (conv(64, 64, 3) + 128) + conv(64, 3, 9)
        assert count_parameters(TransformNet((64,), 4, scale=4, norm="batch")) == expected


@settings(deadline=None, max_examples=25)
@given(st.integers(5, 40), st.integers(5, 40))
def test_every_size_is_kept(height, width):
    with torch.no_grad():
        assert network(blocks=1)(torch.rand(1, 3, height, width)).shape == (1, 3, height, width)


@pytest.mark.parametrize(("height", "width"), [(48, 64), (50, 61)])
def test_the_papers_geometry_keeps_sizes_too(height, width):
    net = network(blocks=5, valid=True)
    shapes = {}
    for name in ("conv1", "conv3", "res5", "deconv2"):
        net.get_submodule(name).register_forward_hook(lambda m, i, out, n=name: shapes.update({n: out.shape[2:]}))
    with torch.no_grad():
        assert net(torch.rand(1, 3, height, width)).shape == (1, 3, height, width)
    assert shapes["conv1"] == (height + 80, width + 80)
    assert shapes["conv3"] == (-(-height // 4) + 20, -(-width // 4) + 20)
    assert shapes["res5"] == (-(-height // 4), -(-width // 4))


def test_enlarging_networks_enlarge():
    for scale in (2, 4, 8):
        net = network(widths=(4,), scale=scale, norm="batch")
        with torch.no_grad():
            assert net(torch.rand(1, 3, 6, 7)).shape == (1, 3, 6 * scale, 7 * scale)


def test_the_output_is_bounded_as_the_paper_bounds_it():
    net = network()
    net.deconv3.conv2d.weight.data.mul_(1e4)
    with torch.no_grad():
        y = net(torch.rand(1, 3, 16, 16))
    assert float(y.max()) == pytest.approx(0.5 + 150 / 255, abs=1e-4)
    assert float(y.min()) == pytest.approx(0.5 - 150 / 255, abs=1e-4)


def test_a_residual_network_begins_at_the_picture():
    net, x = network(bound="none", residual=True), torch.rand(1, 3, 16, 16)
    plain = network(bound="none")
    plain.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert float((net(x) - x).abs().mean()) < 0.1
        torch.testing.assert_close(net(x), x + plain(x))


def test_gradients_reach_every_parameter():
    net = network().train()
    net(torch.rand(2, 3, 24, 24)).square().mean().backward()
    for name, p in net.named_parameters():
        # The bias before an instance norm is taken out by its mean.
        assert p.grad is not None, name
        assert name.endswith("bias") or float(p.grad.abs().max()) > 0, name


def test_nearest_doubling_leaves_no_checkerboard():
    conv = Conv(3, 4, 3, 1 / 2)
    with torch.no_grad():
        y = conv(torch.full((1, 3, 6, 6), 0.3))
    torch.testing.assert_close(y, y[..., :1, :1].expand_as(y))


def official(net):
    """A state dict as PyTorch's example saved it, running statistics of its first version included."""
    state = {k: v.clone() for k, v in net.state_dict().items()}
    for i in range(1, 4):
        state[f"in{i}.running_mean"], state[f"in{i}.running_var"] = torch.zeros(1), torch.ones(1)
    return state


def test_official_weights_load_by_their_names():
    net = network(bound="bytes")
    names = set(official(net))
    assert {
        "conv1.conv2d.weight",
        "in5.bias",
        "res2.conv1.conv2d.weight",
        "res1.in2.weight",
        "deconv3.conv2d.bias",
    } <= names
    found = TransformNet.load_official(official(net))
    x = torch.rand(1, 3, 20, 24)
    with torch.no_grad():
        assert torch.equal(found(x), net(x))
        # In and out are 0..255: the first convolution sees bytes, the last one gives them.
        seen = []
        found.conv1.register_forward_pre_hook(lambda m, given: seen.append(given[0]))
        last = []
        found.deconv3.register_forward_hook(lambda m, given, out: last.append(out))
        y = found(x)
    torch.testing.assert_close(seen[0], 255 * x)
    torch.testing.assert_close(last[0] / 255, y)
    with pytest.raises(WeightsError):
        TransformNet.load_official({"a": torch.zeros(1)})
    with pytest.raises(WeightsError, match="deconv3"):
        TransformNet.load_official({k: v for k, v in official(net).items() if "deconv3" not in k})


@settings(deadline=None, max_examples=12)
@given(st.integers(50, 80), st.integers(50, 80), st.sampled_from([24, 52]))
def test_tiles_fit_together_without_a_seam(height, width, tile):
    net = network()
    x = torch.rand(1, 3, height, width)
    with torch.no_grad():
        whole, out = net(x), torch.full_like(x, float("nan"))

        def write(y, band):
            out[..., y : y + band.shape[2], :] = band

        with net.normed_as(x):
            stream(lambda x0, y0, x1, y1: x[..., y0:y1, x0:x1], net, write, height, width, tile, net.halo)
        torch.testing.assert_close(out, whole, atol=2e-5, rtol=0)


def test_a_halo_too_small_shows():
    """The reach that `halo` promises is needed: with half of it, windows differ."""
    net, x = network(), torch.rand(1, 3, 112, 112)

    def error(margin):
        inner = (..., slice(16 + margin, 96 - margin), slice(16 + margin, 96 - margin))
        return float((part - whole)[inner].abs().max())

    with torch.no_grad(), net.normed_as(x):
        whole, part = net(x), torch.zeros_like(x)
        part[..., 16:96, 16:96] = net(x[..., 16:96, 16:96])
    assert error(net.halo) < 2e-5
    assert error(net.halo // 2) > 1e-4


def test_statistics_are_forgotten_afterwards():
    net, x, y = network(), torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16) ** 3
    with torch.no_grad():
        before = net(y)
        with net.normed_as(x):
            assert not torch.allclose(net(y), before)
        assert torch.equal(net(y), before)
        with pytest.raises(RuntimeError), net.normed_as(x):
            raise RuntimeError
        assert torch.equal(net(y), before)


def test_kept_statistics_are_those_of_all_windows_together():
    norm, x = InstanceNorm(3), torch.randn(4, 3, 6, 6)
    norm.measuring = True
    norm(x)
    mean, variance = norm.kept
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(variance, x.var((0, 2, 3), correction=0))
    norm.measuring = False
    expected = (x - mean.view(3, 1, 1)) / (variance.view(3, 1, 1) + norm.eps).sqrt()
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: TransformNet(()), r"widths=\(\)"),
        (lambda: TransformNet((4, 8), scale=2), "scale=2"),
        (lambda: TransformNet((4,), scale=3), "scale=3"),
        (lambda: TransformNet(norm="layer"), "norm='layer'"),
        (lambda: TransformNet(bound="sigmoid"), "bound='sigmoid'"),
        (lambda: TransformNet(residual=True), "bound='tanh'"),
        (lambda: network()(torch.rand(3, 16, 16)), r"\[B, 3, H, W\]"),
        (lambda: network()(torch.rand(1, 3, 4, 16)), "5 x 5"),
        (lambda: network(blocks=5, valid=True)(torch.rand(1, 3, 40, 64)), "mirrored by 40"),
    ],
)
def test_what_does_not_fit(call, words):
    with pytest.raises(InputError, match=words):
        call()
