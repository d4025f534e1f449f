import json

import pytest
import torch

from foveate.encode.fftnet import SIZES, FFTNet, SpectralMixer, haar_gelu
from foveate.errors import InputError
from foveate.meter import by_module, count_flops, count_parameters
from foveate.ops.spectral import modrelu

WAYS = [
    {},
    {"adaptive": False},
    {"modulation": "affine"},
    {"modulation": "affine", "adaptive": False},
    {"local": "haar"},
    {"modulation": "affine", "local": "haar"},
]


def mixer(tokens=9, dim=6, heads=3, **settings):
    """A layer with every parameter away from its start."""
    torch.manual_seed(0)
    layer = SpectralMixer(dim, tokens, heads, **settings).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return layer.eval()


def tokens(n=9, dim=6, batch=2, seed=0):
    return torch.randn(batch, n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def small(**settings):
    torch.manual_seed(0)
    given = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    return FFTNet(**(given | settings)).eval()


def picture(height=32, width=32, batch=2):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------- the mixer


@pytest.mark.parametrize("n", [8, 9])
def test_the_mixer_is_the_papers_equations(n):
    layer, x = mixer(n), tokens(n)
    mlp, norm = layer.adaptive_mlp, layer.norm
    expected = torch.empty_like(x)
    for i, one in enumerate(x):
        hidden = torch.nn.functional.gelu(mlp[0].weight @ one.mean(0) + mlp[0].bias)
        bent = (mlp[2].weight @ hidden + mlp[2].bias).view(3, n // 2 + 1)
        for c in range(6):
            h = c // 2
            u = torch.fft.rfft(one[:, c], norm="ortho") * (layer.base_filter[h, :, 0] + bent[h])
            z = u * torch.relu(u.abs() + layer.modrelu_bias[h, :, 0]) / (u.abs() + 1e-6)
            expected[i, :, c] = torch.fft.irfft(z, n=n, norm="ortho")
    plain = mixer(n, residual=False)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("norm")})
    torch.testing.assert_close(plain(x), expected)
    after = torch.nn.functional.layer_norm(x + expected, (6,), norm.weight, norm.bias)
    torch.testing.assert_close(layer(x), after)


@pytest.mark.parametrize("adaptive", [True, False])
def test_the_later_revision_has_its_norm_first_and_one_residual(adaptive):
    layer, x = mixer(modulation="affine", adaptive=adaptive), tokens()
    y = torch.nn.functional.layer_norm(x, (6,), layer.norm.weight, layer.norm.bias)
    scale, offset = torch.zeros(2, 2, 3, 5, dtype=torch.float64)
    if adaptive:
        scale, offset = layer.adaptive_mlp(y.mean(1)).view(2, 3, 5, 2).unbind(-1)
    gain = layer.base_filter[None, ..., 0] * (1 + scale)
    shifted = layer.base_bias[None, ..., 0] + offset
    spectrum = torch.fft.rfft(y, dim=1, norm="ortho").view(2, 5, 3, 2)
    u = spectrum * gain.mT[..., None] + shifted.mT[..., None]
    z = u * torch.nn.functional.gelu(u.abs()) / (u.abs() + 1e-6)
    torch.testing.assert_close(layer(x), x + torch.fft.irfft(z.flatten(2), n=9, dim=1, norm="ortho"))


