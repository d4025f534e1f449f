import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from foveate.encode.lsnet import SIZES, Attention, LSConv, LSNet, RepMixer, SqueezeExcite
from foveate.errors import InputError
from foveate.meter import count_flops, count_parameters
from foveate.ops.gathered import gathered

SMALL = {"widths": (8, 16, 24, 32), "depths": (2, 2, 3, 2), "heads": 2, "key_dim": 4, "img_size": 128}


def seasoned(module, seed=0):
    """The module in eval mode, its norms and biases with values of their own."""
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.running_mean.normal_(generator=dice)
                part.running_var.uniform_(0.5, 2, generator=dice)
            if isinstance(part, nn.modules.batchnorm._BatchNorm | nn.GroupNorm):
                part.weight.uniform_(0.5, 1.5, generator=dice)
                part.bias.normal_(generator=dice)
            if isinstance(part, Attention):
                part.biases.normal_(generator=dice)
    return module.eval()


def small(**settings):
    torch.manual_seed(0)
    return seasoned(LSNet(5, **SMALL | settings))


# ---------------------------------------------------------------------- published figures


@pytest.mark.parametrize(
    ("size", "parameters", "gmacs"),
    # Published are 0.3, 0.5 and 1.3: B's is met with norms counted too, at 4 operations for each of 6.2 M outputs.
    [("t", 11_409_832, 0.316), ("s", 16_146_304, 0.538), ("b", 23_313_608, 1.245)],
)
def test_the_published_sizes(size, parameters, gmacs):
    with torch.device("meta"):
        model = LSNet(**SIZES[size]).eval()
    assert count_parameters(model) == parameters
    assert count_flops(model.to_empty(device="cpu"), torch.zeros(1, 3, 224, 224)) / 2e9 == pytest.approx(
        gmacs, rel=0.005
    )


# ---------------------------------------------------------------------- LS convolution


def aggregate(x, w, k=3):
    return gathered(x, w, kernel_size=k, interleaved=True)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 7), st.integers(1, 7), st.sampled_from([1, 3, 5]))
