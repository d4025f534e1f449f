"""Perceptual losses: the laws of their parts, whose gradients flow, and any network as the judge."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from foveate.errors import InputError
from foveate.layers.vgg import VGG
from foveate.learn.perceptual_losses import (
    PerceptualLosses,
    Tapped,
    feature_loss,
    gram,
    style_loss,
    total_variation,
)

SEEDS = st.integers(0, 2**16)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return VGG(((4, 4), (6, 6), (8,)))


def losses(network, **settings):
    settings = {"content": ("relu2_2",), "style": ("relu1_2", "relu2_2", "relu3_1"), **settings}
    return PerceptualLosses(network, **settings)


def test_nothing_is_lost_on_the_picture_itself(network):
    x = torch.rand(2, 3, 16, 20)
    terms = losses(network)(x, x, x), losses(network, variation_weight=0.0)(x, x, x)
    assert float(terms[0]) == pytest.approx(0.1 * float(total_variation(x)))
    assert float(terms[1]) == 0


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 8), st.integers(1, 7), st.integers(1, 7), SEEDS)
def test_a_gram_matrix_has_no_places(channels, height, width, seed):
    dice = torch.Generator().manual_seed(seed)
    x = torch.randn(2, channels, height, width, dtype=torch.float64, generator=dice)
    found = gram(x)
    assert found.shape == (2, channels, channels)
    torch.testing.assert_close(found, found.transpose(1, 2))
    assert float(torch.linalg.eigvalsh(found).min()) > -1e-12
    order = torch.randperm(height * width, generator=dice)
    torch.testing.assert_close(gram(x.flatten(2)[..., order].view_as(x)), found)
    torch.testing.assert_close(gram(x.repeat(1, 1, 2, 3)), found)
    assert float(found[0, 0, 0]) == pytest.approx(float(x[0, 0].square().sum()) / (channels * height * width))


def test_a_gram_matrix_does_not_overflow_in_half_precision():
    x = torch.full((1, 2, 64, 64), 200.0, dtype=torch.float16)
    assert gram(x).dtype == torch.float32
    assert float(gram(x)[0, 0, 0]) == pytest.approx(200**2 / 2)


def test_parts_by_hand():
    x, y = torch.zeros(1, 1, 2, 2), torch.tensor([[[[0.0, 1.0], [2.0, 5.0]]]])
    assert float(feature_loss(x, y)) == pytest.approx(30 / 4)
    assert float(total_variation(y)) == pytest.approx((1 + 9 + 4 + 16) / 4)
    a, b = torch.zeros(1, 2, 2), torch.tensor([[[1.0, 2.0], [2.0, 3.0]]])
    assert float(style_loss(a, b)) == pytest.approx(18 / 4)
    assert float(style_loss(a, b, "sum")) == pytest.approx(18)
    assert float(style_loss(a, torch.cat([b, 2 * b]))) == pytest.approx((18 + 72) / 8)


def test_the_total_is_the_sum_over_layers_with_their_weights(network):
    x, c, s = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16), torch.rand(1, 3, 24, 12)
    whole = losses(network, content=("relu1_1", "relu2_2"), content_weight=3.0, style_weight=7.0).terms(x, c, s)
    one = [losses(network, content=(n,), style=("relu1_2",)).terms(x, c, s).content for n in ("relu1_1", "relu2_2")]
    layers = ("relu1_2", "relu2_2", "relu3_1")
    styles = [losses(network, style=(name,), style_weight=1.0).terms(x, c, s).style for name in layers]
    torch.testing.assert_close(whole.content, 3 * sum(one))
    torch.testing.assert_close(whole.style, 7 * sum(styles))
    torch.testing.assert_close(whole.total, whole.content + whole.style + whole.variation)
    weighed = losses(network, style={"relu1_2": 2.0, "relu3_1": 0.5}, style_weight=1.0).terms(x, c, s).style
    torch.testing.assert_close(weighed, 2 * styles[0] + 0.5 * styles[2])
    summed = losses(network, style=("relu3_1",), style_weight=1.0, entries="sum").terms(x, style=s).style
    torch.testing.assert_close(summed, 64 * styles[2])


def test_a_style_can_be_measured_once_for_pictures_of_any_size(network):
    x, s = torch.rand(3, 3, 16, 16), torch.rand(1, 3, 30, 22)
    loss = losses(network)
    torch.testing.assert_close(loss(x, style=loss.grams(s)), loss(x, style=s))
    torch.testing.assert_close(loss(x, style=s), loss(x, style=s.expand(3, -1, -1, -1)))
    c = torch.rand_like(x)
    torch.testing.assert_close(loss(x, loss.activations(c), s), loss(x, c, s))


@pytest.mark.parametrize("entries", ["mean", "sum"])
def test_relative_losses_have_no_units(network, entries):
    x, s = torch.rand(2, 3, 16, 16), torch.rand(1, 3, 20, 12)
    layers = {"relu1_2": 1.0, "relu3_1": 2.0}
    loss = losses(network, style=layers, style_weight=1.0, entries=entries).relative_to(s, x)
    nothing = {name: torch.zeros_like(a) for name, a in loss.activations(x).items()}
    empty = {name: torch.zeros_like(g) for name, g in loss.grams(s).items()}
    assert float(loss.terms(x, nothing).content) == pytest.approx(1, rel=1e-5)
    assert float(loss.terms(s, style=empty).style) == pytest.approx(3, rel=1e-5)


def test_the_picture_learns_and_the_judge_does_not(network):
    network.train()
    loss = losses(network).train()
    before = [p.clone() for p in loss.network.parameters()]
    y = torch.rand(1, 3, 16, 16, requires_grad=True)
    content = torch.rand(1, 3, 16, 16, requires_grad=True)
    loss(y, content, torch.rand(1, 3, 16, 16)).backward()
    assert y.grad is not None
    assert float(y.grad.abs().max()) > 0
    assert content.grad is None
    assert all(p.grad is None and not p.requires_grad for p in loss.network.parameters())
    assert all(torch.equal(p, q) for p, q in zip(loss.network.parameters(), before, strict=True))
    assert not loss.network.training
    assert network.training
    assert all(p.requires_grad for p in network.parameters())  # the one that was given is as it was


def test_batch_norms_of_the_judge_keep_their_statistics():
    judge = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    loss = PerceptualLosses(Tapped(judge, ["2"]), content=("2",), style=()).train()
    loss(torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8))
    assert int(loss.network.network[1].num_batches_tracked) == 0


def test_gradients_are_right():
    torch.manual_seed(0)
    call, inputs = PerceptualLosses.conformance_example()
    assert torch.autograd.gradcheck(call, inputs)
    x = torch.rand(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(total_variation, x)
    assert torch.autograd.gradcheck(lambda x: style_loss(gram(x), torch.ones(1, 3, 3).double()), x)
    assert torch.autograd.gradcheck(feature_loss, (x, torch.rand_like(x)))


def test_following_it_downhill_paints_the_style():
    torch.manual_seed(0)
    loss, style = PerceptualLosses(), torch.zeros(1, 3, 32, 32)
    style[..., ::4, :] = 1  # bright rows
    y = torch.rand(1, 3, 32, 32, requires_grad=True)
    grams, adam = loss.grams(style), torch.optim.Adam([y], lr=0.05)
    before = float(loss.terms(y, style=grams).style.detach())
    for _ in range(40):
        adam.zero_grad()
        loss(y, style=grams).backward()
        adam.step()
    assert float(loss.terms(y, style=grams).style.detach()) < before / 5


def test_any_network_can_judge(network):
    x, c, s = (torch.rand(1, 3, 16, 16) for _ in range(3))
    names = {"features.8": "relu2_2", "features.3": "relu1_2"}
    prepare = lambda x: (x - network.mean) / network.std  # noqa: E731
    tapped = Tapped(_Chain(network.features), [f"parts.{n.split('.')[1]}" for n in names], prepare)
    own = losses(network, style=("relu1_2", "relu2_2"))(x, c, s)
    other = PerceptualLosses(tapped, content=("parts.8",), style=("parts.3", "parts.8"))(x, c, s)
    torch.testing.assert_close(own, other)


class _Chain(nn.Module):
    """Parts one after the other, and at the end one that must not be reached."""

    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        raise AssertionError("the network ran further than it had to")


def test_a_module_that_is_overwritten_in_place_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3))
    with pytest.raises(InputError, match="'0' gave was changed in place"):
        Tapped(net, ["0", "2"])(torch.rand(1, 3, 8, 8))
    assert set(Tapped(net, ["1", "2"])(torch.rand(1, 3, 8, 8))) == {"1", "2"}


def test_hooks_are_gone_afterwards():
    tapped = Tapped(nn.Sequential(nn.Conv2d(3, 4, 3)), ["0"])
    tapped(torch.rand(1, 3, 8, 8))
    assert not tapped.network[0]._forward_hooks


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: PerceptualLosses(content=("relu9_9",)), "no relu9_9; it has relu1_1"),
        (lambda: PerceptualLosses(entries="all"), "entries='all'"),
        (lambda: Tapped(nn.Sequential(nn.ReLU()), ["a"]), "no module 'a'"),
        (lambda: PerceptualLosses()(torch.rand(3, 8, 8)), r"y is torch.float32 of shape \(3, 8, 8\)"),
        (lambda: PerceptualLosses()(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 9)), "one size"),
        (lambda: PerceptualLosses()(torch.rand(1, 3, 8, 8), style=[1]), "style is list"),
        (lambda: PerceptualLosses()(*torch.rand(2, 1, 3, 4, 4), torch.rand(1, 3, 4, 4)), "4 x 4 pixels are too small"),
        (lambda: feature_loss(torch.rand(1, 1, 2, 2), torch.rand(1, 1, 2, 3)), "one size"),
    ],
)
def test_what_does_not_fit(call, words):
    with pytest.raises(InputError, match=words):
        call()
