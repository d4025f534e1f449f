"""Learners: sums that grow one by one, and skipped work that changes nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from foveate.errors import InputError
from foveate.layers.learners import Learners, gains
from foveate.meter import count_flops


def made(learners=4, least=0, linear=False, inputs=6, outputs=5, hidden=3):
    torch.manual_seed(0)
    layer = Learners(inputs, outputs, hidden, learners, least, linear, gate=4).double()
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer


def by_hand(layer, x, k):
    """h(x, k), learner by learner."""
    out = torch.zeros(*x.shape[:-1], layer.w2.shape[2], dtype=x.dtype)
    for n in range(layer.learners):
        hidden = x @ layer.w1[n].T + layer.b1[n]
        hidden = hidden if layer.linear else 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
        out += (n < k)[..., None] * (hidden @ layer.w2[n])
    return out


@given(st.integers(1, 5), st.sampled_from([0, 1]), st.booleans(), st.integers(1, 9), st.integers(0, 99), st.booleans())
@settings(deadline=None, max_examples=40)
def test_gathered_and_masked_are_the_sum_of_the_first_learners(learners, least, linear, n, seed, recorded):
    layer, dice = made(learners, least, linear), torch.Generator().manual_seed(seed)
    x = torch.randn(2, n, 6, dtype=torch.float64, generator=dice)
    k = torch.randint(least, learners + 1, (2, n), generator=dice)
    nu = nn.functional.one_hot(k - least, learners + 1 - least).double()
    with torch.set_grad_enabled(recorded):
        torch.testing.assert_close(layer.gathered(x, k), by_hand(layer, x, k))
        torch.testing.assert_close(layer.weighted(x, nu), by_hand(layer, x, k))


def test_one_more_learner_adds_its_own_part_and_all_are_the_layer():
    layer, x = made(), torch.randn(2, 7, 6, dtype=torch.float64)
    sums = layer.sums(x)
    for n in range(1, 5):
        torch.testing.assert_close(sums[n - 1], by_hand(layer, x, torch.full((2, 7), n)))
    torch.testing.assert_close(layer(x), sums[-1])
    assert not layer.gathered(x, torch.zeros(2, 7, dtype=torch.long)).any()


def test_work_is_as_counted():
    layer, x = made(), torch.randn(1, 8, 6, dtype=torch.float64)
    k = torch.tensor([[0, 4, 1, 1, 2, 0, 3, 4]])
    with torch.no_grad():
        assert count_flops(layer.gathered, x, k) == layer.cost * 15
        assert layer.cost == 2 * 3 * (6 + 5)
        assert count_flops(layer, x) == layer.cost * 4 * 8
        assert count_flops(layer.gate, x) == layer.gate_cost * 8


def test_gradients_of_skipped_work_are_those_of_masked_work():
    layer, x, k = made(least=1), torch.randn(1, 9, 6, dtype=torch.float64), torch.tensor([[1, 4, 2, 1, 3, 1, 2, 4, 1]])
    found = []
    for run in (lambda: layer.gathered(x, k), lambda: layer.weighted(x, nn.functional.one_hot(k - 1, 4).double())):
        layer.zero_grad()
        run().square().sum().backward()
        found.append([p.grad.clone() for p in (layer.w1, layer.b1, layer.w2)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_the_choice_of_nu_gets_a_gradient():
    layer, x = made(), torch.randn(1, 3, 6, dtype=torch.float64)
    nu = torch.full((1, 3, 5), 0.2, dtype=torch.float64, requires_grad=True)
    layer.weighted(x, nu).sum().backward()
    expected = torch.stack([torch.zeros(1, 3), *layer.sums(x).sum(-1)], -1)
    torch.testing.assert_close(nu.grad.float(), expected.float(), rtol=1e-4, atol=1e-4)


@given(st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=6), st.floats(-3, 3, width=32))
@settings(deadline=None, max_examples=40)
def test_gains_fall_and_say_what_is_best_at_a_price(scores, price):
    scores = torch.tensor(scores, dtype=torch.float64)
    gain = gains(scores)
    assert (gain.diff() <= 1e-9).all()
    worth = scores - price * torch.arange(len(scores))
    assert worth[(gain > price).sum()] == pytest.approx(float(worth.max()), abs=1e-9)
    assert float(gain.sum()) == pytest.approx(float(scores[-1] - scores[0]), abs=1e-6)


def test_unusable_settings():
    for settings_ in ({"hidden": 0}, {"learners": 0}, {"least": 2}, {"gate": 0}):
        with pytest.raises(InputError, match="learners"):
            Learners(**{"inputs": 4, "outputs": 4, "hidden": 2} | settings_)
    assert gains(torch.zeros(3, 1)).shape == (3, 0)