def test_a_new_layer_starts_as_published():
    layer, later = SpectralMixer(8, 16, 2), SpectralMixer(8, 16, 2, modulation="affine", local="haar")
    assert torch.equal(layer.base_filter, torch.ones(2, 9, 1))
    assert torch.equal(layer.modrelu_bias, torch.zeros(2, 9, 1))
    assert torch.equal(later.base_bias, torch.full((2, 9, 1), -0.1))
    assert later.blend.sigmoid().item() == 0.5
    names = set(layer.state_dict())
    assert names == {"base_filter", "modrelu_bias", "norm.weight", "norm.bias"} | {
        f"adaptive_mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("modulation", ["modrelu", "affine"])
def test_only_an_adaptive_filter_depends_on_the_mean_token(modulation):
    first, second = tokens(seed=1)[:, 0], tokens(seed=2)[:, 0]
    bent, fixed = (mixer(modulation=modulation, adaptive=adaptive) for adaptive in (True, False))
    assert (bent.filters(first)[0] - bent.filters(second)[0]).abs().max() > 0.01
    assert torch.equal(fixed.filters(first)[0], fixed.filters(second)[0])
    assert fixed.adaptive_mlp is None


@pytest.mark.parametrize("adaptive", [True, False])
def test_a_circular_shift_of_the_tokens_shifts_the_result(adaptive):
    layer, x = mixer(adaptive=adaptive), tokens()
    torch.testing.assert_close(layer(x.roll(4, 1)), layer(x).roll(4, 1), atol=1e-8, rtol=1e-8)


def test_the_later_revisions_offset_marks_the_first_token():
    layer, x = mixer(modulation="affine", adaptive=False), tokens()
    assert (layer(x.roll(4, 1)) - layer(x).roll(4, 1)).abs().max() > 0.01
    torch.nn.init.zeros_(layer.base_bias)
    torch.testing.assert_close(layer(x.roll(4, 1)), layer(x).roll(4, 1), atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("settings", WAYS)
def test_every_token_reaches_every_other(settings):
    layer, x = mixer(residual=False, **settings), tokens(batch=1).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x)[0, 3].sum(), x)
    assert (gradient.abs().sum(2) > 1e-9).all()


@pytest.mark.parametrize("settings", WAYS)
@pytest.mark.parametrize("residual", [True, False])
def test_gradients_reach_every_parameter_of_the_layer(settings, residual):
    layer = mixer(residual=residual, **settings)
    (layer(tokens()) * torch.linspace(0, 1, 6)).sum().backward()
    assert [n for n, p in layer.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_dropout_falls_on_what_is_added_only():
    layer, x = mixer(dropout=1.0, residual=False), tokens()
    assert not layer.train()(x).any()
    whole = mixer(dropout=1.0).train()
    torch.testing.assert_close(whole(x), whole.norm(x))


@pytest.mark.parametrize("n", [1, 6, 7])
def test_the_haar_branch_is_gelu_of_averages_and_differences(n):
    x, gelu = tokens(n), torch.nn.functional.gelu
    y = haar_gelu(x)
    for i in range(0, n - 1, 2):
        a, d = gelu((x[:, i] + x[:, i + 1]) / 2), gelu((x[:, i] - x[:, i + 1]) / 2)
        torch.testing.assert_close(y[:, i], a + d)
        torch.testing.assert_close(y[:, i + 1], a - d)
    if n % 2:
        torch.testing.assert_close(y[:, -1], gelu(x[:, -1]))


def test_the_local_branch_is_blended_in():
    layer, x = mixer(local="haar", residual=False), tokens()
    torch.nn.init.constant_(layer.blend, -40)
    torch.testing.assert_close(layer(x), haar_gelu(x))
    torch.nn.init.constant_(layer.blend, 40)
    state = {k: v for k, v in layer.state_dict().items() if k != "blend"}
    plain = mixer(residual=False)
    plain.load_state_dict(state)
    torch.testing.assert_close(layer(x), plain(x))


def test_a_flexible_layer_reads_its_filter_at_other_frequencies():
    layer, x = mixer(16, adaptive=False, flexible=True, residual=False), tokens(32)
    torch.nn.init.zeros_(layer.modrelu_bias)
    with torch.no_grad():
        layer.base_filter[:] = (torch.arange(9) < 4)[None, :, None]  # below a quarter of the sampling rate
    spectrum = torch.fft.rfft(layer(x), dim=1)
    assert spectrum[:, 8:].abs().max() < 1e-9
    torch.testing.assert_close(spectrum[:, :7], torch.fft.rfft(x, dim=1)[:, :7], atol=1e-5, rtol=1e-5)


def test_silence_is_mixed_into_silence_with_finite_gradients():
    layer, x = mixer(residual=False), torch.zeros(1, 9, 6, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert not y.any()
    y.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert not modrelu(torch.zeros(3, dtype=torch.complex64), torch.tensor(0.5)).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 10, "tokens": 4, "heads": 3}, "multiple of heads.*dim=10, heads=3"),
        ({"dim": 10, "tokens": 0, "heads": 5}, "tokens=0"),
        ({"dim": 4, "tokens": 4, "heads": 2, "modulation": "cubic"}, "'cubic'; use 'modrelu' or 'affine'"),
        ({"dim": 4, "tokens": 4, "heads": 2, "local": "db2"}, "'db2'; use None or 'haar'"),
    ],
)
def test_settings_out_of_range_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        SpectralMixer(**arguments)