@settings(deadline=None, max_examples=25)
def test_aggregation_is_what_unfolding_gives(batch, groups, height, width, k):
    x, w = torch.randn(batch, 4 * groups, height, width), torch.randn(batch, groups, k * k, height, width)
    columns = F.unfold(x, k, padding=k // 2).view(batch, 4, groups, k * k, height, width)
    torch.testing.assert_close(aggregate(x, w, k), (columns * w[:, None]).sum(3).flatten(1, 2), atol=1e-5, rtol=1e-5)


def test_constant_kernels_are_a_depth_wise_convolution_with_strided_sharing():
    x, kernels = torch.randn(2, 12, 6, 5), torch.randn(3, 9)
    w = kernels[None, :, :, None, None].expand(2, -1, -1, 6, 5)
    expected = F.conv2d(x, kernels[torch.arange(12) % 3].view(12, 1, 3, 3), padding=1, groups=12)
    torch.testing.assert_close(aggregate(x, w), expected, atol=1e-5, rtol=1e-5)


def test_a_centre_of_one_is_the_identity_bit_for_bit():
    x, w = torch.randn(2, 16, 5, 7), torch.zeros(2, 2, 9, 5, 7)
    w[:, :, 4] = 1
    assert torch.equal(aggregate(x, w), x)


def test_channels_of_one_class_can_change_places_and_others_cannot():
    x, w = torch.randn(1, 12, 6, 6), torch.randn(1, 3, 9, 6, 6)
    order = torch.arange(12)
    within, across = order.clone(), order.clone()
    within[[1, 4, 7]] = torch.tensor([7, 1, 4])
    across[[1, 2]] = torch.tensor([2, 1])
    assert torch.equal(aggregate(x[:, within], w), aggregate(x, w)[:, within])
    assert not torch.allclose(aggregate(x[:, across], w), aggregate(x, w)[:, across])


@pytest.mark.parametrize("large", [3, 7])
def test_kernels_come_from_the_large_window_until_they_are_normalised(large):
    torch.manual_seed(0)
    conv = seasoned(LSConv(16, large))
    x = torch.randn(1, 16, 15, 15)
    changed = x.clone()
    changed[..., 7, 6] += torch.randn(16)
    raw = conv.look[:-1]
    with torch.no_grad():
        moved = (raw(changed) != raw(x)).any(1)[0]
        normalised = (conv.kernels(changed) != conv.kernels(x)).flatten(0, 2).any(0)
    r = large // 2
    window = torch.zeros(15, 15, dtype=torch.bool)
    window[7 - r : 8 + r, 6 - r : 7 + r] = True
    assert torch.equal(moved, window)
    assert normalised.float().mean() > 0.9


def test_each_kernel_is_normalised_over_its_taps_and_the_picture():
    conv = LSConv(16).eval()
    with torch.no_grad():
        w = conv.kernels(torch.randn(3, 16, 6, 7))
    torch.testing.assert_close(w.mean((2, 3, 4)), torch.zeros(3, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(w.var((2, 3, 4), correction=0), torch.ones(3, 2), atol=1e-2, rtol=0)


def test_an_ls_convolution_written_out():
    conv = seasoned(LSConv(16))
    x = torch.randn(2, 16, 6, 5)
    with torch.no_grad():
        w = conv.kernels(x)
        y = torch.zeros_like(x)
        padded = F.pad(x, (1, 1, 1, 1))
        for c in range(16):
            for t in range(9):
                u, v = divmod(t, 3)
                y[:, c] += w[:, c % 2, t] * padded[:, c, u : u + 6, v : v + 5]
        torch.testing.assert_close(conv(x), conv.bn(y) + x, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- attention


def test_the_bias_depends_on_distance_alone():
    attention = Attention(8, 2, 4, resolution=5)
    nn.init.normal_(attention.biases)
    bias = attention.bias(5, 5)
    for a, b in [((0, 0), (3, 4)), ((3, 0), (0, 4)), ((1, 4), (4, 0)), ((2, 2), (2, 2))]:
        down, across = abs(a[0] - b[0]), abs(a[1] - b[1])
        assert torch.equal(bias[:, a[0] * 5 + a[1], b[0] * 5 + b[1]], attention.biases[:, down * 5 + across])


def test_the_bias_of_another_size_keeps_the_ends_of_the_table():
    attention = Attention(8, 2, 4, resolution=3)
    nn.init.normal_(attention.biases)
    bias = attention.bias(5, 7)
    assert bias.shape == (2, 35, 35)
    torch.testing.assert_close(bias[:, 0, 34], attention.biases[:, 8])  # from corner to corner
    torch.testing.assert_close(bias[:, 0, 3], attention.biases[:, 1])  # half the width
    torch.testing.assert_close(bias[:, 0, 1], attention.biases[:, :2] @ torch.tensor([2 / 3, 1 / 3]))  # a sixth of it


def test_attention_written_out():
    attention = seasoned(Attention(8, 2, 3, resolution=4))
    x = torch.randn(2, 8, 4, 4)
    with torch.no_grad():
        q, k, v = attention.qkv(x).split([6, 6, 8], 1)
        q, k, v = (t.reshape(2, 2, -1, 16) for t in (attention.dw(q), k, v))
        logits = torch.einsum("bhcp,bhcq->bhpq", q, k) / 3**0.5 + attention.bias(4, 4)
        y = torch.einsum("bhpq,bhcq->bhcp", logits.softmax(3), v).reshape(2, 8, 4, 4)
        torch.testing.assert_close(attention(x), x + attention.proj(F.relu(y)), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- the network


def test_blocks_begin_as_they_should():
    model = LSNet(5, **SMALL)
    kinds = [[type(block.mixer) for block in stage if hasattr(block, "mixer")] for stage in model.stages]
    assert kinds[0] == [RepMixer, LSConv]
    assert kinds[2] == [RepMixer, LSConv, RepMixer]
    assert kinds[3] == [RepMixer, Attention]
    assert [isinstance(block.se, SqueezeExcite) for block in model.stages[0]] == [True, False]
    x = torch.randn(2, 32, 2, 2)
    last = model.stages[3][-1].eval()
    assert torch.equal(last(x), x)  # attention and feed-forward end in a gamma of zero


@pytest.mark.parametrize("distilled", [False, True])
def test_folded_it_is_the_same(distilled):
    model, x = small(distilled=distilled), torch.rand(2, 3, 97, 128)
    with torch.no_grad():
        expected = model(x)
        fused = model.fuse()
        torch.testing.assert_close(fused(x), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(fused.fuse()(x), expected, atol=1e-4, rtol=1e-4)
    assert fused is model
    left = [name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert left == [name for name, _ in model.named_modules() if name.endswith("mixer.bn")]  # after dynamic kernels
    assert isinstance(model.head, nn.Linear)
    assert all(type(stage[-1].mixer) is not RepMixer for stage in model.stages)


def test_a_classifier_in_timms_words():
    model, x = small(), torch.rand(2, 3, 130, 65)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (2, 32, 3, 2)
        assert [tuple(m.shape[1:]) for m in model.forward_stages(x)] == [(8, 17, 9), (16, 9, 5), (24, 5, 3), (32, 3, 2)]
        assert torch.equal(model.forward_head(features), model(x))
        model.reset_classifier(7)
        assert model.eval()(x).shape == (2, 7)
        model.reset_classifier(0)
        torch.testing.assert_close(model(x), features.mean((2, 3)))


def test_a_distilled_network_gives_two_answers_in_training_and_their_mean_afterwards():
    model, x = small(distilled=True), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        pooled = model.pool(model.forward_features(x))
        torch.testing.assert_close(model(x), (model.head.labels(pooled) + model.head.teacher(pooled)) / 2)
    labels, teacher = model.train()(torch.rand(2, 3, 128, 128))
    assert labels.shape == teacher.shape == (2, 5)


def test_weight_decay_leaves_the_biases_of_distances_alone():
    model = small()
    assert model.no_weight_decay() == {"stages.3.3.mixer.biases"}
    assert model.no_weight_decay() < {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: LSConv(12), "multiple of it, got 12"),
        (lambda: LSConv(16, small=2), "odd, got 7 and 2"),
        (lambda: LSConv(16, large=4), "odd, got 4 and 3"),
        (lambda: Attention(10, 3, 4, 2), "3 heads cannot share 10"),
        (lambda: LSNet(widths=(8, 16, 24)), "four stages"),
        (lambda: small()(torch.rand(1, 4, 64, 64)), r"\[B, 3, H, W\]"),
        (lambda: small()(torch.full((1, 3, 64, 64), float("nan"))), "NaN"),
    ],
)
def test_what_does_not_fit_is_refused(call, says):
    with pytest.raises(InputError, match=says):
        call()
