"""Weights as whole numbers: few values, exact steps, gradients that pass, each number owned by one level."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.compress import neural_codes as nc
from foveate.errors import InputError
from foveate.layers.implicit import NeuralImage


def net(kind="fourier", levels=((3, 1), (5, 2), (8, 2))):
    return NeuralImage(levels, 3, kind, generator=torch.Generator().manual_seed(0))


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 8), st.integers(0, 1000), st.floats(1e-4, 100))
def test_few_values_near_the_weights_and_the_same_again(bits, seed, scale):
    weight = torch.randn(4, 50, generator=torch.Generator().manual_seed(seed)) * scale
    codes = nc.encode(weight, bits)
    rounded = codes.weights()
    assert all(len(row.unique()) <= 2**bits - 1 for row in rounded)
    steps = nc.step(codes.steps)[:, None]
    assert ((rounded - weight).abs() <= steps / 2 * (1 + 1e-6)).all()
    assert (steps[:, 0] <= weight.abs().amax(1) / (2 ** (bits - 1) - 1) * 1.13).all()
    again = nc.encode(rounded, bits)
    torch.testing.assert_close(again.weights(), rounded, rtol=0.13 / (2 ** (bits - 1) - 1), atol=float(steps.max()) / 2)


def test_steps_are_small_floats_in_order_and_found_again():
    steps = nc.step(torch.arange(256))
    assert (steps.diff() > 0).all()
    assert torch.equal(nc.step_number(steps), torch.arange(256))
    assert torch.equal(nc.step(nc.step_number(torch.tensor([0.0, 1e-9, 1.0, 1.01, 1e9]))), steps[[0, 0, 160, 161, 255]])
    assert (steps * 2.0**23).frac().eq(0).all()


def test_gradients_pass_straight_through():
    weight = torch.randn(3, 7, requires_grad=True)
    upstream = torch.randn(3, 7)
    (nc.through(weight, 4) * upstream).sum().backward()
    assert torch.equal(weight.grad, upstream)
    for bits in (2, 4, 8):
        torch.testing.assert_close(
            nc.through(weight, bits).detach(), nc.encode(weight, bits).weights(), rtol=1e-6, atol=1e-7
        )
    assert torch.equal(nc.through(torch.zeros(2, 3), 4), torch.zeros(2, 3))


def test_bits_out_of_range():
    for bits in (1, 9):
        with pytest.raises(InputError, match="2 to 8 bits"):
            nc.encode(torch.ones(2, 2), bits)


@pytest.mark.parametrize("kind", ["fourier", "siren"])
def test_a_level_needs_nothing_that_wider_levels_own(kind):
    image = net(kind)
    places = torch.rand(30, 2)
    before = [image.at(places, level) for level in range(3)]
    owners = nc.owners(image)
    assert {n: tuple(o.shape) for n, o in owners.items()} == {n: tuple(p.shape) for n, p in image.named_parameters()}
    for level in reversed(range(3)):
        with torch.no_grad():
            for name, weight in image.named_parameters():
                weight[owners[name] == level] += 1.0
        changed = [not torch.equal(image.at(places, lv), before[lv]) for lv in range(level + 1)]
        assert changed == [False] * level + [True]
    assert sum(int((o == 0).sum()) for o in owners.values()) == (3 * 3 + 3 + 9 + 3) + (9 if kind == "siren" else 0)


def test_thinning_sets_the_least_weights_to_zero():
    image = net()
    before = nc.encode(image.hidden, 4)
    assert nc.thin(image, 4, 0.25)
    gone = (nc.encode(image.hidden, 4).values == 0) & (before.values != 0)
    assert int(gone.sum()) == 32
    assert before.weights().abs()[gone].max() <= before.weights().abs()[(before.values != 0) & ~gone].min()
    with torch.no_grad():
        image.hidden.zero_()
    assert not nc.thin(image, 4)