def test_other_lengths_masks_and_causal_use_are_refused():
    layer = mixer()
    with pytest.raises(InputError, match=r"made for 9 tokens, got 10; pass flexible=True"):
        layer(tokens(10))
    with pytest.raises(InputError, match="no mask and cannot be causal"):
        layer(tokens(), attn_mask=torch.ones(9, 9))
    with pytest.raises(InputError, match="no mask and cannot be causal"):
        layer(tokens(), is_causal=True)
    with pytest.raises(InputError, match=r"tokens \[B, N, D\]"):
        layer(tokens()[0])


# ---------------------------------------------------------------------- the network


@pytest.mark.parametrize(("size", "total"), [("base", 76_297_720), ("large", 267_797_864), ("huge", 539_822_824)])
def test_published_sizes_have_their_parameters(size, total):
    with torch.device("meta"):
        net = FFTNet(size)
    dim, depth, heads = SIZES[size].values()
    curves = heads * 99
    layer = 2 * curves + dim * dim + dim + (dim + 1) * curves + 2 * dim + 8 * dim * dim + 5 * dim + 2 * dim
    stem = 3 * 256 * dim + dim + 197 * dim + dim
    assert count_parameters(net) == depth * layer + stem + 2 * dim + 1000 * (dim + 1) == total


def test_base_spends_the_published_flops():
    with torch.device("meta"):
        net = FFTNet().eval()
    spent = by_module(net, torch.zeros(1, 3, 224, 224, device="meta"))
    assert spent[""] / 1e9 == pytest.approx(22.6, abs=0.05)
    assert spent["blocks.0.attention"] < 0.01 * spent["blocks.0.mlp"]


@pytest.mark.parametrize("settings", [*WAYS, {"class_token": False}])
def test_gradients_reach_every_parameter_of_the_network(settings):
    net = small(**settings).train()
    (net(picture()) * torch.linspace(0, 1, 5)).sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_it_has_the_habits_of_timm():
    net, x = small(), picture()
    features = net.forward_features(x)
    assert features.shape == (2, 17, 24)
    assert torch.equal(net.forward_head(features, pre_logits=True), features[:, 0])
    assert torch.equal(net.forward_head(features), net(x))
    assert net.get_classifier() is net.head
    mean = small(class_token=False)
    features = mean.forward_features(x)
    assert features.shape == (2, 16, 24)
    torch.testing.assert_close(mean.forward_head(features, pre_logits=True), features.mean(1))


def test_pictures_of_any_size_pass_a_dynamic_network():
    net, x = small(dynamic_img_size=True), picture()
    fixed = small()
    assert torch.equal(net(x), fixed(x))
    assert net.forward_features(picture(41, 59)).shape == (2, 6 * 8 + 1, 24)
    assert torch.isfinite(net(picture(1, 1))).all()
    with pytest.raises(InputError, match=r"made for pictures of \(32, 32\), got \(41, 59\).*dynamic_img_size=True"):
        fixed(picture(41, 59))


def test_sides_that_patches_do_not_divide_are_padded_with_zeros():
    net, x = small(img_size=(30, 27)), picture(30, 27)
    padded = small(img_size=(32, 32))
    padded.load_state_dict(net.state_dict())
    torch.testing.assert_close(net(x), padded(torch.nn.functional.pad(x, (0, 5, 0, 2))))


def test_flops_grow_a_little_faster_than_the_number_of_tokens():
    def spent(n):
        return count_flops(SpectralMixer(64, n, 4).to("meta"), torch.zeros(1, n, 64, device="meta"))

    assert 2 < spent(8192) / spent(4096) < 2.2
    assert 2 < spent(512) / spent(256) < 2.3


def test_saved_with_a_new_head_it_comes_back(tmp_path):
    net, x = small(img_size=(32, 40)), picture(32, 40)
    net.reset_classifier(3)
    net.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_classes"] == 3
    again = FFTNet.from_pretrained(tmp_path).eval()
    assert torch.equal(again(x), net(x))
    assert again(x).shape == (2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "giant"}, "'giant'; use one of 'base', 'large', 'huge'"),
        ({"embed_dim": 25}, "dim=25, heads=3"),
        ({"img_size": 0}, "at least 1, got 0 and 8"),
        ({"num_classes": -1}, "got -1"),
    ],
)
def test_networks_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        small(**arguments)
